"""Which tokens share a window, as orders and masks that are made once: no roll, no copy but one gather.

Tokens reach their windows by one cached gather that shifts and partitions at once. Windows lie first and the batch
second, so that all windows which need the same shift mask stand together: a mask is then one small matrix for a
range of rows instead of one matrix for every window.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from dagman.nets.cells import Size

FORBIDDEN = -1e4
"""Added where a shifted window joins two far sides of the map. exp(-100) would be a float32 denormal, which is slow."""


class WindowLayout(NamedTuple):
    """Where each token of a (padded) batch of maps goes, and which pairs of tokens must not meet."""

    order: Int[Tensor, " rows"]
    """For each row (window, batch item, token in window), its token in (batch item, x, y, z) order."""
    inverse: Int[Tensor, " rows"]
    """The way back."""
    padded: Size
    """Sides of the map, each a multiple of the window's."""
    tokens: int
    """Tokens in a window."""
    masks: tuple[tuple[int, int, Float[Tensor, "tokens tokens"]], ...]
    """Ranges [start, stop) of (window, batch item) pairs with what is added to their logits."""
    kinds: Int[Tensor, " windows"]
    """For each (window, batch item) pair, which of `stacked` is added to its logits."""
    stacked: Float[Tensor, "kinds tokens tokens"]
    """Zeros, and what `masks` add."""


def effective_window(grid: Size, window: int, shift: int) -> tuple[Size, Size]:
    """Window and shift on a map: an axis no longer than the window becomes one window and loses its shift."""
    fits = [side <= window for side in grid]
    x, y, z = (side if fit else window for side, fit in zip(grid, fits, strict=True))
    i, j, k = (0 if fit else shift for fit in fits)
    return (x, y, z), (i, j, k)


@functools.lru_cache(maxsize=64)
def window_layout(batch: int, grid: Size, window: int, shift: int, device: torch.device) -> WindowLayout:
    """The layout of `batch` maps of `grid` tokens in windows of `window`, moved by `shift`.

    Args:
        batch: Number of maps.
        grid: Tokens (x, y, z).
        window: Side of a window in tokens.
        shift: Tokens by which windows are moved, 0 for none.
        device: Where the indices shall live.
    """
    sides, shifts = effective_window(grid, window, shift)
    padded = tuple(math.ceil(side / step) * step for side, step in zip(grid, sides, strict=True))
    count = [side // step for side, step in zip(padded, sides, strict=True)]
    tokens = math.prod(sides)
    # windows[w, t] is the raster index, in the padded map, of token t of window w
    raster = np.arange(math.prod(padded)).reshape(padded)
    raster = np.roll(raster, [-step for step in shifts], axis=(0, 1, 2))
    split = raster.reshape(count[0], sides[0], count[1], sides[1], count[2], sides[2])
    windows = split.transpose(0, 2, 4, 1, 3, 5).reshape(-1, tokens)
    # a window is of kind b2 b1 b0 (binary) where it is the last along a shifted axis, and so joins two far sides
    last = [(np.arange(n) == n - 1) & (step > 0) for n, step in zip(count, shifts, strict=True)]
    kinds = (4 * last[0][:, None, None] + 2 * last[1][:, None] + last[2]).ravel()
    by_kind = np.argsort(kinds, kind="stable")
    order = windows[by_kind][:, None, :] + raster.size * np.arange(batch)[None, :, None]
    inverse = np.argsort(order.ravel(), kind="stable")
    masks, start = [], 0
    stacked, place = [np.zeros((tokens, tokens), dtype=np.float32)], np.zeros(batch * len(windows), np.int32)
    for kind, number in zip(*np.unique(kinds, return_counts=True), strict=True):
        stop = start + int(number) * batch
        if kind:
            place[start:stop] = len(stacked)
            stacked.append(_shift_mask(int(kind), sides, shifts))
            masks.append((start, stop, _constant(stacked[-1], device)))
        start = stop
    x, y, z = padded
    return WindowLayout(
        order=_constant(order.ravel().astype(np.int32), device),
        inverse=_constant(inverse.astype(np.int32), device),
        padded=(x, y, z),
        tokens=tokens,
        masks=tuple(masks),
        kinds=_constant(place, device),
        stacked=_constant(np.stack(stacked), device),
    )


def _shift_mask(kind: int, sides: Size, shifts: Size) -> np.ndarray:
    """What is added to the logits of a window that joins far sides along the axes that `kind` names."""
    region = np.zeros(sides, dtype=np.int64)
    for axis in range(3):
        if kind & (4 >> axis):
            came_round = np.arange(sides[axis]) >= sides[axis] - shifts[axis]
            region += (came_round << axis).reshape([-1 if i == axis else 1 for i in range(3)])
    flat = region.ravel()
    return np.where(flat[:, None] == flat, 0.0, FORBIDDEN).astype(np.float32)


@functools.lru_cache(maxsize=16)
def relative_position_index(window: int, device: torch.device) -> Int[Tensor, "tokens tokens"]:
    """Row of the bias table for each pair of tokens of a window, as MONAI numbers them."""
    axes = np.indices((window,) * 3).reshape(3, -1)
    offsets = axes[:, :, None] - axes[:, None, :] + window - 1
    side = 2 * window - 1
    return _constant((offsets[0] * side + offsets[1]) * side + offsets[2], device)


def _constant(values: np.ndarray, device: torch.device) -> Tensor:
    """A cached tensor: never an inference tensor, which autograd could not save."""
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)


class _Permute(torch.autograd.Function):
    """Reorder the rows of a matrix; the gradient is reordered back by a gather, not a scatter."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        return permute(gradient[0], inverse, order), None, None


def permute(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Reorder the rows of a matrix; `inverse` is the way back, which the gradient takes."""
    permuted: Tensor = _Permute.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return permuted


@functools.lru_cache(maxsize=64)
def merge_layout(batch: int, grid: Size, device: torch.device) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """The order of the tokens of maps that puts each 2x2x2 of them side by side, and the way back.

    Octants are in the order of MONAI's `merging`: 000, 100, 010, 001, 110, 101, 011, 111.
    """
    raster = np.arange(batch * math.prod(grid)).reshape(batch, *grid)
    octants = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    order = np.stack([raster[:, i::2, j::2, k::2] for i, j, k in octants], axis=-1).ravel()
    inverse = np.argsort(order, kind="stable")
    return _constant(order.astype(np.int32), device), _constant(inverse.astype(np.int32), device)


class Blank(NamedTuple):
    """Windows that all look alike because a network sees none of their patches."""

    unique: Int[Tensor, " unique"]
    """Rows (windows of `partition`) to compute: those that stand for others, then those that are seen."""
    place: Int[Tensor, " windows"]
    """For each row, where its result stands among `unique`."""
    item: Int[Tensor, " unique"]
    """Batch item of each row of `unique`."""
    layout: WindowLayout
    """Masks and kinds of the rows of `unique`."""


MOST_SHARE = 0.85
"""Of the windows: where more need computing, to compute all is as fast."""


def blank_windows(
    blank: Bool[Tensor, "batch x y z"], layout: WindowLayout, *, for_each_item: bool = False
) -> Blank | None:
    """Which windows need computing; None where too few of them are alike.

    Args:
        blank: Patches that a network does not see; on a shifted layout, `in_whole_windows`.
        layout: Of a map without padding.
        for_each_item: One window stands for those of its batch item alone.
    """
    batch = len(blank)
    alike = blank.reshape(-1).index_select(0, layout.order).view(-1, layout.tokens).all(dim=1) & (layout.kinds == 0)
    groups = batch if for_each_item else 1
    group = torch.arange(len(alike), device=blank.device) % groups
    seen = (~alike).nonzero()[:, 0]
    if groups + len(seen) > MOST_SHARE * len(alike):
        return None
    # The first row of each group stands for it; where that one is seen, it is computed for nothing.
    first = torch.stack([(alike & (group == one)).to(torch.uint8).argmax() for one in range(groups)])
    place = torch.where(alike, group, groups - 1 + (~alike).cumsum(0))
    unique = torch.cat([first, seen])
    kinds = layout.kinds[unique]
    masks = []
    for kind, (_, _, mask) in enumerate(layout.masks, 1):
        start, stop = int((kinds < kind).sum()), int((kinds <= kind).sum())
        masks.append((start, stop, mask))
    return Blank(unique, place, unique % batch, layout._replace(kinds=kinds, masks=tuple(masks)))


def in_whole_windows(blank: Bool[Tensor, "batch x y z"], layout: WindowLayout) -> Bool[Tensor, "batch x y z"]:
    """Blank patches whose whole window is blank: those that are alike behind a block with these windows."""
    rows = blank.reshape(-1).index_select(0, layout.order).view(-1, layout.tokens).all(dim=1, keepdim=True)
    return rows.expand(-1, layout.tokens).reshape(-1).index_select(0, layout.inverse).view(blank.shape)


def partition(x: Float[Tensor, "batch x y z width"], layout: WindowLayout) -> Float[Tensor, "windows tokens width"]:
    """Maps to windows: zeros are added behind each axis, then tokens are shifted and grouped."""
    grid, width = x.shape[1:4], x.shape[4]
    if tuple(grid) != layout.padded:
        x = functional.pad(x, [0, 0, *(n for axis in (2, 1, 0) for n in (0, layout.padded[axis] - grid[axis]))])
    return permute(x.reshape(-1, width), layout.order, layout.inverse).view(-1, layout.tokens, width)


def reverse(
    windows: Float[Tensor, "windows tokens width"], layout: WindowLayout, grid: Size
) -> Float[Tensor, "batch x y z width"]:
    """Windows back to maps of `grid` tokens; what was added for padding is dropped."""
    width = windows.shape[-1]
    x = permute(windows.reshape(-1, width), layout.inverse, layout.order).view(-1, *layout.padded, width)
    return x if layout.padded == grid else x[:, : grid[0], : grid[1], : grid[2]]
