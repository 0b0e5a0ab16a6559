"""Kernels in Triton for GPUs, in numbers equal to the plain path, which stays the reference and runs everywhere else.

Maps go in and come out in raster order: windows are never copied together, and attention matrices, hidden units and
the terms of the position bias's gradient never leave the chip. Triton is imported when a kernel first runs.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Path = Literal["triton", "plain"]

MOST_TOKENS = 64
"""Of a window: it is one tile."""
MOST_HEAD_WIDTH = 64
"""Of a wider one tiles take more memory than a block may share on some cards."""
MOST_FUSED_WIDTH = 96
"""Of a token: the weights of a wider half-block do not fit on a multiprocessor, and the library's products win."""

_forced: ContextVar[Path | None] = ContextVar("forced", default=None)


@contextlib.contextmanager
def forced(path: Path | None) -> Iterator[None]:
    """Run everything inside on one path, as tests and benchmarks do; Triton on a CPU needs TRITON_INTERPRET=1."""
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


def chosen(x: Tensor, tokens: int, head_width: int) -> Path:
    """The path that a map takes: Triton's on a GPU that has it, in any type but float64.

    Args:
        x: The map.
        tokens: In a window.
        head_width: Of a token in a head.
    """
    forced = _forced.get()
    if forced == "plain" or (forced is None and why_not(x.device) is not None):
        return "plain"
    fits = tokens <= MOST_TOKENS and head_width <= MOST_HEAD_WIDTH
    return "triton" if fits and computes_in(x) != torch.float64 else "plain"


def fuses(x: Tensor, hidden_width: int) -> bool:
    """Whether half-blocks run as one kernel each; in float32 their tiles are too large for a GPU.

    Args:
        x: The map.
        hidden_width: Of the MLP.
    """
    fits = max(x.shape[-1], hidden_width // 4) <= MOST_FUSED_WIDTH
    return fits and (x.device.type == "cpu" or computes_in(x).itemsize == 2)


@functools.lru_cache(maxsize=16)
def why_not(device: torch.device) -> str | None:
    """What keeps Triton from a device; None where it runs."""
    if device.type != "cuda":
        return f"{device.type} is no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def computes_in(x: Tensor) -> torch.dtype:
    """The type of matrix products with x, autocast or not."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def window_attention(
    qkv: Float[Tensor, "batch x y z channels"],
    zero: Float[Tensor, " channels"],
    bias: Float[Tensor, "heads tokens tokens"],
    *,
    window: int,
    shift: int,
) -> Float[Tensor, "batch x y z width"]:
    """Attention within the windows of maps.

    Args:
        qkv: Queries, keys and values of each token, as (3, heads, head width).
        zero: What they are for a token of zeros, which windows that reach over the map see there.
        bias: Added to the logits.
        window: Side of a window in tokens.
        shift: Tokens by which the windows are moved, 0 for none.
    """
    from dagman.nets.gpu import attention

    pad, bias = zero.to(qkv.dtype), bias.float().contiguous()
    return attention.window_attention(qkv.contiguous(), pad, bias, window=window, shift=shift)


def attention_half(
    x: Float[Tensor, "batch x y z width"],
    norm: nn.LayerNorm,
    qkv: nn.Linear,
    bias: Float[Tensor, "heads tokens tokens"],
    proj: nn.Linear,
    *,
    kept: Float[Tensor, " batch"] | None,
    window: int,
    shift: int,
) -> Float[Tensor, "batch x y z width"]:
    """The half-block x + kept * proj(window attention(qkv(norm(x)))).

    Args:
        x: Tokens.
        norm: Before attention.
        qkv: Queries, keys and values of all heads.
        bias: Added to the logits.
        proj: After attention.
        kept: What the result is multiplied by for each map; None for 1.
        window: Side of a window in tokens.
        shift: Tokens by which the windows are moved, 0 for none.
    """
    from dagman.nets.gpu import half

    kind = computes_in(x)
    shape = half.Shape(len(bias), window, shift, norm.eps)
    layers = [(layer.weight.to(kind), layer.bias.to(kind)) for layer in (qkv, proj)]
    bias = bias.float().contiguous()
    return half.attention_half(x.contiguous(), (norm.weight, norm.bias), layers[0], bias, layers[1], kept, shape)


def mlp_half(
    x: Float[Tensor, "*batch width"],
    norm: nn.LayerNorm,
    linear1: nn.Linear,
    linear2: nn.Linear,
    kept: Float[Tensor, " batch"] | None,
) -> Float[Tensor, "*batch width"]:
    """The half-block x + kept * linear2(gelu(linear1(norm(x)))).

    Args:
        x: Tokens.
        norm: Before the MLP.
        linear1: To the hidden width.
        linear2: And back.
        kept: What the result is multiplied by for each map; None for 1.
    """
    from dagman.nets.gpu import rows

    kind = computes_in(x)
    first, second = [(layer.weight.to(kind), layer.bias.to(kind)) for layer in (linear1, linear2)]
    return rows.mlp_half(x.contiguous(), (norm.weight, norm.bias), first, second, kept, norm.eps)
