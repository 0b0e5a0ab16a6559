"""From a scan's own grid to cubic voxels, and from the table and the air around it to the body.

The axes keep their direction: an oblique scan keeps its rotation in the affine, and nothing is interpolated across it.
The new grid shares its centre with the old one and covers the same box to within half a voxel in total, so that
mirrored or reordered input gives mirrored or reordered output.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

BODY_HU = -300
"""Fat, muscle and bone lie above, lung and air below."""
MARGIN_MM = 10.0
"""Air kept around the body."""
SMALLEST_PART_RATIO = 0.02
"""Parts of the body smaller than this share of the largest one (table rails, cables, noise) do not widen the box."""


class Taps(NamedTuple):
    """One axis of a separable filter: output `i` is the sum over `k` of `weights[i, k] * input[source[i, k]]`."""

    source: Int[np.ndarray, "output taps"]
    weights: Float[np.ndarray, "output taps"]

    @property
    def is_copy(self) -> bool:
        """Whether each output is one input, in order."""
        return len(self.source[0]) == 1


def positions(num: int, spacing_mm: float, target_mm: float) -> Float[np.ndarray, " output"]:
    """Where the new voxels of one axis lie, in old voxel indices.

    Args:
        num: Voxels of the old axis.
        spacing_mm: Old voxel size.
        target_mm: New voxel size.
    """
    # The small number lets a tie go up, whichever way the spacing was rounded.
    num_target = max(1, int(np.floor(num * spacing_mm / target_mm + 0.5 + 1e-6)))
    steps = np.arange(num_target) - (num_target - 1) / 2
    return steps * (target_mm / spacing_mm) + (num - 1) / 2


def taps(num: int, spacing_mm: float, target_mm: float, *, antialias: bool) -> Taps:
    """Weights of linear interpolation along one axis, widened to a triangle filter where `antialias` shrinks it.

    The triangle's weights are corrected so that constants and ramps pass unchanged at any ratio of spacings; beyond the
    edge the last voxel is repeated.
    """
    where = positions(num, spacing_mm, target_mm)
    if len(where) == num and np.allclose(where, np.arange(num), rtol=0, atol=1e-4):
        return Taps(np.arange(num)[:, None], np.ones((num, 1), np.float32))
    half_width = max(1.0, target_mm / spacing_mm) if antialias else 1.0
    reach = int(np.ceil(half_width))
    index = np.floor(where).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    distance = index - where[:, None]
    weights = np.maximum(0.0, 1 - np.abs(distance) / half_width)
    if half_width > 1:
        zeroth, first, second = ((weights * distance**power).sum(axis=1, keepdims=True) for power in range(3))
        weights *= (second - first * distance) / (zeroth * second - first**2)
    return Taps(np.clip(index, 0, num - 1), weights.astype(np.float32))


def resample(
    hu: Num[np.ndarray, "x y z"],
    spacing_mm: tuple[float, float, float],
    target_mm: float,
    *,
    antialias: bool,
) -> Num[np.ndarray, "new_x new_y new_z"]:
    """A volume on cubic voxels of `target_mm`; an exact copy where it has them already.

    Args:
        hu: Intensities.
        spacing_mm: Voxel size (x, y, z).
        target_mm: New voxel size.
        antialias: Average what lies between two new voxels on axes that shrink; without it, noise of thin slices stays.
    """
    for axis_mm in spacing_mm:
        # After three turns of "filter the first axis, put it last" the axes are back in order.
        hu = np.ascontiguousarray(
            np.moveaxis(_filter_first(hu, taps(len(hu), axis_mm, target_mm, antialias=antialias)), 0, 2)
        )
    return hu


def _filter_first(volume: np.ndarray, axis: Taps) -> np.ndarray:
    """Filter the first axis, element by element: the sums do not depend on threads or on a BLAS."""
    if axis.is_copy:
        return volume
    result = np.zeros((len(axis.source), *volume.shape[1:]), np.float32)
    term = np.empty(volume.shape[1:], np.float32)
    for i, (source, weights) in enumerate(zip(axis.source, axis.weights, strict=True)):
        for k in np.flatnonzero(weights):
            result[i] += np.multiply(volume[source[k]], weights[k], out=term, casting="unsafe")
    return result


def nearest(
    labels: Num[np.ndarray, "x y z"], spacing_mm: tuple[float, float, float], target_mm: float
) -> Num[np.ndarray, "new_x new_y new_z"]:
    """A label map on the grid that `resample` gives, each voxel the old one nearest to it.

    Of two as near (all are, halfway from 1 mm to 2 mm) it is the first, so that sizes stay; what is drawn then comes to
    lie up to half an old voxel further on. Segmentations are judged on the mask as it was drawn.
    """
    index = [
        np.clip(np.floor(positions(num, axis_mm, target_mm) + 0.5 - 1e-6).astype(np.int64), 0, num - 1)
        for num, axis_mm in zip(labels.shape, spacing_mm, strict=True)
    ]
    return labels[np.ix_(*index)]


def resampled_affine(
    affine: Float[np.ndarray, "4 4"], shape: tuple[int, int, int], target_mm: float
) -> Float[np.ndarray, "4 4"]:
    """Voxel to world of the grid that `resample` gives for a volume of `shape` with `affine`."""
    spacing_mm = np.linalg.norm(affine[:3, :3], axis=0)
    first = [positions(num, axis_mm, target_mm)[0] for num, axis_mm in zip(shape, spacing_mm, strict=True)]
    result = affine.copy()
    result[:3, :3] = affine[:3, :3] / spacing_mm * target_mm
    result[:3, 3] = affine[:3, :3] @ first + affine[:3, 3]
    return result


def body_box(
    hu: Num[np.ndarray, "x y z"], voxel_mm: float, keep: Bool[np.ndarray, "x y z"] | None = None
) -> tuple[slice, slice, slice]:
    """The box around the body with a margin of air; the whole volume where nothing in it looks like a body.

    Sheets of one or two voxels (table top, blankets) vanish on a grid twice as coarse that takes the lowest of three
    voxels along each axis; of what is left, every connected part of some size counts.

    Args:
        hu: Intensities on cubic voxels.
        voxel_mm: Their size.
        keep: Voxels that the box must hold as well, such as a mask.
    """
    from scipy import ndimage

    coarse = np.pad(hu > BODY_HU, [(0, max(3, num | 1) - num) for num in hu.shape], mode="edge")
    for axis in range(3):
        line = np.moveaxis(coarse, axis, 0)
        coarse = np.moveaxis(line[:-1:2] & line[1::2] & line[2::2], 0, axis)
    parts, num_parts = ndimage.label(coarse)
    sizes = np.bincount(parts.ravel(), minlength=num_parts + 1)[1:]
    boxes = [
        box
        for box, size in zip(ndimage.find_objects(parts), sizes, strict=True)
        if size >= SMALLEST_PART_RATIO * sizes.max()
    ]
    margin = int(np.ceil(MARGIN_MM / voxel_mm)) + 2  # the coarse grid may miss the outermost two
    low = np.array([[2 * edge.start - margin for edge in box] for box in boxes]).reshape(-1, 3)
    high = np.array([[2 * edge.stop + margin for edge in box] for box in boxes]).reshape(-1, 3)
    if not boxes:
        low, high = np.zeros((1, 3), int), np.array([hu.shape])
    if keep is not None and keep.any():
        voxels = [np.flatnonzero(keep.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
        low = np.vstack([low, [line[0] for line in voxels]])
        high = np.vstack([high, [line[-1] + 1 for line in voxels]])
    starts, stops = np.maximum(low.min(axis=0), 0), np.minimum(high.max(axis=0), hu.shape)
    x, y, z = (slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))
    return x, y, z
