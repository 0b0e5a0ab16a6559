"""Planes of a CT and the semantic attention of encoders over them, in radiological convention and true proportions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped

from dagman import files
from dagman.figures import image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap

Triple = tuple[int, int, int]
COLOUR_RANGE = 4.0
"""Colours run from 1/4 to 4 times uniform, on a logarithmic scale, the same in every picture."""
_WIDTH_INCHES, _TALLEST_INCHES, _ROW_INCHES, _GAP_INCHES = 13.0, 8.5, 2.6, 0.12
_TOP_INCHES, _BOTTOM_INCHES, _LEFT_INCHES, _BAR_INCHES = 0.5, 0.45, 0.4, 1.35
_NARROWEST_INCHES = 7.0
_DOTS_PER_INCH = 110
_FLAT_INCHES = 1.0


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
    attention: Mapping[str, Float[np.ndarray, "x y z"]]
    """Of each encoder, times uniform; 0 where nothing was measured."""
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
    """Write the picture: the CT in three planes, below it each encoder's attention; all planes are on one scale in mm.

    Reference:
        Figure 5.
    """
    sides = [scene.sides_mm(plane) for plane in PLANES]
    tall = max(height for _, height in sides)
    sheet = _Sheet([width for width, _ in sides], tall, 1 + len(scene.attention), scene.title, _caption(scene))
    for row, (name, values) in enumerate([("CT", None), *scene.attention.items()]):
        sheet.name_row(row, name)
        for column, plane in enumerate(PLANES):
            axes = sheet.axes(row, column, sides[column][1])
            _draw(axes, plane, scene, None if values is None else shown(values, plane, scene.centre))
            _mark(axes, plane, scene)
    sheet.write(path)


def write_heads_png(scene: Scene, heads: Mapping[str, np.ndarray], path: Path) -> None:
    """Write the axial plane of every head, a row for each encoder.

    Args:
        scene: Of the same scan.
        heads: Of each encoder, its heads' attention in the scene's axial plane (heads, x, y, 1), times uniform.
        path: The file.
    """
    plane, most = PLANES[0], max(map(len, heads.values()))
    across, down = scene.sides_mm(plane)
    note = "axial plane; the mean over a row's heads is the attention of its map"
    sheet = _Sheet([across] * most, down, len(heads), f"{scene.title}: attention of each head", note)
    for row, (name, maps) in enumerate(heads.items()):
        sheet.name_row(row, name)
        for column, values in enumerate(maps):
            axes = sheet.axes(row, column, down)
            _draw(axes, plane, scene, shown(values, plane, (0, 0, 0)))
            axes.set(xticks=[], yticks=[])
            _write(axes, 0.03, 0.97, f"head {column + 1}", ha="left", va="top", fontsize=9)
    sheet.write(path)


class _Sheet:
    """A black page with a row for each encoder, columns of given widths on one scale in mm, and the colour bar."""

    def __init__(self, widths_mm: Sequence[float], tall_mm: float, rows: int, title: str, note: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        margin = _LEFT_INCHES + _BAR_INCHES + len(widths_mm) * _GAP_INCHES
        tallest = max(_TALLEST_INCHES, _ROW_INCHES * rows) / rows
        self.scale = min((_WIDTH_INCHES - margin) / sum(widths_mm), tallest / tall_mm)
        """Inches a mm."""
        self.widths = [width * self.scale for width in widths_mm]
        self.tall, self.rows = tall_mm * self.scale, rows
        self.width = max(sum(self.widths) + margin, _NARROWEST_INCHES)
        self.height = rows * (self.tall + _GAP_INCHES) + _TOP_INCHES + _BOTTOM_INCHES
        self.figure = Figure(figsize=(self.width, self.height), dpi=_DOTS_PER_INCH, facecolor="black")
        FigureCanvasAgg(self.figure)
        middle, bar = self.height / 2, min(self.tall * 0.75, 3.0)
        left = _LEFT_INCHES + sum(self.widths) + len(self.widths) * _GAP_INCHES
        _draw_bar(self._place(left + 0.15, middle - bar / 2, 0.18, bar))
        self.figure.text(0.01, 1 - 0.12 / self.height, title, color="white", fontsize=13, va="top")
        self.figure.text(0.01, 0.12 / self.height, note, color="0.75", fontsize=8.5, va="bottom")

    def axes(self, row: int, column: int, high_mm: float) -> "Axes":
        """An empty picture, in the middle of its row."""
        left = _LEFT_INCHES + sum(self.widths[:column]) + column * _GAP_INCHES
        high = high_mm * self.scale
        return self._place(left, self._bottom(row) + (self.tall - high) / 2, self.widths[column], high)

    def name_row(self, row: int, name: str) -> None:
        """The encoder's name, upright at the left edge."""
        up = (self._bottom(row) + self.tall / 2) / self.height
        right = 0.5 * _LEFT_INCHES / self.width
        points = min(11.0, 72 * self.tall / (0.62 * len(name)))
        self.figure.text(right, up, name, color="white", fontsize=points, rotation=90, ha="center", va="center")

    def write(self, path: Path) -> None:
        """Put the page on disk."""
        files.write_bytes(path, image.png(self.figure, facecolor="black", metadata={"Software": None}))

    def _bottom(self, row: int) -> float:
        return _BOTTOM_INCHES + (self.rows - 1 - row) * (self.tall + _GAP_INCHES)

    def _place(self, left: float, bottom: float, width: float, height: float) -> "Axes":
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)


def shown(volume: Shaped[np.ndarray, "x y z"], plane: Plane, centre: Triple) -> Shaped[np.ndarray, "rows columns"]:
    """One plane of a RAS+ volume as it appears on the screen: top left is the first row and column.

    The patient's right (or front) is at the left, the front (or head) at the top.
    """
    fixed = ({0, 1, 2} - set(plane.axes)).pop()
    cut: np.ndarray = volume.take(centre[fixed], fixed).T[::-1, ::-1]
    return cut


def _draw(axes: "Axes", plane: Plane, scene: Scene, cut: np.ndarray | None) -> None:
    across, down = scene.sides_mm(plane)
    box = (0.0, across, 0.0, down)
    low, high = scene.window_hu
    grey = shown(scene.hu, plane, scene.centre)
    axes.imshow(grey, cmap="gray", vmin=low, vmax=high, interpolation="bilinear", extent=box, aspect="auto")
    if cut is not None:
        limit = np.log2(COLOUR_RANGE)
        octaves = np.where(cut > 0, np.log2(np.maximum(cut, 1e-6)), 0)
        style = {"cmap": colours(), "vmin": -limit, "vmax": limit, "interpolation": "bilinear"}
        axes.imshow(octaves, extent=box, aspect="auto", **style)
    if scene.mask is not None and (region := shown(scene.mask, plane, scene.centre)).any():
        image.outline(axes, region, across, down, colors="lime", linewidths=1.0)


def _mark(axes: "Axes", plane: Plane, scene: Scene) -> None:
    """Edge letters, the other planes as thin lines, and a scale bar where there is room: all planes share a scale."""
    across, down = scene.sides_mm(plane)
    flat = is_flat(axes)
    x, y = ((scene.centre[axis] + 0.5) * scene.spacing_mm[axis] for axis in plane.axes)
    axes.axvline(across - x, color="white", linewidth=0.5, alpha=0.35)
    axes.axhline(y, color="white", linewidth=0.5, alpha=0.35)
    mark(axes, plane, across, down, flat=flat, bar=not flat)


def is_flat(axes: "Axes") -> bool:
    """Whether a picture is so low that letters would fill it."""
    figure = axes.get_figure(root=True)
    return figure is not None and bool(axes.bbox.height < _FLAT_INCHES * figure.dpi)


def mark(axes: "Axes", plane: Plane, across: float, down: float, *, flat: bool = False, bar: bool = True) -> None:
    """Letters at the edges of a plane, its name and a scale bar.

    Args:
        axes: Where.
        plane: What is shown.
        across: Width in mm; 0 is on the left.
        down: Height in mm; 0 is at the bottom.
        flat: Write beside the picture what would fill one so low.
        bar: Draw a scale bar.
    """
    top, bottom = ("bottom", "top") if flat else ("top", "bottom")  # beside a flat picture, inside another
    places = ((0.015, 0.5, "left"), (0.985, 0.5, "right"), (0.5, 0.985, "center"), (0.5, 0.015, "center"))
    anchors = ("center", "center", top, bottom)
    for letter, (right, up, horizontal), vertical in zip(plane.edges, places, anchors, strict=True):
        _write(axes, right, up, letter, ha=horizontal, va=vertical, fontsize=11)
    _write(axes, 0.015, 0.985, plane.name, ha="left", va=top, fontsize=9)
    if bar:
        length = next((length for length in (100, 50, 20, 10) if length < 0.45 * across), 5)
        axes.plot([0.04 * across, 0.04 * across + length], [0.04 * down] * 2, color="white", linewidth=2.5)
        _write(axes, 0.04 + length / across / 2, 0.055, f"{length} mm", ha="center", va="bottom", fontsize=8)
    axes.set(xlim=(0, across), ylim=(0, down), xticks=[], yticks=[])


def _write(axes: "Axes", right: float, up: float, text: str, **style: Any) -> None:
    from matplotlib import patheffects

    edge = [patheffects.withStroke(linewidth=2, foreground="black")]  # bone and table are as white as the text
    axes.text(right, up, text, color="white", transform=axes.transAxes, path_effects=edge, **style)


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
    seen = [values[values > 0] for values in scene.attention.values()]
    lowest, highest = (min(map(np.min, seen)), max(map(np.max, seen))) if all(map(len, seen)) else (0.0, 0.0)
    low, high = scene.window_hu
    outlined = "; the mask is outlined" if scene.mask is not None else ""
    return (
        f"attention of [CLS] from {lowest:.2f} to {highest:.2f} times uniform; "
        f"CT window {low:g} to {high:g} HU; thin lines show the other planes{outlined}"
    )
