"""How well one predicted region agrees with a reference: overlap, surface, volume, lesions.

What the usual formulas leave open is decided here, once: where both are empty the prediction is right (Dice and surface
Dice 1, distance 0); where one of them is, it is wrong (Dice and surface Dice 0, and the distance is the diagonal of the
field). `state` tells these cases apart, so that they can be counted; none is dropped.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

TOLERANCE_MM = 2.0
"""Of the surface Dice."""
LARGE_CC = 3.0
"""The paper's limit for a nodule that is worth segmenting."""
State = Literal["both", "neither", "missed", "invented"]
"""Which of reference and prediction hold the class: both, neither, only the reference, only the prediction."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Scores of one class in one case."""

    state: State
    dice: float
    hd95_mm: float
    """95th percentile of the distances between the surfaces, the larger of the two directions."""
    nsd_2mm: float
    """Share of both surfaces that lies within 2 mm of the other."""
    reference_cc: float
    predicted_cc: float
    volume_error_cc: float
    """Predicted less reference."""
    volume_error_percent: float | None
    """Of the reference; None where that is empty."""
    lesions: int
    """Connected parts of the reference (26 neighbours)."""
    lesions_found: int
    """Those that share a voxel with the prediction."""
    large_lesions: int
    """Above 3 cc."""
    large_lesions_found: int
    false_positives: int
    """Connected parts of the prediction that share no voxel with the reference."""


def overlap(
    predicted: Bool[np.ndarray, "x y z"],
    reference: Bool[np.ndarray, "x y z"],
    spacing_mm: tuple[float, float, float],
) -> Overlap:
    """Compare two regions on one grid.

    Args:
        predicted: The region to judge.
        reference: The truth.
        spacing_mm: Voxel size (x, y, z).
    """
    voxel_cc, field_mm = math.prod(spacing_mm) / 1000, float(np.linalg.norm(np.multiply(reference.shape, spacing_mm)))
    if (either := predicted | reference).any():
        box = _box(either)
        predicted, reference = predicted[box], reference[box]
    both, ours, theirs = (int(np.count_nonzero(part)) for part in (predicted & reference, predicted, reference))
    sizes, found = _parts(reference, predicted)
    large = sizes * voxel_cc > LARGE_CC
    if ours and theirs:
        hd95_mm, nsd = _surfaces(predicted, reference, spacing_mm)
    else:
        hd95_mm, nsd = (field_mm, 0.0) if ours or theirs else (0.0, 1.0)
    return Overlap(
        state=_state(ours, theirs),
        dice=2 * both / (ours + theirs) if ours + theirs else 1.0,
        hd95_mm=hd95_mm,
        nsd_2mm=nsd,
        reference_cc=theirs * voxel_cc,
        predicted_cc=ours * voxel_cc,
        volume_error_cc=(ours - theirs) * voxel_cc,
        volume_error_percent=100 * (ours - theirs) / theirs if theirs else None,
        lesions=len(sizes),
        lesions_found=int(found.sum()),
        large_lesions=int(large.sum()),
        large_lesions_found=int((found & large).sum()),
        false_positives=int((~_parts(predicted, reference)[1]).sum()),
    )


def _state(predicted: int, reference: int) -> State:
    if predicted and reference:
        return "both"
    if predicted:
        return "invented"
    return "missed" if reference else "neither"


def _parts(region: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels of each connected part of a region, and whether the part shares one with the other region."""
    from scipy import ndimage

    parts, num_parts = ndimage.label(region, structure=np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=num_parts + 1)[1:]
    shared = np.bincount(parts[other], minlength=num_parts + 1)[1:]
    return sizes, shared > 0


def _surfaces(
    predicted: np.ndarray, reference: np.ndarray, spacing_mm: tuple[float, float, float]
) -> tuple[float, float]:
    """HD95 in mm and surface Dice, between the voxels of each surface, as MONAI defines them."""
    from scipy import ndimage

    ours, theirs = (part & ~ndimage.binary_erosion(part) for part in (predicted, reference))
    there, back = _distances(ours, theirs, spacing_mm), _distances(theirs, ours, spacing_mm)
    near = np.count_nonzero(there <= TOLERANCE_MM) + np.count_nonzero(back <= TOLERANCE_MM)
    return float(max(np.percentile(there, 95), np.percentile(back, 95))), near / (len(there) + len(back))


def _distances(one: np.ndarray, other: np.ndarray, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """From each voxel of a surface to the nearest of another, in mm.

    Of the transform only the place of the nearest voxel is asked for: whole maps of distances take five times the
    memory, gigabytes on a scan's own voxels.
    """
    from scipy import ndimage

    nearest = ndimage.distance_transform_edt(~other, sampling=spacing_mm, return_distances=False, return_indices=True)
    voxels = np.nonzero(one)
    steps = (nearest[:, *voxels] - np.stack(voxels)) * np.array(spacing_mm)[:, None]
    found: np.ndarray = np.sqrt((steps**2).sum(axis=0))
    return found


def _box(region: np.ndarray) -> tuple[slice, ...]:
    lines = [np.flatnonzero(region.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    return tuple(slice(int(line[0]), int(line[-1]) + 1) for line in lines)
