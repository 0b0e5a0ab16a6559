"""Maps of labelled features side by side: a colour and a shape for each class, the same in every map.

Where there are more classes than colours, marks of the others are open. Classes of many crops lie below those of few.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dagman.figures import image
from dagman.figures.palette import COLOURS, MARKERS

_SIDE = 4.6
"""Inches of a map."""
_LINE = 0.23
"""Inches of a line of the legend."""
_MOST_COLUMNS = 4


class Panel(NamedTuple):
    """One map."""

    title: str
    map: Float[np.ndarray, "crops 2"]
    labels: Sequence[str]
    note: str
    """Under the title."""


def png(panels: Sequence[Panel]) -> bytes:
    """Draw maps of the same crops.

    Args:
        panels: In order; at most four stand in a row.

    Returns:
        A PNG file.

    Reference:
        Figure 10.
    """
    names = sorted(
        set(panels[0].labels), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name)
    )
    across = min(_MOST_COLUMNS, len(panels))
    down = -(-len(panels) // across)
    width = across * _SIDE + 0.2
    longest = max(len(name) for name in names)
    columns = max(1, min(len(names), int(width / (0.085 * longest + 0.55))))
    legend = (-(-len(names) // columns)) * _LINE + 0.25
    height = down * (_SIDE + 0.75) + legend
    figure = Figure(figsize=(width, height), dpi=100)
    figure.subplots_adjust(
        left=0.1 / width, right=1 - 0.1 / width, top=1 - 0.75 / height, bottom=(legend + 0.05) / height, wspace=0.04
    )
    figure.subplots_adjust(hspace=0.8 / _SIDE)
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for plot in axes[len(panels) :]:
        plot.set_axis_off()
    for plot, panel in zip(axes, panels, strict=False):
        _draw(plot, panel, names)
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor=face, markersize=7, label=name)
        for name, (colour, marker, face) in zip(names, map(_style, range(len(names))), strict=True)
    ]
    figure.legend(handles=handles, loc="lower center", ncol=columns, fontsize=10, frameon=False, columnspacing=1.0)
    return image.png(figure)


def _style(number: int) -> tuple[str, str, str]:
    """Colour, shape and the colour inside: neighbours in the list differ in the first two."""
    turn, colour = divmod(number, len(COLOURS))
    return COLOURS[colour], MARKERS[(colour + turn) % len(MARKERS)], "none" if turn % 2 else COLOURS[colour]


def _draw(axes: Axes, panel: Panel, names: Sequence[str]) -> None:
    axes.set_title(f"{panel.title}\n", fontsize=13, fontweight="bold", linespacing=1.9)
    axes.text(0.5, 1.01, panel.note, transform=axes.transAxes, ha="center", va="bottom", fontsize=10)
    axes.set(xticks=[], yticks=[])
    if not np.isfinite(panel.map).all():
        axes.text(0.5, 0.5, "nothing to show", transform=axes.transAxes, ha="center", color="grey")
        return
    labels = np.array(panel.labels)
    for number in sorted(range(len(names)), key=lambda number: -int((labels == names[number]).sum())):
        colour, marker, face = _style(number)
        here = panel.map[labels == names[number]]
        edge, width = ("white", 0.3) if face == colour else (colour, 1.0)
        axes.scatter(here[:, 0], here[:, 1], facecolors=face, marker=marker, s=24, edgecolors=edge, linewidths=width)
    axes.margins(0.06)
