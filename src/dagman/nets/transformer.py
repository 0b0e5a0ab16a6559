"""Parts of transformers that do not know about windows."""

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dagman.errors import DagmanError
from dagman.nets import rows
from dagman.nets.mlp import MLP
from dagman.nets.rows import LayerNorm, branch_off, join_and_branch_off


def check_heads(name: str, heads: int, width: int) -> None:
    """Refuse attention heads that do not share the width evenly.

    Raises:
        DagmanError: `E-CONFIG`.
    """
    if heads < 1 or width % heads:
        raise DagmanError("CONFIG", name, f"{heads} does not divide the width {width}", "choose a divisor of it")


def check_mlp_ratio(name: str, ratio: float, width: int) -> None:
    """Refuse an MLP without a hidden unit.

    Raises:
        DagmanError: `E-CONFIG`.
    """
    if int(width * ratio) < 1:
        raise DagmanError("CONFIG", name, f"{ratio:g} leaves no hidden unit", "give a number above 0 (paper: 4)")


class DropPath(nn.Module):
    """In training, leave a residual out for whole batch items, and scale the others up to keep the mean."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, items: int, like: Tensor) -> Float[Tensor, " items"] | None:
        """What the residual of each batch item is multiplied with, in the dtype of `like`; None where all stay."""
        if not self.training or self.chance == 0:
            return None
        keep = 1 - self.chance
        return torch.empty(items, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)


@functools.lru_cache(maxsize=64)
def sine_cosine_position(grid: tuple[int, int, int], width: int, device: torch.device) -> Float[Tensor, "cells width"]:
    """Fixed position code: a third of the width for each axis, half sines, half cosines, wavelengths 2 pi to 2e4 pi.

    Args:
        grid: Cells (x, y, z).
        width: Width of a token, a multiple of 6.
        device: Where the code shall live.
    """
    frequencies = 10000.0 ** -(np.arange(width // 6) / (width // 6))
    angles = np.indices(grid).reshape(3, -1)[:, :, None] * frequencies
    code = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    flat = code.transpose(1, 0, 2).reshape(-1, width).astype(np.float32)
    with torch.inference_mode(False):
        return torch.from_numpy(flat).to(device)


class GlobalBlock(nn.Module):
    """A pre-norm transformer block whose attention spans all tokens."""

    def __init__(
        self, width: int, *, num_heads: int, mlp_ratio: float, query_gain: float = 1.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        with torch.no_grad():
            self.qkv.weight[: 2 * width] *= query_gain
        self.proj = nn.Linear(width, width)
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(
        self, x: Float[Tensor, "batch tokens width"], position: Float[Tensor, "tokens width"] | None = None
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens-1"]]:
        """Two residual steps; also how the first token attends to the others (`attention_of_first`).

        Args:
            x: Tokens.
            position: Added to what queries and keys are made of, and to nothing else.
        """
        x, normalised = branch_off(x, self.norm1)
        query, key, value = self._heads_of(normalised, position)
        mixed = _attend(query, key, value).transpose(1, 2).reshape(x.shape)
        x, normalised = join_and_branch_off(x, mixed, self.proj, self.drop_path(len(x), x), self.norm2)
        x = self.mlp(x, normalised, self.drop_path(len(x), x))
        return x, attention_of_first(query, key)

    def heads_of(self, x: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (batch, heads, tokens, head width)."""
        return self._heads_of(self.norm1(x), position)

    def _heads_of(self, normalised: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        batch, tokens, width = normalised.shape
        qkv = self.qkv(normalised)
        if position is not None and not rows.is_affine(self.qkv):  # what it makes of a sum, it alone knows
            placed, position = self.qkv(normalised + position), None
            qkv = torch.cat([placed[..., : 2 * width], qkv[..., 2 * width :]], dim=-1)
        qkv = qkv.view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if position is not None:
            moved = functional.linear(position, self.qkv.weight[: 2 * width]).view(tokens, 2, self.num_heads, -1)
            query, key = query + moved[:, 0].transpose(0, 1), key + moved[:, 1].transpose(0, 1)
        return query, key, value


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The fused kernel; on CPUs in float32 at least, because its bfloat16 gradient is several times slower there."""
    if query.device.type != "cpu":
        return functional.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):
        single = torch.promote_types(query.dtype, torch.float32)
        mixed = functional.scaled_dot_product_attention(query.to(single), key.to(single), value.to(single))
        return mixed.to(query.dtype)


@torch.no_grad()
def attention_of_first(
    query: Float[Tensor, "batch heads tokens head_width"], key: Float[Tensor, "batch heads tokens head_width"]
) -> Float[Tensor, "batch tokens-1"]:
    """How the first token attends to the others: mean over heads, rescaled to sum 1, in float32, without gradient.

    Reference: equation 1; only this one row of the attention matrix is ever computed.
    """
    row = rows_of_first(query, key).mean(dim=1)[:, 1:]
    renormalised: Tensor = row / row.sum(dim=-1, keepdim=True)
    return renormalised


def rows_of_first(
    query: Float[Tensor, "batch heads tokens head_width"], key: Float[Tensor, "batch heads tokens head_width"]
) -> Float[Tensor, "batch heads tokens"]:
    """How the first token attends to all tokens in each head, in float32."""
    # products and a sum, not a matrix product, so that autocast leaves them in float32
    logits = (query[:, :, :1].float() * key.float()).sum(dim=-1) * query.shape[-1] ** -0.5
    rows: Tensor = logits.softmax(dim=-1)
    return rows
