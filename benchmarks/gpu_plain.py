"""What a straightforward author writes: MONAI's window attention, explicit and copy by copy, on our weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from dagman.nets import gpu
from dagman.nets.stage import WindowBlock
from dagman.nets.window import WindowAttention
from dagman.nets.windows import effective_window, relative_position_index


def partition(x: Tensor, sides: tuple[int, int, int]) -> Tensor:
    """Maps to (windows, tokens, width), by a copy."""
    b, x1, y1, z1, c = x.shape
    i, j, k = sides
    split = x.view(b, x1 // i, i, y1 // j, j, z1 // k, k, c)
    return split.permute(0, 1, 3, 5, 2, 4, 6, 7).contiguous().view(-1, i * j * k, c)


def shift_mask(padded: list[int], sides: tuple[int, int, int], shifts: tuple[int, int, int], like: Tensor) -> Tensor:
    """Computed for every pass, -100 where tokens must not meet."""
    region, count = torch.zeros(1, *padded, 1, device=like.device), 0
    cuts = [
        (slice(-side), slice(-side, -shift), slice(-shift, None)) if shift else (slice(None),)
        for side, shift in zip(sides, shifts, strict=True)
    ]
    for i in cuts[0]:
        for j in cuts[1]:
            for k in cuts[2]:
                region[:, i, j, k, :] = count
                count += 1
    windows = partition(region, sides)[..., 0]
    difference = windows[:, None, :] - windows[:, :, None]
    return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)


def attention(self: WindowAttention, x: Tensor) -> Tensor:
    """`WindowAttention.forward` as MONAI composes it."""
    batch, *grid, width = x.shape
    sides, shifts = effective_window((grid[0], grid[1], grid[2]), self.window, self.shift)
    ends = [-side % step for side, step in zip(grid, sides, strict=True)]
    x = functional.pad(x, (0, 0, 0, ends[2], 0, ends[1], 0, ends[0]))
    padded = list(x.shape[1:4])
    x = torch.roll(x, [-shift for shift in shifts], (1, 2, 3)) if any(shifts) else x
    windows = partition(x, sides)
    count, tokens, _ = windows.shape
    qkv = self.qkv(windows).reshape(count, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv[0] * qkv.shape[-1] ** -0.5, qkv[1], qkv[2]
    index = relative_position_index(self.window, x.device)[:tokens, :tokens]
    bias = self.relative_position_bias_table[index.reshape(-1)].reshape(tokens, tokens, -1).permute(2, 0, 1)
    logits = query @ key.transpose(-2, -1) + bias.contiguous()[None]
    if any(shifts):
        mask = shift_mask(padded, sides, shifts, x)
        logits = logits.view(batch, len(mask), -1, tokens, tokens) + mask[None, :, None]
        logits = logits.view(count, -1, tokens, tokens)
    mixed = (logits.softmax(dim=-1).to(value.dtype) @ value).transpose(1, 2).reshape(count, tokens, width)
    i, j, k = sides
    x = mixed.view(batch, padded[0] // i, padded[1] // j, padded[2] // k, i, j, k, width)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).contiguous().view(batch, *padded, width)
    x = torch.roll(x, shifts, (1, 2, 3)) if any(shifts) else x
    return x[:, : grid[0], : grid[1], : grid[2]].contiguous()


@contextmanager
def monai_like() -> Iterator[None]:
    """Inside, every Swin runs like that, and computes every window."""
    forward = WindowBlock.forward
    with (
        gpu.forced("plain"),
        mock.patch.object(WindowAttention, "forward", attention),
        mock.patch.object(WindowBlock, "forward", lambda self, x, _=None: forward(self, x)),
    ):
        yield
