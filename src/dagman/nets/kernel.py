"""The compiled kernels for CPUs; of these, window attention (`window_kernel.cpp`) with its exact gradients.

They are optional. Where they were not compiled from the sources that lie here, or `DAGMAN_KERNEL=off` is set, `library`
is None and PyTorch computes.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MOST_TOKENS = 343
"""Of a window; beyond it a row of the attention matrix no longer stays in cache."""


def sources() -> str:
    """Stands in the name of what is compiled: a library of other sources would read its arguments wrongly."""
    here = Path(__file__).parent
    paths = [*sorted(here.glob("*_kernel.cpp")), *sorted(here.glob("*.h"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels for this processor."""
    paths = [Path(__file__).with_name(f"kernels.{level}.{sources()}.so") for level in _levels()]
    for path in [] if _is_off() else filter(Path.exists, paths):
        with contextlib.suppress(OSError):  # PyTorch was built without the OpenMP that the kernel was compiled for
            return ctypes.CDLL(str(path))
    return None


@functools.cache
def has_tiles() -> bool:
    """Whether processor, kernels and system have matrix tiles (AMX) for this process."""
    allowed = getattr(library(), "mlp_allowed", None)
    return allowed is not None and bool(torch.cpu.get_capabilities().get("amx_bf16")) and allowed() == 1


def _levels() -> list[str]:
    """What the processor can do, best first, in the words of the build."""
    level = torch.backends.cpu.get_cpu_capability().lower()
    rounds = level == "avx512" and torch.cpu.get_capabilities().get("avx512_bf16")
    return ["avx512_bf16", level] if rounds else [level]


def _is_off() -> bool:
    return os.environ.get("DAGMAN_KERNEL") == "off"


def describe() -> str:
    """What CPUs run of the kernels, in words."""
    found = library()
    if found is None:
        why = "no compiled kernel of these sources; a C++ compiler and a new installation give one"
        return f"window attention in PyTorch alone ({'DAGMAN_KERNEL=off' if _is_off() else why})"
    level = Path(found._name).name.split(".")[1].upper()
    tiles = " and, by AMX, in bf16" if has_tiles() else ""
    return f"compiled kernels ({level}) for window attention, what lies between products, and MLPs in float32{tiles}"


def runs(x: Tensor) -> bool:
    """Whether a kernel can work on such a tensor; what is traced needs PyTorch's own operations."""
    plain = type(x) is Tensor and x.device.type == "cpu" and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return plain and x.dtype in NAMES and library() is not None


def takes(x: Tensor, tokens: int) -> bool:
    """Whether the kernel can attend in windows of these tokens."""
    cast = not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") in NAMES
    return runs(x) and cast and tokens <= MOST_TOKENS


def attention(
    qkv: Float[Tensor, "rows threefold"],
    shift: Float[Tensor, " threefold"],
    bias: Float[Tensor, "heads tokens tokens"],
    order: Int[Tensor, " rows"],
    *,
    kinds: Int[Tensor, " windows"],
    masks: Float[Tensor, "kinds tokens tokens"],
) -> Float[Tensor, "rows width"]:
    """Attention within windows.

    Args:
        qkv: Queries, keys and values of each token.
        shift: Added to each: the bias of the layer that they come from.
        bias: Added to the logits of each head, query by key.
        order: For each token of each window, its row.
        kinds: For each window, which of the masks is added to its logits.
        masks: Symmetric.
    """
    kept = torch.is_grad_enabled()
    mixed: Tensor = WindowKernel.apply(qkv, shift, bias, order, kinds, masks, kept)  # type: ignore[no-untyped-call]
    return mixed


class WindowKernel(torch.autograd.Function):
    """Forward and backward of the compiled kernel. Only queries, keys and values are kept, and two numbers a query."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        """As `attention`; the last says whether a gradient may be asked for, which nobody knows in here."""
        qkv, shift, bias, order, kinds, masks, kept = given
        heads, tokens, _ = bias.shape
        qkv, turned = qkv.contiguous(), bias.float().transpose(1, 2).contiguous()
        moved = shift.float().contiguous()
        mixed: Tensor = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        wanted = kept and any(ctx.needs_input_grad)
        statistics = floats(qkv, len(kinds), heads, 2, tokens) if wanted else None
        _call("forward", [qkv, moved, turned, order, kinds, masks, mixed, statistics], qkv, turned, kinds)
        if statistics is not None:
            ctx.save_for_backward(qkv, moved, turned, order, kinds, masks, statistics)
            ctx.dtypes = shift.dtype, bias.dtype
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of queries, keys and values, of what was added to them, and of the bias."""
        qkv, moved, turned, order, kinds, masks, statistics = ctx.saved_tensors
        ranges = loaded().window_ranges(ctypes.c_int64(len(kinds)))
        into, gradient = torch.empty_like(qkv), gradients[0].to(qkv.dtype).contiguous()
        to_shift, to_bias = floats(qkv, ranges, len(moved)), floats(qkv, ranges, *turned.shape)
        given = [qkv, moved, turned, order, kinds, masks, statistics, gradient, into, to_shift, to_bias]
        _call("backward", given, qkv, turned, kinds)
        of_shift, of_bias = ctx.dtypes
        summed = to_shift.sum(dim=0).to(of_shift), to_bias.sum(dim=0).transpose(1, 2).to(of_bias)
        return into, *summed, None, None, None, None


def loaded() -> ctypes.CDLL:
    """The kernels, where there are any."""
    found = library()
    assert found is not None
    return found


def _call(name: str, tensors: list[Tensor | None], qkv: Tensor, bias: Tensor, kinds: Tensor) -> None:
    """One function of the kernel, on the addresses of tensors."""
    heads, tokens, _ = bias.shape
    width = qkv.shape[1] // 3 // heads
    sizes = ctypes.c_int64(len(kinds)), tokens, heads, width, torch.get_num_threads()
    getattr(loaded(), f"window_{name}_{NAMES[qkv.dtype]}")(*map(address, tensors), *sizes)


def floats(beside: Tensor, *shape: int) -> Tensor:
    """Room for what a kernel writes in float32, whatever dtype and device are the default."""
    return beside.new_empty(shape, dtype=torch.float32)


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor begins; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
