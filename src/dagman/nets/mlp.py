"""The MLP of a transformer block: in PyTorch, or compiled (`mlp_float32_kernel.cpp`, `mlp_bfloat16_kernel.cpp`).

Between its two layers a token is four times as wide as in the stream. PyTorch writes all that to memory and reads it
again, twice each way, and keeps it for the gradient; the kernel does it block by block within the cache.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dagman.nets import rows
from dagman.nets.kernel import NAMES, address, floats, has_tiles, loaded, runs

MOST_HIDDEN, MOST_HIDDEN_WITHOUT_GRADIENT = 384, {torch.float32: 384, torch.bfloat16: 768}
"""Beyond, PyTorch's products are the faster way: the weights, and the sums of their gradients, leave the cache."""


class MLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden_width)
        self.linear2 = nn.Linear(hidden_width, width)

    def forward(
        self,
        x: Float[Tensor, "items *shape width"],
        normalised: Float[Tensor, "items *shape width"],
        factors: Float[Tensor, " items"] | None,
    ) -> Float[Tensor, "items *shape width"]:
        """Add the branch to the residual stream.

        Args:
            x: The stream.
            normalised: What comes out of the branch's norm.
            factors: What each item's branch is multiplied with (drop path).
        """
        if self._fuses(x, normalised, factors):
            weights = self.linear1.weight, self.linear1.bias, self.linear2.weight
            dtype, kept = rows.dtype_of_products(normalised), torch.is_grad_enabled()
            branch: Tensor = MlpKernel.apply(normalised, *weights, dtype, kept)  # type: ignore[no-untyped-call]
            return rows.residual(x, branch, self.linear2.bias, factors)[0]
        return rows.join(x, rows.linear_gelu(normalised, self.linear1), self.linear2, factors)

    def _fuses(self, x: Tensor, normalised: Tensor, factors: Tensor | None) -> bool:
        """Whether the kernel can compute the branch, and is the faster way."""
        first, second, dtype = self.linear1, self.linear2, rows.dtype_of_products(normalised)
        plain = rows.is_plain_layer(first) and rows.joins(second, x, normalised, factors)
        if not plain or normalised.shape != x.shape or dtype not in NAMES:
            return False
        hidden, width = first.weight.shape
        most = MOST_HIDDEN if torch.is_grad_enabled() else MOST_HIDDEN_WITHOUT_GRADIENT[dtype]
        together = x.shape[-1] == width and second.weight.shape == (width, hidden)
        fits = width % (2 if dtype == torch.bfloat16 else 8) == 0 and hidden % 32 == 0 and hidden <= most
        cast = torch.is_autocast_enabled("cpu") or first.weight.dtype == second.weight.dtype == dtype
        able = dtype == torch.float32 or has_tiles()
        return (
            together and fits and cast and able and all(map(runs, (normalised, first.weight.data, second.weight.data)))
        )


class MlpKernel(torch.autograd.Function):
    """Forward and backward of the compiled kernel, without the last bias. Only what goes in is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        """By the kernel of `dtype`.

        Given both weights with the first one's bias between, `dtype`, and whether a gradient may be asked for.
        """
        *weights, dtype, kept = given
        taken, first, second = (each.to(dtype).contiguous() for each in (x, weights[0], weights[2]))
        bias, out = weights[1].float().contiguous(), torch.empty_like(taken)
        _call("forward", [taken, first, bias, second, out], taken, first)
        if kept and any(ctx.needs_input_grad):
            ctx.save_for_backward(taken, first, bias, second)
            ctx.dtypes = [each.dtype for each in (x, *weights)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Of what goes in and of all weights; those of the weights are summed in float32."""
        taken, first, bias, second = ctx.saved_tensors
        coming, into = gradients[0].to(taken.dtype).contiguous(), torch.empty_like(taken)
        hidden, width = first.shape
        parts = loaded().mlp_parts(ctypes.c_int64(taken.numel() // width))
        sums = floats(taken, parts, 2, width + -width % 16, hidden)
        bias_sums = floats(taken, parts, hidden)
        _call("backward", [taken, first, bias, second, coming, into, sums, bias_sums], taken, first)
        to_first, to_second = (sums[:, one].sum(dim=0)[:width] for one in range(2))
        found = into, to_first.T.contiguous(), bias_sums.sum(dim=0), to_second
        return *(each.to(dtype) for each, dtype in zip(found, ctx.dtypes, strict=True)), None, None


def _call(name: str, tensors: list[Tensor], x: Tensor, first: Tensor) -> None:
    """One function of the kernel, on the addresses of tensors."""
    hidden, width = first.shape
    sizes = ctypes.c_int64(x.numel() // width), width, hidden, torch.get_num_threads()
    getattr(loaded(), f"mlp_{name}_{NAMES[x.dtype]}")(*map(address, tensors), *sizes)
