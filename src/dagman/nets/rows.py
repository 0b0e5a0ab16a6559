"""What is done to each token by itself: on CPUs by the compiled `row_kernel.cpp` where it is there, else by PyTorch.

PyTorch's LayerNorm takes several times as long on narrow tokens of bfloat16, and its gradient of GELU twice as long.
What lies between two matrix products (bias, drop path, sum, norm) costs it a pass over memory each, and another for
each gradient.
"""

import ctypes
from typing import Any, TypeGuard, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dagman.nets.kernel import NAMES, address, floats, loaded, runs

Kind = TypeVar("Kind", bound=nn.Module)

RESIDUALS = {
    (torch.float32, torch.float32): "float32",
    (torch.bfloat16, torch.bfloat16): "bfloat16",
    (torch.float32, torch.bfloat16): "mixed",
}
"""Dtypes of the stream and of a branch that there are kernels for."""


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, in float32 inside; what comes out has the dtype of what goes in."""

    def forward(self, x: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape width"]:
        """Normalise each token."""
        if runs(x) and _normalises(self, x):
            normalised: Tensor = residual(x, norm=self)[1]
            return normalised
        if x.dtype == torch.bfloat16 and x.device.type == "cpu":  # PyTorch sums the gradients over rows in bfloat16
            weight, bias = (None if each is None else each.float() for each in (self.weight, self.bias))
            return functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


def linear_gelu(x: Float[Tensor, "*shape width"], layer: nn.Module) -> Float[Tensor, "*shape outputs"]:
    """A linear layer and the exact GELU."""
    if runs(x) and is_plain_layer(layer) and dtype_of_products(x) in NAMES:
        activated: Tensor = BiasGelu.apply(functional.linear(x, layer.weight), layer.bias)  # type: ignore[no-untyped-call]
        return activated
    return functional.gelu(layer(x))


def branch_off(x: Float[Tensor, "*shape width"], norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The residual stream as it is, and normalised for a branch; the gradients of both are added in one pass."""
    if runs(x) and is_bare(norm, LayerNorm) and _normalises(norm, x):
        return residual(x, norm=norm)
    return x, norm(x)


def join(
    x: Float[Tensor, "items *shape width"],
    mixed: Float[Tensor, "items *shape in_width"],
    layer: nn.Module,
    factors: Float[Tensor, " items"] | None,
) -> Float[Tensor, "items *shape width"]:
    """Add a branch to the residual stream, as `join_and_branch_off`."""
    if joins(layer, x, mixed, factors):
        return residual(x, functional.linear(mixed, layer.weight), layer.bias, factors)[0]
    branch: Tensor = layer(mixed)
    return x + (branch if factors is None else branch * factors.view(-1, *(1,) * (x.ndim - 1)))


def join_and_branch_off(
    x: Float[Tensor, "items *shape width"],
    mixed: Float[Tensor, "items *shape in_width"],
    layer: nn.Module,
    factors: Float[Tensor, " items"] | None,
    norm: nn.Module,
) -> tuple[Float[Tensor, "items *shape width"], Float[Tensor, "items *shape width"]]:
    """Add a branch to the residual stream, and branch off the next.

    Args:
        x: The stream.
        mixed: What the branch's last layer works on.
        layer: That layer.
        factors: What each item's branch is multiplied with (drop path).
        norm: Of the next branch.

    Returns:
        The stream, and what comes out of the norm, in the precision of products.
    """
    if joins(layer, x, mixed, factors) and is_bare(norm, LayerNorm) and _normalises(norm, x):
        return residual(x, functional.linear(mixed, layer.weight), layer.bias, factors, norm)
    x = join(x, mixed, layer, factors)
    return x, norm(x)


def residual(
    x: Tensor,
    branch: Tensor | None = None,
    added: Tensor | None = None,
    factors: Tensor | None = None,
    norm: nn.LayerNorm | None = None,
) -> tuple[Tensor, Any]:
    """By the kernel; without a norm the second is None."""
    of_norm = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    applied: tuple[Tensor, Any] = Residual.apply(x, branch, added, factors, *of_norm, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return applied


def joins(layer: nn.Module, x: Tensor, mixed: Tensor, factors: Tensor | None) -> TypeGuard[nn.Linear]:
    """Whether the kernel can add such a branch; PyTorch refuses what does not fit together."""
    if not (runs(x) and is_plain_layer(layer)):
        return False
    fits = (*mixed.shape[:-1], layer.out_features) == x.shape and (factors is None or factors.shape == x.shape[:1])
    return fits and (x.dtype, dtype_of_products(mixed)) in RESIDUALS


def dtype_of_products(x: Tensor) -> torch.dtype:
    """In which a linear layer would multiply."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def is_plain_layer(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a kernel can do what the layer does, and nobody waits for the layer to be called."""
    return is_bare(layer, nn.Linear) and _is_readable(layer.bias)


def is_bare(layer: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether the layer is of this very kind, and nobody waits for it to be called or for its gradients."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) is kind and not any(hooks) and "forward" not in vars(layer)


def is_affine(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether weight and bias are all that there is to the layer, wherever they lie."""
    return is_bare(layer, nn.Linear) and layer.bias is not None


def _normalises(norm: nn.LayerNorm, x: Tensor) -> bool:
    return norm.normalized_shape == x.shape[-1:] and _is_readable(norm.weight) and _is_readable(norm.bias)


def _is_readable(weights: Tensor | None) -> bool:
    """Whether a kernel can read them as they lie."""
    if weights is None or weights.device.type != "cpu":
        return False
    return weights.dtype == torch.float32 and weights.is_contiguous()


class Residual(torch.autograd.Function):
    """sum = x + factor * (branch + added), and the LayerNorm of it; without a branch or a norm, the other alone.

    Two numbers a token are kept for the gradients, and the sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> tuple[Tensor, Tensor | None]:
        """The sum, or x itself, and that normalised.

        Given branch, added, factors, the norm's weight, bias and epsilon, and whether a gradient may be asked for.
        """
        branch, added, factors, weight, bias, epsilon, kept = given
        whole, width = x.contiguous(), x.shape[-1]
        rows = x.numel() // width
        branch, factors = (None if each is None else each.contiguous() for each in (branch, factors))
        single = None if factors is None else factors.float()
        stream = whole if branch is None else torch.empty_like(whole)
        out = None if weight is None else torch.empty_like(whole, dtype=x.dtype if branch is None else branch.dtype)
        wanted = kept and any(ctx.needs_input_grad)
        statistics = floats(x, rows, 2) if wanted and weight is not None else None
        name = RESIDUALS[x.dtype, x.dtype if branch is None else branch.dtype]
        each = rows // max(len(single), 1) if single is not None else 0
        getattr(loaded(), f"residual_forward_{name}")(
            *map(address, (whole, branch, added, single)),
            ctypes.c_int64(each),
            *map(address, (stream, weight, bias, out, statistics)),
            *_sizes(rows, width),
            ctypes.c_float(epsilon),
            torch.get_num_threads(),
        )
        if wanted:
            ctx.save_for_backward(stream if weight is not None else None, weight, statistics, single)
            ctx.name, ctx.each, ctx.like = name, each, (x.shape, x.dtype, x.device)
            ctx.branch = None if branch is None else branch.dtype
            ctx.set_materialize_grads(False)
        return (x if branch is None else stream), out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of stream, branch, its bias, and the norm's weight and bias."""
        stream, weight, statistics, factors = ctx.saved_tensors
        shape, dtype, device = ctx.like
        rows, width = shape.numel() // shape[-1], shape[-1]
        also, coming = (
            None if gradient is None else gradient.to(kind).contiguous()
            for gradient, kind in zip(gradients, (dtype, ctx.branch or dtype), strict=True)
        )
        if coming is None:  # nobody asked what was normalised
            weight = None
        like = next(gradient for gradient in (also, coming) if gradient is not None)
        into = also if weight is None else torch.empty(shape, dtype=dtype, device=device)
        differs = ctx.branch is not None and (factors is not None or ctx.branch != dtype)
        to_branch = torch.empty(shape, dtype=ctx.branch, device=device) if differs else None
        parts = loaded().row_parts(ctypes.c_int64(rows))
        norm_sums = None if weight is None else floats(like, parts, 2, width)
        branch_sums = None if ctx.branch is None else floats(like, parts, width)
        getattr(loaded(), f"residual_backward_{ctx.name}")(
            *map(address, (stream, weight, statistics, coming, also, factors)),
            ctypes.c_int64(ctx.each),
            *map(address, (into, to_branch, norm_sums, branch_sums)),
            *_sizes(rows, width),
            torch.get_num_threads(),
        )
        to_weight, to_bias = (None, None) if norm_sums is None else norm_sums.sum(dim=0)
        to_added = None if branch_sums is None else branch_sums.sum(dim=0)
        if ctx.branch is not None and to_branch is None:
            to_branch = into
        return into, to_branch, to_added, None, to_weight, to_bias, None, None


class BiasGelu(torch.autograd.Function):
    """GELU of what a bias is added to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        """Add and activate."""
        x, width = x.contiguous(), x.shape[-1]
        out, sizes = torch.empty_like(x), _sizes(x.numel() // width, width)
        _of("gelu_forward", x)(*map(address, (x, bias, out)), *sizes, torch.get_num_threads())
        ctx.save_for_backward(x, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Both in one pass."""
        x, bias = ctx.saved_tensors
        into, gradient, width = torch.empty_like(x), gradients[0].to(x.dtype).contiguous(), x.shape[-1]
        rows = x.numel() // width
        sums = floats(x, loaded().row_parts(ctypes.c_int64(rows)), width)
        given = map(address, (x, bias, gradient, into, sums))
        _of("gelu_backward", x)(*given, *_sizes(rows, width), torch.get_num_threads())
        return into, sums.sum(dim=0)


def _sizes(rows: int, width: int) -> tuple[ctypes.c_int64, int]:
    return ctypes.c_int64(rows), width


def _of(name: str, x: Tensor) -> Any:
    """The kernel of that name for the dtype of `x`."""
    return getattr(loaded(), f"{name}_{NAMES[x.dtype]}")
