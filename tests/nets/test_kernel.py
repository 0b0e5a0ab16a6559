"""The compiled window attention against the same written out in float64."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import profile

from dagman.nets import kernel
from dagman.nets.window import WindowAttention
from dagman.nets.windows import FORBIDDEN

ROOT = Path(__file__).parents[2]
needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="the kernel was not compiled here")


def shares(
    qkv: Tensor, shift: Tensor, bias: Tensor, order: Tensor, kinds: Tensor, masks: Tensor
) -> tuple[Tensor, Tensor]:
    """What each query takes of each value, (windows, heads, tokens, tokens), and the values."""
    heads, tokens, _ = bias.shape
    windows = (qkv + shift)[order.long()].view(len(kinds), tokens, 3, heads, -1)
    query, key, value = windows.permute(2, 0, 3, 1, 4)
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + bias + masks.to(qkv.dtype)[kinds.long()][:, None]
    return logits.softmax(-1), value


def written_out(*given_: Tensor) -> Tensor:
    order = given_[3].long()
    share, value = shares(*given_)
    mixed = (share @ value).transpose(1, 2).reshape(len(order), -1)
    return torch.empty_like(mixed).index_copy(0, order, mixed)


@torch.no_grad()
def summed_sizes(given_: list[Tensor], probe: Tensor, to_rows: Tensor) -> list[float]:
    """How large the gradients of qkv, its bias and the position bias would be if nothing that they sum up cancelled."""
    share, value = shares(*given_)
    coming = probe.double()[given_[3].long()].view(len(share), share.shape[-1], share.shape[1], -1).transpose(1, 2)
    slope = (coming @ value.transpose(-2, -1)).abs()
    to_logits = share * (slope + (share * slope).sum(dim=-1, keepdim=True))
    return [to_rows.norm().item(), to_rows.abs().sum(dim=0).norm().item(), to_logits.sum(dim=0).norm().item()]


def case(windows: int, tokens: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows in any order, windows of three kinds."""
    rows = windows * tokens
    regions = torch.rand(3, tokens) < torch.tensor([[1.0], [0.5], [0.2]])
    masks = torch.where(regions[:, :, None] == regions[:, None], 0.0, FORBIDDEN)
    return [
        torch.randn(rows, 3 * heads * width).to(dtype).requires_grad_(),
        torch.randn(3 * heads * width).requires_grad_(),
        torch.randn(heads, tokens, tokens).mul(0.5).requires_grad_(),
        torch.randperm(rows).int(),
        torch.randint(0, 3, (windows,)).int(),
        masks,
    ]


def attended(given_: list[Tensor]) -> Tensor:
    *tensors, kinds, masks = given_
    return kernel.attention(*tensors, kinds=kinds, masks=masks)


def gap(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-9)).item()


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    windows=st.integers(1, 37),
    tokens=st.one_of(st.just(64), st.integers(2, 80), st.sampled_from([125, 216, 343])),
    heads=st.integers(1, 4),
    width=st.one_of(st.integers(6, 24), st.sampled_from([1, 3, 32, 40])),
    seed=st.integers(0, 2**16),
)
@example(windows=1, tokens=2, heads=1, width=6, seed=4)
@example(windows=1, tokens=125, heads=1, width=1, seed=627)
def test_outputs_and_all_gradients_equal_float64(windows, tokens, heads, width, seed):
    torch.manual_seed(seed)
    given_ = case(windows if tokens < 100 else min(windows, 3), tokens, heads, width)
    exact = [*(each.detach().double().requires_grad_() for each in given_[:3]), *given_[3:]]
    mixed, expected = attended(given_), written_out(*exact)
    probe = torch.randn(mixed.shape)
    found = torch.autograd.grad((mixed * probe).sum(), given_[:3])
    wanted = torch.autograd.grad((expected * probe).sum(), exact[:3])
    assert gap(mixed, expected) < 1e-6
    assert (mixed - expected).abs().max() < 1e-5
    for ours, plain, size in zip(found, wanted, summed_sizes(exact, probe, wanted[0]), strict=True):
        # A gradient that cancels (that of the keys' bias is 0 in theory) is as exact as an output, for what it sums up.
        assert gap(ours, plain) < 1e-5 or (ours - plain).norm() < 1e-6 * size


@needs_kernel
@pytest.mark.parametrize(("tokens", "width"), [(64, 12), (64, 24), (27, 7)])
def test_bfloat16_is_rounded_only_at_the_door(tokens, width):
    torch.manual_seed(0)
    rounded = case(9, tokens, 2, width, torch.bfloat16)
    exact = [*(each.detach().double().requires_grad_() for each in rounded[:3]), *rounded[3:]]
    mixed, expected = attended(rounded), written_out(*exact)
    assert mixed.dtype == torch.bfloat16
    assert gap(mixed, expected) < 2**-8
    probe = torch.randn(mixed.shape).bfloat16()
    found = torch.autograd.grad((mixed * probe).sum(), rounded[:3])
    wanted = torch.autograd.grad((expected * probe.double()).sum(), exact[:3])
    assert [each.dtype for each in found] == [torch.bfloat16, torch.float32, torch.float32]
    assert gap(found[0], wanted[0]) < 2**-8
    assert max(gap(ours, plain) for ours, plain in zip(found[1:], wanted[1:], strict=True)) < 1e-5


@needs_kernel
def test_threads_change_no_bit():
    torch.manual_seed(0)
    given_, before, results = case(50, 64, 2, 12), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            mixed = attended(given_)
            results.append([mixed, *torch.autograd.grad(mixed.square().sum(), given_[:3])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_kernel
def test_no_number_in_one_key_reaches_every_query_of_its_window():
    qkv, shift, bias, order, _, masks = case(2, 64, 1, 12)
    poisoned = qkv.detach().clone()
    poisoned[order[7], 12] = torch.nan  # a key of the first window
    mixed = kernel.attention(poisoned, shift, bias, order, kinds=torch.zeros(2, dtype=torch.int32), masks=masks)
    assert mixed[order[:64]].isnan().all()
    assert mixed[order[64:]].isfinite().all()


@needs_kernel
def test_logits_far_apart_give_no_nan():
    given_ = case(3, 64, 1, 12)
    mixed = attended([given_[0] * 100, *given_[1:]])
    mixed.sum().backward()
    assert mixed.isfinite().all()
    assert given_[0].grad.isfinite().all()


def ran(x: Tensor, **sizes: int) -> set[str]:
    """Which window attention computes on `x`, by the profiler."""
    module = WindowAttention(x.shape[-1], num_heads=2, window=4, shift=sizes.get("shift", 2)).to(x.dtype)
    with profile() as record:
        module(x).sum().backward()
        with torch.no_grad():
            module(x)
    names = {event.key for event in record.key_averages()}
    return {"kernel"} & {"kernel" for name in names if name.startswith("WindowKernel")} | {
        "pytorch" for name in names if "scaled_dot_product" in name or name == "aten::softmax"
    }


@needs_kernel
@pytest.mark.parametrize("grid", [(8, 8, 8), (8, 4, 12), (2, 2, 2), (6, 8, 8)])
def test_the_kernel_runs_where_it_can(grid):
    assert ran(torch.randn(2, *grid, 12)) == {"kernel"}
    with torch.autocast("cpu", torch.bfloat16):
        assert ran(torch.randn(2, *grid, 12)) == {"kernel"}


def test_pytorch_runs_for_what_it_cannot_take():
    assert ran(torch.randn(1, 8, 8, 8, 12, dtype=torch.float64)) == {"pytorch"}


@pytest.mark.parametrize(("grid", "shift"), [((8, 8, 8), 2), ((8, 8, 8), 0), ((6, 8, 12), 2), ((2, 4, 8), 2)])
def test_the_module_computes_the_same_with_and_without_it(grid, shift, monkeypatch):
    torch.manual_seed(0)
    module = WindowAttention(24, num_heads=2, window=4, shift=shift)
    x = torch.randn(2, *grid, 24, requires_grad=True)
    results = []
    for _ in range(2):
        y = module.proj(module(x))
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])])
        monkeypatch.setattr(kernel, "library", lambda: None)
    for one, other in zip(*results, strict=True):
        assert gap(one, other) < 1e-5


def test_it_can_be_switched_off():
    code = "from dagman.nets import kernel; print(kernel.library(), kernel.describe())"
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DAGMAN_KERNEL": "off"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.startswith("None window attention in PyTorch alone")


@pytest.fixture
def hook(tmp_path, monkeypatch) -> dict[str, Any]:
    """The build's own, on a copy of the sources beside which an older library lies."""
    found = run_path(str(ROOT / "hatch_build.py"))
    for source in [*found["FOLDER"].glob("*.cpp"), *found["FOLDER"].glob("*.h")]:
        shutil.copy(source, tmp_path)
    (tmp_path / "kernels.avx2.0123.so").write_text("of other sources")
    monkeypatch.setitem(found["compile_kernels"].__globals__, "FOLDER", tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    return found


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")
def test_a_compiler_makes_the_library_that_is_asked_for(hook, tmp_path, monkeypatch):
    monkeypatch.setitem(hook["compile_kernels"].__globals__, "LEVELS", {"avx2": ("-march=x86-64-v3",)})
    assert hook["compile_kernels"]() == [tmp_path / f"kernels.avx2.{kernel.sources()}.so"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".cpp", ".h", ".so"}


@needs_kernel
def test_the_best_library_for_this_processor_is_loaded():
    rounds = torch.cpu.get_capabilities().get("avx512_bf16")
    level = "avx512_bf16" if rounds else torch.backends.cpu.get_cpu_capability().lower()
    assert f"/kernels.{level}." in kernel.library()._name
    mlps = "MLPs in float32" + (" and, by AMX, in bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "")
    said = f"compiled kernels ({level.upper()}) for window attention, what lies between products, and {mlps}"
    assert kernel.describe() == said


@needs_kernel
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="what runs here is AVX2 already")
@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_older_processors_compute_the_same(level, tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.cpu.get_capabilities = dict\n"
        "import test_kernel as t; from dagman.nets import kernel\n"
        f"assert '/kernels.{level}.' in kernel.library()._name, kernel.library()\n"
        "t.test_outputs_and_all_gradients_equal_float64(); t.test_bfloat16_is_rounded_only_at_the_door(27, 7)\n"
        "import test_rows as r; r.test_layer_norm_and_all_its_gradients_equal_float64()\n"
        "r.test_gelu_of_a_layer_and_all_its_gradients_equal_float64()\n"
        "r.test_bfloat16_is_rounded_only_at_the_door(100)\n"
        "r.test_joined_branches_and_all_their_gradients_equal_float64()\n"
        "r.test_joined_branches_in_bfloat16((torch.float32, torch.bfloat16), True, True, 100)\n"
        "import test_mlp as m; m.test_in_float32_the_kernel_and_all_its_gradients_equal_float64()\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": level}, cwd=tmp_path, check=True)


@pytest.mark.parametrize("compiler", [None, "/no/such/compiler", "false", "true"])
def test_no_compiler_is_no_error(compiler, hook, tmp_path, monkeypatch, capsys):
    compiling = hook["compile_kernels"]
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    else:
        monkeypatch.setattr(hook["shutil"], "which", lambda name: None)
    assert compiling() == []
    assert not list(tmp_path.glob("*.so")), "the older one would not fit"
    assert "will run in PyTorch alone" in capsys.readouterr().err


def test_a_compiler_that_fails_takes_away_nothing_that_works(hook, tmp_path, monkeypatch):
    """An editable install uses the folder that a wheel is built in."""
    working = tmp_path / f"kernels.avx2.{kernel.sources()}.so"
    working.write_text("of these sources")
    monkeypatch.setenv("CXX", "false")
    assert hook["compile_kernels"]() == []
    assert [path.name for path in tmp_path.glob("*.so")] == [working.name]
