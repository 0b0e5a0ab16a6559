"""Attention heads of several runs as box plots by stage: how far, how evenly far and how widely they look."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dagman.figures import image
from dagman.figures.palette import COLOURS

_GROUP = 0.8
"""Width of the boxes of one stage, of a distance of 1 between stages."""


class Boxes(NamedTuple):
    """What the boxes of one stage of one run hold."""

    distance_mm: Float[np.ndarray, " heads"]
    """Attention-weighted mean distance, mean over crops."""
    row_entropy: Float[np.ndarray, " heads"]
    """Over its largest value, mean over crops."""
    distance_entropy: Float[np.ndarray, " crops"]
    """Of the distances across heads, over its largest value."""


PANELS = {
    "distance_mm": ("how far a head looks\n(one point a head)", "attention-weighted distance, mm"),
    "distance_entropy": ("how evenly far heads look\n(one point a crop)", "entropy of distances / ln(heads)"),
    "row_entropy": ("how widely a head spreads\n(one point a head)", "entropy of rows / largest possible"),
}


def png(runs: Mapping[str, Mapping[str, Boxes]]) -> bytes:
    """Draw the three readings of all runs.

    Args:
        runs: Name of the run to its places, in order, to what was measured there.

    Returns:
        A PNG file.

    Reference:
        Figure 4a.
    """
    places = list(dict.fromkeys(place for run in runs.values() for place in run))
    figure = Figure(figsize=(max(13.0, 1.1 * len(places) * len(PANELS)), 4.8), dpi=100)
    figure.subplots_adjust(left=0.06, right=0.99, top=0.87, bottom=0.23, wspace=0.24)
    for axes, (reading, (title, label)) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        axes.set_title(title, fontsize=12)
        axes.set_ylabel(label, fontsize=11)
        for number, run in enumerate(runs.values()):
            _boxes(axes, [getattr(run[place], reading) if place in run else [] for place in places], number, len(runs))
        axes.set_xticks(range(len(places)), [place.replace(" ", "\n") for place in places], fontsize=10)
        axes.set_xlim(-0.6, len(places) - 0.4)
        axes.grid(axis="y", alpha=0.3)
        for edge in range(len(places) - 1):
            axes.axvline(edge + 0.5, color="0.85", linewidth=1)
    handles = [
        Patch(facecolor=_colour(number), edgecolor="black", alpha=0.75, label=name) for number, name in enumerate(runs)
    ]
    figure.legend(handles=handles, loc="lower center", ncol=min(4, len(handles)), fontsize=11, frameon=False)
    return image.png(figure)


def _boxes(axes: Axes, values: list[np.ndarray], number: int, runs: int) -> None:
    width = _GROUP / runs
    middles = [place + (number - (runs - 1) / 2) * width for place in range(len(values))]
    drawn = axes.boxplot(
        values,
        positions=middles,
        widths=0.85 * width,
        manage_ticks=False,
        patch_artist=True,
        medianprops={"color": "black", "linewidth": 1.6},
        flierprops={"marker": ".", "markersize": 4, "markerfacecolor": "black"},
    )
    for box in drawn["boxes"]:
        box.set(facecolor=_colour(number), alpha=0.75)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
