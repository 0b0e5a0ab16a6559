"""Under bfloat16 autocast every softmax of a step computes in float32, in the kernels that fuse it too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from dagman import recipes
from dagman.nets import kernel
from dagman.pretext.codistill import Knobs
from dagman.train import cost
from dagman.types import Views

UNIT = 2.0**-8
"""Largest relative error of rounding to bfloat16."""
EXPONENTIALS = ("softmax", "logsumexp", "exp", "logaddexp", "softplus")


def attended(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor | float, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention in float64, and the same of the values' sizes: what a rounding of the probabilities is measured by."""
    query, key, value = query.double(), key.double(), value.double()
    added = added.double() if isinstance(added, Tensor) else added
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    shares = (query @ key.transpose(-2, -1) * scale + added).softmax(-1)
    return shares @ value, shares @ value.abs()


def roundings(found: Tensor, exact: Tensor, sizes: Tensor) -> float:
    """Largest error in roundings to bfloat16: of the output, and of the probabilities before the values are summed."""
    return ((found.double() - exact).abs() / (UNIT * (exact.abs() + sizes) + 1e-6)).max().item()


class Watched(TorchDispatchMode):
    """Notes what every exponential is computed on, and how far fused attention in bfloat16 is from float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}
        self.fused: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found, name = func(*args, **kwargs), func.overloadpacket.__name__
        dtypes = {one.dtype for one in args if isinstance(one, Tensor) and one.is_floating_point()}
        if "scaled_dot_product" in name:
            self.seen.setdefault(name, set()).update(dtypes)
            if torch.bfloat16 in dtypes and "backward" not in name:
                added = next((one for one in (*args[3:], *kwargs.values()) if isinstance(one, Tensor)), 0.0)
                exact = attended(*args[:3], added, kwargs.get("scale"))
                self.fused.append(roundings(found if isinstance(found, Tensor) else found[0], *exact))
        elif any(word in name for word in EXPONENTIALS) and "expand" not in name:
            self.seen.setdefault(name, set()).update(dtypes)
        return found


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled kernel", "PyTorch alone"])
@pytest.mark.parametrize("recipe", ["dagman-tiny", "dagman-vit-tiny", "smit-swin-tiny"])
def test_every_softmax_of_a_step_is_in_float32(recipe: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(kernel, "library", lambda: None)
    elif kernel.library() is None:
        pytest.skip("the kernel was not compiled here")
    config = recipes.get(recipe)
    torch.manual_seed(0)
    module = cost.built(config, "cpu")
    images = torch.rand(2, 2, 1, *config.data.crop)
    views = Views(u=images[0], v=images[1], rows=torch.arange(2), padding=torch.zeros(2))
    with Watched() as watched:
        with torch.autocast("cpu", torch.bfloat16):
            outcome = module(views, Knobs(0.04, 0.04, attended=True), torch.Generator().manual_seed(0))
        outcome.losses.total.backward()
    exponentials = {name: dtypes for name, dtypes in watched.seen.items() if "scaled_dot_product" not in name}
    assert {dtype for dtypes in exponentials.values() for dtype in dtypes} <= {torch.float32, torch.float64}, (
        exponentials
    )
    assert {"_softmax", "_log_softmax", "_log_softmax_backward_data"} <= exponentials.keys()
    swin = config.encoder.kind == "swin"
    assert ("_softmax_backward_data" in exponentials) == (swin and not compiled), "of windows"
    assert all(error <= 1.01 for error in watched.fused), "bfloat16 at the door, float32 inside"
    assert bool(watched.fused) == (swin and not compiled), "the teacher's windows"
    assert any("scaled_dot_product" in name for name in watched.seen) == (not compiled or config.encoder.has_cls)


def by_pytorch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    bias = torch.zeros(1, query.shape[1], query.shape[2], key.shape[2], dtype=query.dtype)
    with torch.inference_mode():  # as the teacher's windows
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def by_our_kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    windows, heads, tokens, width = query.shape
    qkv = torch.stack([query, key, value]).permute(1, 3, 0, 2, 4).reshape(windows * tokens, 3 * heads * width)
    order, kinds = torch.arange(windows * tokens).int(), torch.zeros(windows).int()
    bias, masks = torch.zeros(heads, tokens, tokens), torch.zeros(1, tokens, tokens)
    mixed = kernel.attention(qkv, torch.zeros(qkv.shape[1]), bias, order, kinds=kinds, masks=masks)
    return mixed.view(windows, tokens, heads, width).transpose(1, 2)


@pytest.mark.parametrize("attend", [by_pytorch, by_our_kernel])
def test_fused_kernels_round_to_bfloat16_at_the_door_alone(attend: Callable[..., Tensor]) -> None:
    if attend is by_our_kernel and kernel.library() is None:
        pytest.skip("the kernel was not compiled here")
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 64, 12).mul(size).bfloat16() for size in (5, 5, 1))
    exact = attended(query, key, value, 0.0, None)
    assert roundings(attend(query, key, value), *exact) <= 1.01
    logits = (query.float() @ key.float().transpose(-2, -1) * 12**-0.5).bfloat16()
    lax = logits.softmax(-1) @ value
    assert roundings(lax, *exact) > 4, "the test would see a softmax of rounded logits"
