"""A training step counts no more of what makes it slow than it did: a guard that no busy machine can disturb.

Where a count falls, lower the limit here; where one grows, look for what was lost.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from dagman.nets import kernel
from dagman.nets.heads import ProjectionHead
from dagman.nets.stage import WindowBlock
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.nets.window import WindowAttention
from dagman.pretext import comparison, hiding
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.pretext.method import HeadConfig, MethodConfig
from dagman.types import Views

CROP = (64, 64, 64)
CELLS = 64
PAIRS = 2
HIDDEN = hiding.floor_count(0.7, CELLS) - hiding.floor_count(0.1, CELLS)
OTHER_PRODUCTS = 1
"""Batched products outside attention."""
OTHER_SUMS = 7
"""Sums outside blocks."""
KNOBS = Knobs(0.04, 0.04, attended=True)

COPIES = (
    *("aten::copy_", "aten::fill_", "aten::roll", "aten::gather", "aten::index", "aten::index_select"),
    *("aten::index_add_", "aten::_index_put_impl_"),
)
"""Operations that move numbers and compute nothing; their first input is as large as what they read or write."""
BYTES = {"double": 8, "float": 4, "c10::BFloat16": 2, "long int": 8, "int": 4, "unsigned char": 1, "bool": 1}


class Step:
    """A step of a small network at the smallest crop that has hints, shifts and hidden windows."""

    def __init__(self, heads: HeadConfig | None = None) -> None:
        torch.manual_seed(0)
        encoder = SwinConfig(
            embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 4), attention=AttentionConfig(num_heads=4)
        )
        heads = heads or HeadConfig(num_prototypes=64, hidden_width=32, bottleneck_width=16)
        method = MethodConfig(heads=heads)
        self.module = CoDistillation(encoder, method, mean_intensity=0.4, crop=CROP).train()
        images = torch.rand(2, PAIRS, 1, *CROP)
        self.views = Views(images[0], images[1], torch.arange(PAIRS), torch.zeros(PAIRS))

    def take(self) -> None:
        outcome = self.module(self.views, KNOBS, torch.Generator().manual_seed(0))
        outcome.losses.total.backward()
        self.module.zero_grad(set_to_none=True)


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


@pytest.fixture(params=["kernel", "pytorch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "pytorch":
        monkeypatch.setattr(kernel, "library", lambda: None)
    elif kernel.library() is None:
        pytest.skip("the kernel was not compiled here")
    return request.param


def test_only_hidden_cells_go_through_the_layer_of_k(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Counter[int] = Counter()
    plain = ProjectionHead.logits

    def counted(self: ProjectionHead, bottleneck: torch.Tensor) -> torch.Tensor:
        rows[bottleneck.shape[:-1].numel()] += 1
        return plain(self, bottleneck)

    monkeypatch.setattr(ProjectionHead, "logits", counted)
    step.take()
    views = 2 * PAIRS
    # [CLS], pooled: student and teacher; hidden cells: student and teacher; the mean of each head for the centers
    assert rows == {views: 4, views * HIDDEN: 2, 1: 3}


class WidestRows(TorchDispatchMode):
    """The most rows of K numbers that any operation gives out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        for each in given if isinstance(given, tuple | list) else (given,):
            if isinstance(each, torch.Tensor) and each.ndim > 1 and each.shape[-1] == self.width:
                held = each.untyped_storage().nbytes() // each.element_size()  # less than its numbers where expanded
                self.rows = max(self.rows, held // self.width)
        return given


def test_the_logits_of_many_cells_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prototypes, views = 251, 2 * PAIRS  # a width that nothing else has
    step = Step(HeadConfig(num_prototypes=prototypes, hidden_width=32, bottleneck_width=16))

    def taken() -> tuple[int, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        with WidestRows(prototypes) as widest:
            outcome = step.module(step.views, KNOBS, torch.Generator().manual_seed(0))
            outcome.losses.total.backward()
        gradients = {name: each.grad.clone() for name, each in step.module.named_parameters() if each.grad is not None}
        step.module.zero_grad(set_to_none=True)
        return widest.rows, outcome.losses._asdict() | outcome.diagnostics, gradients

    step.module.student.encoder.eval()  # no drop-path: both passes draw alike
    at_once, values, gradients = taken()
    assert at_once == views * HIDDEN
    monkeypatch.setattr(comparison, "MOST_LOGITS", 40 * prototypes)
    in_chunks, same_values, same_gradients = taken()
    assert in_chunks == 40
    for name, value in values.items():
        torch.testing.assert_close(same_values[name], value, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def test_no_more_windows_are_computed_than_before(step: Step, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attended: Counter[str] = Counter()
    mixed: Counter[str] = Counter()
    hooks = []
    for name, module in step.module.named_modules():
        if isinstance(module, WindowBlock):
            innermost = "_attend_in_place" if path == "kernel" else "attend"
            counted = counting(getattr(module.attn, innermost), functools.partial(count, attended, name))
            monkeypatch.setattr(module.attn, innermost, counted)
            hooks.append(module.mlp.register_forward_pre_hook(lambda _, given, to=name: count(mixed, to, *given)))
    step.take()
    for hook in hooks:
        hook.remove()
    assert attended == mixed, "the halves of a block compute the same windows"
    views = 2 * PAIRS
    shares = {name: count / (views * (CROP[0] >> 1 + int(name.split(".")[3])) ** 3) for name, count in mixed.items()}
    student, teacher = (f"{side}.encoder.stages.0.blocks.{{}}" for side in ("student", "teacher"))
    assert shares.pop(student.format(0)) < 0.42, "a hidden cell's windows stand for each other"
    assert shares.pop(teacher.format(0)) < 0.33, "and a dropped cell's"
    assert shares.pop(student.format(1)) < 0.77, "shifted windows within hidden cells too"
    assert shares.pop(teacher.format(1)) < 0.77
    assert set(shares.values()) == {1}, "all others once"


def count(counter: Counter[str], name: str, tokens: torch.Tensor, *_: Any) -> None:
    counter[name] += tokens.shape[:-1].numel()


def counting(function: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
    """The function, which notes what it is given."""

    def noted(*given: Any) -> Any:
        note(*given)
        return function(*given)

    return noted


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_no_attention_falls_to_the_math_path(step: Step, path: str, precision: str) -> None:
    with profile() as record, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        step.take()
    calls = Counter(event.key for event in record.key_averages() for _ in range(event.count))
    assert not [name for name in calls if "attention_math" in name]
    blocks = sum(isinstance(module, WindowAttention) for module in step.module.student.modules())
    if path == "kernel":
        assert (calls["WindowKernel"], calls["WindowKernelBackward"]) == (2 * blocks, blocks)
        assert calls["aten::bmm"] <= OTHER_PRODUCTS
        assert calls["aten::add"] <= OTHER_SUMS, "branches join the stream in a pass of their own"
    else:
        assert calls["aten::bmm"] <= OTHER_PRODUCTS + 6 * blocks, (
            "two products forward, four backward, of the student alone"
        )


@pytest.mark.parametrize(("precision", "most"), [("float32", 226.0), ("bf16", 185.0)])
def test_no_more_bytes_are_copied_than_before(step: Step, precision: str, most: float) -> None:
    if kernel.library() is None:
        pytest.skip("counted with the compiled kernel")
    with profile(record_shapes=True) as record, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        step.take()
    copies = [event for event in record.profiler.kineto_results.events() if event.name() in COPIES]
    copied = sum(math.prod(event.shapes()[0]) * BYTES[event.dtypes()[0]] for event in copies)
    assert copied / 2**20 < most
