"""A few segmented cases: the CT with the outlines of reference and prediction, three planes each.

The reference is solid, the prediction dashed; of several classes each has a colour.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Num, UInt8
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dagman.figures import image
from dagman.figures.attention import PLANES, Plane, is_flat, mark, shown
from dagman.figures.palette import ON_BLACK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE, PREDICTION = "#37d67a", "#ff5a5f"
"""Of a single class."""
_SOLID, _DASHED = "solid", (0.0, (3.0, 2.0))
_MOST_NAMES = 4
"""Of classes that share a colour."""
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


def png(scenes: Sequence[Scene], title: str, names: Sequence[str] = ()) -> bytes:
    """Draw a sheet: one row for each case, planes through the middle of the reference.

    Args:
        scenes: Cases.
        title: Over the whole picture.
        names: Of the classes, from number 1 on; one class needs none.

    Returns:
        A PNG file.
    """
    lines = _legend(scenes, names)
    longest = max(len(str(line.get_label())) for line in lines)
    columns = max(1, min(len(lines), int(11 / (0.08 * longest + 0.6))))
    top = 0.6 + 0.22 * -(-len(lines) // columns)
    height = 3.4 * len(scenes) + top
    figure = Figure(figsize=(11, height), dpi=90, facecolor="black")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - top / height, wspace=0.03, hspace=0.14)
    figure.text(0.01, 1 - 0.1 / height, title, color="white", fontsize=12, va="top")
    place = {"loc": "upper left", "bbox_to_anchor": (0.0, 1 - 0.32 / height), "borderaxespad": 0.2}
    figure.legend(handles=lines, ncols=columns, labelcolor="white", facecolor="black", frameon=False, **place)
    rows = figure.subplots(len(scenes), len(PLANES), squeeze=False)
    for axes, scene in zip(rows, scenes, strict=True):
        centre = _centre(scene)
        for plot, plane in zip(axes, PLANES, strict=True):
            _draw(plot, plane, scene, centre, several=len(names) > 1)
        axes[0].set_title(scene.title, color="white", fontsize=9, loc="left")
    return image.png(figure, facecolor="black", metadata={"Software": None})


def _legend(scenes: Sequence[Scene], names: Sequence[str]) -> list[Line2D]:
    """What is solid and what is dashed; of several classes the colours of those that are there."""
    styles = {"reference": (REFERENCE, _SOLID), "prediction": (PREDICTION, _DASHED)}
    if len(names) < 2:
        return [Line2D([], [], color=colour, linestyle=style, label=word) for word, (colour, style) in styles.items()]
    there = {
        int(number) for scene in scenes for map_ in (scene.reference, scene.predicted) for number in np.unique(map_)
    }
    alike: dict[str, list[str]] = {}
    for number in sorted(there - {0}):
        alike.setdefault(_colour(number), []).append(names[number - 1])
    return [
        *(Line2D([], [], color="white", linestyle=style, label=word) for word, (_, style) in styles.items()),
        *(
            Line2D([], [], color=colour, label=", ".join(words[:_MOST_NAMES]) + ", ..." * (len(words) > _MOST_NAMES))
            for colour, words in alike.items()
        ),
    ]


def _colour(number: int) -> str:
    """Of a class among several."""
    return ON_BLACK[(number - 1) % len(ON_BLACK)]


def _centre(scene: Scene) -> tuple[int, int, int]:
    """The voxel of the reference nearest to its middle, else of the prediction, else the middle of the field."""
    for region in (scene.reference, scene.predicted):
        voxels = np.argwhere(region)
        if len(voxels):
            nearest = voxels[np.linalg.norm(voxels - voxels.mean(axis=0), axis=1).argmin()]
            return int(nearest[0]), int(nearest[1]), int(nearest[2])
    x, y, z = (side // 2 for side in scene.reference.shape)
    return x, y, z


def _draw(axes: "Axes", plane: Plane, scene: Scene, centre: tuple[int, int, int], *, several: bool) -> None:
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
    for region, own, style in ((scene.reference, REFERENCE, _SOLID), (scene.predicted, PREDICTION, _DASHED)):
        cut = shown(region, plane, centre)
        for number in np.unique(cut[cut > 0]):
            colour = _colour(int(number)) if several else own
            image.outline(axes, cut == number, across, down, colors=colour, linewidths=1.3, linestyles=[style])
    axes.apply_aspect()  # planes of thin scans become low
    mark(axes, plane, across, down, flat=is_flat(axes))
