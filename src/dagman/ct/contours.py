"""Closed contours to voxels: a voxel is inside where its centre is, by the even-odd rule.

The rule is that of DICOM's keyhole and XOR contours: what two contours share is a hole. Written out here because the
libraries that fill polygons either take one contour at a time or draw its border as well.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int


def fill(
    contours: Sequence[Float[np.ndarray, "_ 2"] | Int[np.ndarray, "_ 2"]], shape: tuple[int, int]
) -> Bool[np.ndarray, "columns rows"]:
    """Pixels whose centre an odd number of contours holds; each is closed from its last point to its first.

    Args:
        contours: Points as (column, row) in pixel indices, where whole numbers are centres; any part may lie outside.
        shape: Columns and rows of the result.
    """
    columns, rows = shape
    starts = np.concatenate([np.asarray(contour, float) for contour in contours] or [np.zeros((0, 2))])
    ends = np.concatenate([np.roll(np.asarray(contour, float), -1, axis=0) for contour in contours] or [starts])
    upward = starts[:, 1] <= ends[:, 1]
    low, high = np.where(upward[:, None], starts, ends), np.where(upward[:, None], ends, starts)
    # An edge crosses the rows from its lower end up to, and without, its upper one: a shared corner counts once.
    first = np.clip(np.ceil(low[:, 1]), 0, rows).astype(np.int64)
    count = np.clip(np.ceil(high[:, 1]), 0, rows).astype(np.int64) - first
    edge = np.repeat(np.arange(len(count)), count)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    slope = (high[edge, 0] - low[edge, 0]) / (high[edge, 1] - low[edge, 1])
    crossing = low[edge, 0] + (row - low[edge, 1]) * slope
    crossings = np.zeros((columns + 1, rows), np.int64)
    np.add.at(crossings, (np.clip(np.ceil(crossing), 0, columns).astype(np.int64), row), 1)
    inside: np.ndarray = np.cumsum(crossings[:-1], axis=0) % 2 == 1
    return inside
