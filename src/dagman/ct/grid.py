"""Where voxels lie: affines checked, turned to RAS+, compared. Positions are in mm, axes point right, front, head."""

import itertools
from pathlib import Path

import numpy as np

from dagman.errors import DagmanError

SPACING_MM = (0.05, 20.0)
"""Voxel sizes outside this range are typing errors or metres."""
MAX_SHEAR = 1e-3
_SLAB = 480
"""Voxels along y and z that are turned at once: wider slabs of thick volumes leave the cache."""
_EXPORT = "export the scan again with its true geometry"


def check_affine(path: Path, affine: np.ndarray) -> None:
    """Refuse an affine that places no honest grid.

    Args:
        path: For the message.
        affine: (4, 4), voxel index to mm.

    Raises:
        DagmanError: `E-AFFINE` when not finite, singular or sheared by more than 1e-3; `E-SPACING` outside 0.05-20 mm.
    """
    if not np.isfinite(affine).all():
        raise DagmanError("AFFINE", path, "its orientation matrix holds NaN or infinity", _EXPORT)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    check_spacing(path, spacing)
    axes = affine[:3, :3] / spacing
    shear = np.abs(axes.T @ axes - np.eye(3)).max()
    if shear > MAX_SHEAR:
        raise DagmanError("AFFINE", path, f"its axes are not at right angles (cosine {shear:.3g})", _EXPORT)


def check_spacing(path: Path, spacing: np.ndarray) -> None:
    """Refuse voxel sizes that are not between 0.05 and 20 mm."""
    low, high = SPACING_MM
    if not (np.isfinite(spacing).all() and (spacing >= low).all() and (spacing <= high).all()):
        sizes = ", ".join(f"{size:.4g}" for size in spacing)
        raise DagmanError("SPACING", path, f"voxels of {sizes} mm are outside {low}-{high:g} mm", _EXPORT)


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip axes so that they run nearest to right, front, head; no voxel changes.

    Args:
        array: Voxels of a grid.
        affine: (4, 4), its index to RAS mm.

    Returns:
        A view of the voxels and the affine of that view.
    """
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    order = max(itertools.permutations(range(3)), key=lambda p: sum(abs(axes[i, p[i]]) for i in range(3)))
    turned = affine[:, [*order, 3]].astype(float)
    array = array.transpose(order)
    for axis in range(3):
        if turned[axis, axis] < 0:
            array = np.flip(array, axis)
            turned[:3, 3] += turned[:3, axis] * (array.shape[axis] - 1)
            turned[:3, axis] *= -1
    return array, turned


def check_ras(affine: np.ndarray) -> None:
    """Refuse the affine of a volume made in memory whose axes were not turned to run nearest to right, front, head.

    Raises:
        DagmanError: `E-ORIENT`.
    """
    import nibabel

    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    nearest = max(sum(abs(axes[i, p[i]]) for i in range(3)) for p in itertools.permutations(range(3)))
    if np.trace(axes) < nearest - 1e-6 and nibabel.aff2axcodes(affine) != ("R", "A", "S"):  # far obliques: two rules
        problem = f"its axes run to {axis_codes(affine)}, where RAS is wanted"
        raise DagmanError("ORIENT", "volume", problem, "turn it first (nibabel.as_closest_canonical), or read its file")


def axis_codes(affine: np.ndarray) -> str:
    """Direction of each voxel axis, such as `LPS`."""
    letters = ("LR", "PA", "IS")
    codes = ""
    for axis in affine[:3, :3].T:
        world = int(np.abs(axis).argmax())
        codes += letters[world][int(axis[world] > 0)]
    return codes


def corner_distance_mm(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """How far apart two affines place the corners of one grid, at most, in mm."""
    corners = np.array([[*corner, 1] for corner in itertools.product(*((0, side - 1) for side in shape))]).T
    return float(np.linalg.norm((first @ corners - second @ corners)[:3], axis=0).max())


def check_extent(path: Path, shape: tuple[int, ...], spacing: np.ndarray, min_extent_mm: float) -> None:
    """Refuse a volume too thin to be a volume.

    Raises:
        DagmanError: `E-SMALL`.
    """
    extent = [side * float(size) for side, size in zip(shape, spacing, strict=True)]
    axis = int(np.argmin(extent))
    if extent[axis] < min_extent_mm - 1e-3:
        raise DagmanError(
            "SMALL",
            path,
            f"only {shape[axis]} voxels of {spacing[axis]:.3g} mm along {'xyz'[axis]}, "
            f"{extent[axis]:.1f} mm where {min_extent_mm:g} mm are needed",
            "give the whole scan or leave this one out",
        )


def write_in_c_order(array: np.ndarray, turned: np.ndarray) -> None:
    """Copy values slab by slab, so that reading and writing both stay in the cache.

    Args:
        array: (x, y, z), in any order; files have x fastest.
        turned: Where to, with z fastest.
    """
    if array.flags.c_contiguous:
        turned[...] = array
        return
    step = max(1, _SLAB // array.shape[2])
    for y in range(0, array.shape[1], step):
        turned[:, y : y + step] = array[:, y : y + step]
