"""The MLP of a transformer block: in PyTorch, or in bfloat16 by the compiled `mlp_kernel.cpp`.

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
from dagman.nets.kernel import address, floats, has_tiles, loaded, runs

MOST_HIDDEN, MOST_HIDDEN_TRAINED = 768, 384
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
            branch: Tensor = MlpKernel.apply(normalised, *weights, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
            return rows.residual(x, branch, self.linear2.bias, factors)[0]
        return rows.join(x, rows.linear_gelu(normalised, self.linear1), self.linear2, factors)

    def _fuses(self, x: Tensor, normalised: Tensor, factors: Tensor | None) -> bool:
        """Whether the kernel can compute the branch, and is the faster way."""
        first, second = self.linear1, self.linear2
        plain = rows.is_plain_layer(first) and rows.joins(x, normalised, second, factors)
        if not plain or normalised.shape != x.shape or rows.dtype_of_products(normalised) != torch.bfloat16:
            return False
        rounded = torch.is_autocast_enabled("cpu") or first.weight.dtype == second.weight.dtype == torch.bfloat16
        hidden, width = first.weight.shape
        most = MOST_HIDDEN_TRAINED if torch.is_grad_enabled() else MOST_HIDDEN
        fits = width % 2 == 0 and hidden % 32 == 0 and hidden <= most
        return rounded and fits and runs(normalised) and has_tiles()


class MlpKernel(torch.autograd.Function):
    """Forward and backward of the compiled kernel, without the last bias. Only what goes in is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        """Given both weights with the first one's bias between, and whether a gradient may be asked for."""
        *weights, kept = given
        taken = x.to(torch.bfloat16).contiguous()
        first, bias, second = (each.to(dtype).contiguous() for each, dtype in zip(weights, _DTYPES, strict=True))
        out = torch.empty_like(taken)
        loaded().mlp_forward(*map(address, (taken, first, bias, second, out)), *_sizes(taken, first))
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
        given = (taken, first, bias, second, coming, into, sums, bias_sums)
        loaded().mlp_backward(*map(address, given), *_sizes(taken, first))
        to_first, to_second = (sums[:, one].sum(dim=0)[:width] for one in range(2))
        found = into, to_first.T.contiguous(), bias_sums.sum(dim=0), to_second
        return *(each.to(dtype) for each, dtype in zip(found, ctx.dtypes, strict=True)), None


_DTYPES = torch.bfloat16, torch.float32, torch.bfloat16


def _sizes(x: Tensor, first: Tensor) -> tuple[ctypes.c_int64, int, int, int]:
    hidden, width = first.shape
    return ctypes.c_int64(x.numel() // width), width, hidden, torch.get_num_threads()
