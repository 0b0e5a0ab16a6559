"""Three planes of a CT with semantic attention over them, in radiological convention and true proportions."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped

from dagman import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap

Triple = tuple[int, int, int]
COLOUR_RANGE = 4.0
"""Colours run from 1/4 to 4 times uniform, on a logarithmic scale, the same in every picture."""
_WIDTH_INCHES, _TALLEST_INCHES, _GAP_INCHES = 13.0, 8.0, 0.12
_TOP_INCHES, _BOTTOM_INCHES, _BAR_INCHES = 0.5, 0.45, 1.35
_NARROWEST_INCHES = 7.0
_DOTS_PER_INCH = 110


class Plane(NamedTuple):
    """One cut as it is shown: rows from top to bottom, columns from left to right."""

    name: str
    axes: tuple[int, int]
    """Volume axes (column, row) of the picture."""
    edges: str
    """Letters at left, right, top, bottom."""


PLANES = (
    Plane("axial", (0, 1), "RLAP"),
    Plane("coronal", (0, 2), "RLSI"),
    Plane("sagittal", (1, 2), "APSI"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """What is shown: arrays on one RAS+ grid."""

    title: str
    hu: Num[np.ndarray, "x y z"]
    attention: Float[np.ndarray, "x y z"]
    """Times uniform; 0 where nothing was measured."""
    mask: Bool[np.ndarray, "x y z"] | None = None
    """Outlined."""
    spacing_mm: tuple[float, float, float]
    centre: Triple
    """Voxel that all three planes go through."""
    window_hu: tuple[float, float]
    """Black and white of the CT."""

    def sides_mm(self, plane: Plane) -> tuple[float, float]:
        """Width and height of a plane."""
        column, row = plane.axes
        return self.hu.shape[column] * self.spacing_mm[column], self.hu.shape[row] * self.spacing_mm[row]


def write_png(scene: Scene, path: Path) -> None:
    """Write the picture; all planes are on one scale in mm.

    Reference:
        Figure 5.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sides = [scene.sides_mm(plane) for plane in PLANES]
    wide, tall = sum(width for width, _ in sides), max(height for _, height in sides)
    margin = _BAR_INCHES + (len(PLANES) + 1) * _GAP_INCHES
    inches_per_mm = min((_WIDTH_INCHES - margin) / wide, _TALLEST_INCHES / tall)
    width = max(wide * inches_per_mm + margin, _NARROWEST_INCHES)
    height = tall * inches_per_mm + _TOP_INCHES + _BOTTOM_INCHES
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, facecolor="black")
    FigureCanvasAgg(figure)
    left = _GAP_INCHES
    for plane, (across, down) in zip(PLANES, sides, strict=True):
        bottom = _BOTTOM_INCHES + (tall - down) / 2 * inches_per_mm
        place = (left / width, bottom / height, across * inches_per_mm / width, down * inches_per_mm / height)
        axes = figure.add_axes(place)
        _draw(axes, plane, scene)
        _mark(axes, plane, scene)
        left += across * inches_per_mm + _GAP_INCHES
    middle = _BOTTOM_INCHES + tall * inches_per_mm / 2
    bar = min(tall * inches_per_mm * 0.75, 3.0)
    _draw_bar(figure.add_axes(((left + 0.15) / width, (middle - bar / 2) / height, 0.18 / width, bar / height)))
    figure.text(0.01, 1 - 0.12 / height, scene.title, color="white", fontsize=13, va="top")
    figure.text(0.01, 0.12 / height, _caption(scene), color="0.75", fontsize=8.5, va="bottom")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", facecolor="black", metadata={"Software": None})
    files.write_bytes(path, picture.getvalue())


def shown(volume: Shaped[np.ndarray, "x y z"], plane: Plane, centre: Triple) -> Shaped[np.ndarray, "rows columns"]:
    """One plane of a RAS+ volume as it appears on the screen: top left is the first row and column.

    The patient's right (or front) is at the left, the front (or head) at the top.
    """
    fixed = ({0, 1, 2} - set(plane.axes)).pop()
    cut: np.ndarray = volume.take(centre[fixed], fixed).T[::-1, ::-1]
    return cut


def _draw(axes: "Axes", plane: Plane, scene: Scene) -> None:
    across, down = scene.sides_mm(plane)
    box = (0.0, across, 0.0, down)
    low, high = scene.window_hu
    grey = shown(scene.hu, plane, scene.centre)
    axes.imshow(grey, cmap="gray", vmin=low, vmax=high, interpolation="bilinear", extent=box, aspect="auto")
    cut = shown(scene.attention, plane, scene.centre)
    octaves = np.where(cut > 0, np.log2(np.maximum(cut, 1e-6)), 0)
    limit = np.log2(COLOUR_RANGE)
    axes.imshow(octaves, cmap=colours(), vmin=-limit, vmax=limit, interpolation="bilinear", extent=box, aspect="auto")
    if scene.mask is not None and (outline := shown(scene.mask, plane, scene.centre)).any():
        rows, columns = outline.shape
        x, y = (np.arange(columns) + 0.5) * across / columns, (rows - np.arange(rows) - 0.5) * down / rows
        axes.contour(x, y, outline.astype(float), levels=[0.5], colors="lime", linewidths=1.0)


def _mark(axes: "Axes", plane: Plane, scene: Scene) -> None:
    """Edge letters, the other planes as thin lines, and a scale bar."""
    across, down = scene.sides_mm(plane)
    x, y = ((scene.centre[axis] + 0.5) * scene.spacing_mm[axis] for axis in plane.axes)
    axes.axvline(across - x, color="white", linewidth=0.5, alpha=0.35)
    axes.axhline(y, color="white", linewidth=0.5, alpha=0.35)
    places = ((0.015, 0.5, "left"), (0.985, 0.5, "right"), (0.5, 0.985, "center"), (0.5, 0.015, "center"))
    anchors = ("center", "center", "top", "bottom")
    for letter, (right, up, horizontal), vertical in zip(plane.edges, places, anchors, strict=True):
        _write(axes, right, up, letter, ha=horizontal, va=vertical, fontsize=11)
    _write(axes, 0.015, 0.985, plane.name, ha="left", va="top", fontsize=9)
    bar = next((length for length in (100, 50, 20, 10) if length < 0.45 * across), 5)
    axes.plot([0.04 * across, 0.04 * across + bar], [0.04 * down] * 2, color="white", linewidth=2.5)
    _write(axes, 0.04 + bar / across / 2, 0.055, f"{bar} mm", ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, across), ylim=(0, down), xticks=[], yticks=[])


def _write(axes: "Axes", right: float, up: float, text: str, **style: Any) -> None:
    axes.text(right, up, text, color="white", transform=axes.transAxes, **style)


def colours() -> "ListedColormap":
    """Blue below uniform, red above, clear at uniform: the CT shows where attention says nothing.

    Blue is the fainter one: most of a focused map lies below uniform, and the anatomy there should stay readable.
    """
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    signed = np.linspace(-1, 1, 257)
    table = mpl.colormaps["coolwarm"](0.5 + 0.5 * np.sign(signed) * (0.35 + 0.65 * np.abs(signed)))
    table[:, 3] = np.where(signed > 0, 0.65, 0.35) * np.minimum(1, 1.6 * np.abs(signed))
    return ListedColormap(table)


def _draw_bar(axes: "Axes") -> None:
    limit = float(np.log2(COLOUR_RANGE))
    box = (0.0, 1.0, -limit, limit)
    axes.imshow(np.full((257, 1), 0.25), cmap="gray", vmin=0, vmax=1, extent=box, aspect="auto")
    axes.imshow(np.linspace(limit, -limit, 257)[:, None], cmap=colours(), extent=box, aspect="auto")
    ticks = {-2: "\u2264 1/4", -1: "1/2", 0: "1 = uniform", 1: "2", 2: "\u2265 4"}
    axes.set(xticks=[], yticks=list(ticks), ylim=(-limit, limit))
    axes.set_yticklabels(list(ticks.values()))
    axes.yaxis.tick_right()
    axes.tick_params(colors="white", labelsize=8, length=2)
    axes.set_title("attention,\ntimes uniform", color="white", fontsize=8, loc="left")


def _caption(scene: Scene) -> str:
    seen = scene.attention[scene.attention > 0]
    lowest, highest = (seen.min(), seen.max()) if seen.size else (0.0, 0.0)
    low, high = scene.window_hu
    return (
        f"semantic attention from {lowest:.2f} to {highest:.2f} times uniform; "
        f"CT window {low:g} to {high:g} HU; thin lines show the other planes"
    )
