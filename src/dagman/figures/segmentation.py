"""A few segmented cases: the CT with the outlines of reference and prediction, three planes each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Num, UInt8
from matplotlib.figure import Figure

from dagman.figures import image
from dagman.figures.attention import PLANES, Plane, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE, PREDICTION = "#37d67a", "#ff5a5f"


WINDOW_HU = (-175.0, 250.0)
"""Soft tissue, whatever window the network sees."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """One case: arrays on one RAS+ grid."""

    title: str
    hu: Num[np.ndarray, "x y z"] | None
    """None where only masks are known."""
    reference: UInt8[np.ndarray, "x y z"]
    predicted: UInt8[np.ndarray, "x y z"]
    spacing_mm: tuple[float, float, float]


def png(scenes: Sequence[Scene], title: str) -> bytes:
    """Draw a sheet: one row for each case, planes through the middle of the reference.

    Args:
        scenes: Cases.
        title: Over the whole picture.

    Returns:
        A PNG file.
    """
    height = 3.4 * len(scenes) + 0.8
    figure = Figure(figsize=(11, height), dpi=90, facecolor="black")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.75 / height, wspace=0.03, hspace=0.14)
    figure.text(0.01, 1 - 0.1 / height, title, color="white", fontsize=12, va="top")
    figure.text(0.01, 1 - 0.36 / height, "reference", color=REFERENCE, fontsize=10, va="top")
    figure.text(0.10, 1 - 0.36 / height, "prediction", color=PREDICTION, fontsize=10, va="top")
    rows = figure.subplots(len(scenes), len(PLANES), squeeze=False)
    for axes, scene in zip(rows, scenes, strict=True):
        centre = _centre(scene)
        for plot, plane in zip(axes, PLANES, strict=True):
            _draw(plot, plane, scene, centre)
        axes[0].set_title(scene.title, color="white", fontsize=9, loc="left")
    return image.png(figure, facecolor="black", metadata={"Software": None})


def _centre(scene: Scene) -> tuple[int, int, int]:
    """The voxel of the reference nearest to its middle, else of the prediction, else the middle of the field."""
    for region in (scene.reference, scene.predicted):
        voxels = np.argwhere(region)
        if len(voxels):
            nearest = voxels[np.linalg.norm(voxels - voxels.mean(axis=0), axis=1).argmin()]
            return int(nearest[0]), int(nearest[1]), int(nearest[2])
    x, y, z = (side // 2 for side in scene.reference.shape)
    return x, y, z


def _draw(axes: "Axes", plane: Plane, scene: Scene, centre: tuple[int, int, int]) -> None:
    column, row = plane.axes
    across = scene.reference.shape[column] * scene.spacing_mm[column]
    down = scene.reference.shape[row] * scene.spacing_mm[row]
    axes.set(xticks=[], yticks=[], facecolor="#202020", xlim=(0, across), ylim=(0, down), aspect="equal")
    if scene.hu is not None:
        axes.imshow(
            shown(scene.hu, plane, centre),
            cmap="gray",
            vmin=WINDOW_HU[0],
            vmax=WINDOW_HU[1],
            extent=(0, across, 0, down),
            interpolation="bilinear",
        )
    for region, colour in ((scene.reference, REFERENCE), (scene.predicted, PREDICTION)):
        cut = shown(region, plane, centre)
        for number in np.unique(cut[cut > 0]):
            image.outline(axes, cut == number, across, down, colors=colour, linewidths=1.2)
    axes.text(0.02, 0.97, plane.edges[0], color="white", transform=axes.transAxes, va="top", fontsize=9)
