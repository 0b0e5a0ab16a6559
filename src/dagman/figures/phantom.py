"""A sheet of scans with their nodules, in radiological convention: the patient's right is on the viewer's left."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dagman import files
from dagman.figures import image
from dagman.types import Volume

LUNG_HU, SOFT_HU = (-1000.0, 400.0), (-160.0, 240.0)
COLUMNS = ("axial, lung window", "axial, soft tissue", "coronal", "sagittal")


def draw_sheet(scans: Sequence[tuple[str, Volume, np.ndarray | None]]) -> Figure:
    """One row a scan: the axial plane of its nodule in two windows, and the coronal and sagittal planes through it.

    Args:
        scans: Title, CT, and a mask of its grid whose nonzero voxels are outlined; without one, the planes go through
            the middle.
    """
    figure = Figure(figsize=(12, 2.7 * len(scans)), layout="constrained", facecolor="black")
    for row, (title, volume, mask) in zip(figure.subplots(len(scans), 4, squeeze=False), scans, strict=True):
        chosen = (
            np.argwhere(mask == 1) if mask is not None and (mask == 1).any() else np.array(volume.hu.shape)[None] // 2
        )
        x, y, z = (int(middle) for middle in np.round(chosen.mean(axis=0)))
        views: tuple[tuple[tuple[slice | int, ...], tuple[float, float]], ...] = (
            ((slice(None), slice(None), z), LUNG_HU),
            ((slice(None), slice(None), z), SOFT_HU),
            ((slice(None), y, slice(None)), LUNG_HU),
            ((x, slice(None), slice(None)), LUNG_HU),
        )
        for axes, (plane, window_hu), name in zip(row, views, COLUMNS, strict=True):
            kept = [step for step, part in zip(volume.spacing_mm, plane, strict=True) if isinstance(part, slice)]
            _draw_plane(axes, volume.hu[plane], None if mask is None else mask[plane], window_hu, kept[1] / kept[0])
            axes.set_title(f"{title}\n{name}" if axes is row[0] else name, color="white", fontsize=8)
    return figure


def _draw_plane(
    axes: Axes, plane: np.ndarray, mask: np.ndarray | None, window_hu: tuple[float, float], aspect: float
) -> None:
    """First axis (towards right or front) drawn from right to left, second axis upwards."""
    axes.imshow(plane.T, cmap="gray", vmin=window_hu[0], vmax=window_hu[1], origin="lower", aspect=aspect)
    if mask is not None and mask.any():
        axes.contour(mask.T > 0, levels=[0.5], colors="tab:red", linewidths=0.7)
    axes.invert_xaxis()
    axes.set_axis_off()


def save_sheet(path: Path, scans: Sequence[tuple[str, Volume, np.ndarray | None]]) -> None:
    """Write `draw_sheet` as a PNG."""
    files.write_bytes(path, image.png(draw_sheet(scans), dpi=110))
