"""Attention within 3D windows, shifted every second block, in numbers equal to MONAI's Swin."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from dagman.nets import gpu, kernel, rows
from dagman.nets.cells import Size
from dagman.nets.windows import (
    WindowLayout,
    effective_window,
    partition,
    relative_position_index,
    reverse,
    window_layout,
)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias for each relative position.

    Args:
        width: Features of a token.
        num_heads: Attention heads; divides `width`.
        window: Side of a window in tokens.
        shift: Tokens by which the windows are moved, 0 for none.
    """

    def __init__(self, width: int, *, num_heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.shift = shift
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 3, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "batch x y z width"]) -> Float[Tensor, "batch x y z width"]:
        """Attend within each window of each map, up to the last layer: `proj` is applied where the branch joins."""
        grid = (x.shape[1], x.shape[2], x.shape[3])
        tokens, affine = self.tokens(grid), rows.is_affine(self.qkv)
        if affine and gpu.chosen(x, tokens, x.shape[-1] // self.num_heads) == "triton":
            return gpu.window_attention(
                self.qkv(x), self.qkv.bias, self.bias(tokens), window=self.window, shift=self.shift
            )
        layout = window_layout(x.shape[0], grid, self.window, self.shift, x.device)
        # the kernel finds a window's tokens where they lie
        if affine and layout.padded == grid and kernel.takes(x, layout.tokens):
            return self._attend_in_place(x, layout, layout.order)
        return reverse(self.attend(partition(x, layout), layout), layout, grid)

    def _attend_in_place(self, x: Tensor, layout: WindowLayout, order: Tensor) -> Tensor:
        """By the compiled kernel; `order` names the row of each token of each window."""
        qkv = functional.linear(x, self.qkv.weight).view(-1, 3 * x.shape[-1])  # the kernel adds the bias
        kinds = layout.kinds[: len(order) // layout.tokens]
        bias = self.bias(layout.tokens)
        mixed = kernel.attention(qkv, self.qkv.bias, bias, order, kinds=kinds, masks=layout.stacked)
        return mixed.view(x.shape)

    def attend(
        self, windows: Float[Tensor, "windows tokens width"], layout: WindowLayout
    ) -> Float[Tensor, "windows tokens width"]:
        """Attend within windows; `layout.masks` names the rows of `windows` that need one."""
        count, tokens, width = windows.shape
        affine = rows.is_affine(self.qkv)
        if affine and kernel.takes(windows, tokens):
            return self._attend_in_place(windows, layout, torch.arange(count * tokens, dtype=torch.int32))
        bias, head_width = self.bias(tokens), width // self.num_heads
        given = windows, bias, *self.qkv.parameters()
        trains = torch.is_grad_enabled() and any(each.requires_grad for each in given)
        if affine and windows.device.type == "cuda" and not trains:
            wider = [wide_heads(values, head_width) for values in (self.qkv.weight, self.qkv.bias)]
            qkv = functional.linear(windows, *wider)
        else:
            qkv = self.qkv(windows)
        query, key, value = qkv.view(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if trains:
            mixed = explicit_attention(query, key, value, bias, layout, scale=head_width**-0.5)
        else:
            mixed = fused_attention(query, key, value, bias, layout, scale=head_width**-0.5)[..., :head_width]
        return mixed.transpose(1, 2).reshape(count, tokens, width)

    def tokens(self, grid: Size) -> int:
        """Tokens in a window of such a map."""
        return math.prod(effective_window(grid, self.window, self.shift)[0])

    def bias(self, tokens: int) -> Float[Tensor, "heads tokens tokens"]:
        """The relative position bias; on a map smaller than a window its first `tokens` rows and columns, as MONAI."""
        table = self.relative_position_bias_table
        index = relative_position_index(self.window, table.device)[:tokens, :tokens]
        return table.index_select(0, index.reshape(-1)).view(tokens, tokens, -1).permute(2, 0, 1)


Heads = Float[Tensor, "windows heads tokens head_width"]


def wide_heads(values: Float[Tensor, "outputs ..."], head_width: int) -> Float[Tensor, "wider_outputs ..."]:
    """Zeros behind each head's outputs up to a multiple of 8: GPUs have fused kernels for such heads alone.

    Args:
        values: Weight or bias of a linear layer to queries, keys and values.
        head_width: Outputs of a head.
    """
    heads = values.view(-1, head_width, *values.shape[1:])
    return functional.pad(heads, [0, 0] * (values.ndim - 1) + [0, -head_width % 8]).flatten(0, 1)


def explicit_attention(
    query: Heads,
    key: Heads,
    value: Heads,
    bias: Float[Tensor, "heads tokens tokens"],
    layout: WindowLayout,
    *,
    scale: float,
) -> Heads:
    """Attention with its matrix written out, for training: the fused kernel has no fast gradient for the bias."""
    logits = ((query * scale) @ key.transpose(-2, -1)).float().add_(bias)
    # Adding a constant leaves the gradient as it is, so autograd need not know.
    constant = logits.detach()
    for start, stop, mask in layout.masks:
        constant[start:stop].add_(mask)
    mixed: Tensor = logits.softmax(dim=-1).to(value.dtype) @ value
    return mixed


def fused_attention(
    query: Heads,
    key: Heads,
    value: Heads,
    bias: Float[Tensor, "heads tokens tokens"],
    layout: WindowLayout,
    *,
    scale: float,
) -> Heads:
    """The same by PyTorch's fused kernel, one call for each kind of window."""
    free = layout.masks[0][0] if layout.masks else len(query)
    ranges = [(0, free, bias.detach()), *((start, stop, bias.detach() + mask) for start, stop, mask in layout.masks)]
    parts = [
        functional.scaled_dot_product_attention(
            query[start:stop], key[start:stop], value[start:stop], attn_mask=added.to(query.dtype)[None], scale=scale
        )
        for start, stop, added in ranges
        if stop > start
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
