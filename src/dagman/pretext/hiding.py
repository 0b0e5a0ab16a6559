"""What is hidden from whom, drawn on cells: pure functions that return True where a network cannot see.

Random draws happen on the CPU with the generator given, so they do not depend on the device that trains.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

Hints = Literal["top", "attmask", "shift", "none"]
ROUNDING = 1e-9
"""0.7 * 360 is 251.99... in floats; what is this close to a whole number is that number."""
BLOCK_ASPECT = (0.3, 3.3)
BLOCK_ATTEMPTS = 10


def floor_count(ratio: float, n: int) -> int:
    """The whole number of `ratio * n` cells, rounded down."""
    return math.floor(ratio * n + ROUNDING)


def ceil_count(ratio: float, n: int) -> int:
    """The whole number of `ratio * n` cells, rounded up."""
    return math.ceil(ratio * n - ROUNDING)


def attended(
    attention: Float[Tensor, "batch cells"],
    *,
    ratio: float,
    hint_ratio: float,
    hints: Hints = "top",
    reveal_ratio: float | None = None,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch cells"]:
    """Hide the cells that attention ranks highest, and show a few of the very highest as hints.

    Args:
        attention: Of the teacher to each cell; equal values rank by index.
        ratio: r, share of the cells ranked for hiding (paper: 0.7).
        hint_ratio: s, share of the cells shown as hints (paper: 0.1).
        hints: `top` hides ranks floor(sN) to floor(rN) - 1 (paper); `attmask` hides the top floor(rN) but
            floor(srN) drawn from the top floor(sN) (AttMask); `shift` hides floor(rN) cells from rank floor(sN) on;
            `none` hides the top floor(rN).
        reveal_ratio: r of the hints that `attmask` draws, where it is not that of hiding.
        generator: Draws the hints of `attmask`, and nothing else.

    Reference: section 3.1; Kakogeorgiou et al. 2022 for `attmask`.
    """
    batch, cells = attention.shape
    order = _ranking(attention)
    shown, ranked = floor_count(hint_ratio, cells), floor_count(ratio, cells)
    first = shown if hints in ("top", "shift") else 0
    last = shown + ranked if hints == "shift" else ranked
    hidden = _mark(order[:, first:last], cells)
    if hints == "attmask":
        share = hint_ratio * (ratio if reveal_ratio is None else reveal_ratio)
        revealed = random(batch, shown, count=floor_count(share, cells), generator=generator)
        hidden.scatter_(1, order[:, :shown], ~revealed.to(order.device, non_blocking=True))
    return hidden


def unattended(attention: Float[Tensor, "batch cells"], *, ratio: float) -> Bool[Tensor, "batch cells"]:
    """Hide the floor(rN) cells that attention ranks lowest.

    Args:
        attention: Of the teacher to each cell; equal values rank by index.
        ratio: r, share of the cells to hide.

    Reference: Li et al. 2021 (MST); AttMask-low.
    """
    cells = attention.shape[1]
    return _mark(_ranking(attention)[:, cells - floor_count(ratio, cells) :], cells)


def random(
    batch: int, cells: int, *, count: int | Int64[Tensor, " batch"], generator: torch.Generator | None
) -> Bool[Tensor, "batch cells"]:
    """Mark exactly `count` cells of each view, every choice equally likely.

    Args:
        batch: Views.
        cells: N, cells of a view.
        count: One for all views, or one for each.
        generator: On the CPU.
    """
    order = torch.rand(batch, cells, dtype=torch.float64, generator=generator).argsort(dim=1, stable=True)
    ranks = order.argsort(dim=1)
    return ranks < torch.as_tensor(count).view(-1, 1)


def blocks(grid: tuple[int, int, int], *, ratio: float, generator: torch.Generator) -> Bool[Tensor, " cells"]:
    """Hide exactly floor(rN) cells of one view: boxes first, single cells for what no box fits.

    Args:
        grid: Cells (x, y, z).
        ratio: r, share of the cells to hide.
        generator: Draws sizes, places and the single cells.

    Reference: BEiT's blocks (Bao et al. 2022) in three dimensions, as iBOT uses them.
    """
    hidden = torch.zeros(grid, dtype=torch.bool)
    budget = floor_count(ratio, hidden.numel())
    smallest = math.prod(max(1, side // 3) for side in grid)
    failures = 0
    while failures < BLOCK_ATTEMPTS and (left := budget - int(hidden.sum())) >= smallest:
        more = hidden.clone()
        more[_draw_box(grid, smallest, left, generator)] = True
        grown = int(hidden.sum()) < int(more.sum()) <= budget
        hidden, failures = (more, 0) if grown else (hidden, failures + 1)
    flat = hidden.flatten()
    visible = (~flat).nonzero()[:, 0]
    flat[visible[torch.randperm(len(visible), generator=generator)[: budget - int(flat.sum())]]] = True
    return flat


def repeat(
    values: Shaped[Tensor, "batch cells"], grid: tuple[int, int, int], times: int
) -> Shaped[Tensor, "batch x y z"]:
    """Give every patch or voxel the value of its cell.

    Args:
        values: On cells, in C order of `grid`.
        grid: Cells (x, y, z).
        times: Side of a cell: 2^k in patches, 2^(k+1) in voxels, for cells of stage k.
    """
    x, y, z = grid
    boxes = values.view(-1, x, 1, y, 1, z, 1).expand(-1, x, times, y, times, z, times)
    return boxes.reshape(-1, x * times, y * times, z * times)


def cut(images: Float[Tensor, "batch 1 x y z"], side: int) -> Float[Tensor, "batch gx gy gz side side side"]:
    """A view of crops cell by cell.

    Args:
        images: Crops.
        side: Of a cell, in voxels.
    """
    batch, _, x, y, z = images.shape
    boxes = images.view(batch, x // side, side, y // side, side, z // side, side)
    return boxes.permute(0, 1, 3, 5, 2, 4, 6)


def _ranking(attention: Tensor) -> Tensor:
    """Cells of each view from the most attended to the least."""
    return attention.sort(dim=1, descending=True, stable=True).indices


def _mark(chosen: Tensor, cells: int) -> Tensor:
    """True at the chosen cells of each view."""
    marks = torch.zeros(len(chosen), cells, dtype=torch.bool, device=chosen.device)
    return marks.scatter_(1, chosen, value=True)


def _draw_box(
    grid: tuple[int, int, int], smallest: int, largest: int, generator: torch.Generator
) -> tuple[slice, slice, slice]:
    """A box of `smallest` to `largest` cells; an empty one where the draw is too long or does not fit."""
    low, high = BLOCK_ASPECT
    size, *aspects, x, y, z = torch.rand(6, dtype=torch.float64, generator=generator).tolist()
    cells = smallest + size * (largest - smallest)
    to_y, to_z = (low * (high / low) ** aspect for aspect in aspects)
    side_x = (cells * to_y * to_z) ** (1 / 3)
    sides = [round(side_x), round(side_x / to_y), round(side_x / to_z)]
    too_long = min(sides) < 1 or max(sides) > high * min(sides)
    if too_long or math.prod(sides) < smallest or any(side > axis for side, axis in zip(sides, grid, strict=True)):
        return slice(0), slice(0), slice(0)
    starts = [int(u * (axis - side + 1)) for u, axis, side in zip((x, y, z), grid, sides, strict=True)]
    box = [slice(start, start + side) for start, side in zip(starts, sides, strict=True)]
    return box[0], box[1], box[2]
