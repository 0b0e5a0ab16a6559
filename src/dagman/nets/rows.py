"""What is done to each token by itself: on CPUs by the compiled `row_kernel.cpp` where it is there, else by PyTorch.

PyTorch's LayerNorm takes several times as long on narrow tokens of bfloat16, and its gradient of GELU twice as long;
the gradient of the bias before it costs another pass there.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dagman.nets.kernel import NAMES, address, loaded, runs


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, in float32 inside; what comes out has the dtype of what goes in."""

    def forward(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """Normalise each token."""
        if runs(x) and self.normalized_shape == x.shape[-1:] and _plain(self.weight) and _plain(self.bias):
            normalised: Tensor = LayerNormKernel.apply(x, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
            return normalised
        return super().forward(x)


def linear_gelu(x: Float[Tensor, "*shape width"], layer: nn.Linear) -> Float[Tensor, "*shape outputs"]:
    """A linear layer, whose hooks are not called, and the exact GELU."""
    if runs(x) and torch.is_grad_enabled() and type(layer) is nn.Linear and _plain(layer.bias):
        mixed = functional.linear(x, layer.weight, layer.bias.detach())
        if runs(mixed):  # autocast may have cast it
            activated: Tensor = GeluKernel.apply(mixed, layer.bias)  # type: ignore[no-untyped-call]
            return activated
    return functional.gelu(layer(x))


def _plain(weights: Tensor | None) -> bool:
    """Whether a kernel can read them as they lie."""
    return weights is not None and weights.dtype == torch.float32 and weights.is_contiguous()


class LayerNormKernel(torch.autograd.Function):
    """Forward and backward of the compiled LayerNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """Normalise; two numbers a token are kept for the gradients."""
        x, width = x.contiguous(), x.shape[-1]
        out, rows = torch.empty_like(x), x.numel() // width
        statistics = torch.empty(rows, 2) if any(ctx.needs_input_grad) else None
        sizes = ctypes.c_int64(rows), width, ctypes.c_float(epsilon), torch.get_num_threads()
        _of("norm_forward", x)(*map(address, (x, weight, bias, out, statistics)), *sizes)
        if statistics is not None:
            ctx.save_for_backward(x, weight, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of the tokens, of weight and of bias."""
        x, weight, statistics = ctx.saved_tensors
        into, width = torch.empty_like(x), x.shape[-1]
        rows = ctypes.c_int64(len(statistics))
        sums = torch.empty(loaded().row_parts(rows), 2, width)
        gradient = gradients[0].to(x.dtype).contiguous()
        given = map(address, (x, weight, statistics, gradient, into, sums))
        _of("norm_backward", x)(*given, rows, width, torch.get_num_threads())
        to_weight, to_bias = sums.sum(dim=0)
        return into, to_weight, to_bias, None


class GeluKernel(torch.autograd.Function):
    """PyTorch's GELU with the compiled gradients: of what goes in, and of a bias that was added to it before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG004
        """Activate; `bias` is in `x` already."""
        ctx.save_for_backward(x.contiguous())
        return functional.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Both in one pass."""
        (x,) = ctx.saved_tensors
        into, gradient, width = torch.empty_like(x), gradients[0].to(x.dtype).contiguous(), x.shape[-1]
        rows = ctypes.c_int64(x.numel() // width)
        sums = torch.empty(loaded().row_parts(rows), width)
        _of("gelu_backward", x)(*map(address, (x, gradient, into, sums)), rows, width, torch.get_num_threads())
        return into, sums.sum(dim=0)


def _of(name: str, x: Tensor) -> Any:
    """The kernel of that name for the dtype of `x`."""
    return getattr(loaded(), f"{name}_{NAMES[x.dtype]}")
