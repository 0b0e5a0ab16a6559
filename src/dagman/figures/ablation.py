"""A family of runs side by side: a dot a seed, seeds joined, beside the paper's numbers and the diversity of heads."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dagman.figures.palette import COLOURS, MARKERS

Points = Mapping[str, Mapping[int, float]]
"""Variant to seed to value."""
_LEFT, _RIGHT = 0.045, 0.865
"""Shares of the width that panels take; legends stand right of them."""
_SPREAD = 0.6
"""Of the marks of all variants about a place, of a distance of 1 between places."""
_UNTRAINED, _PAPER = "#666666", "black"


class Panel(NamedTuple):
    """One measure of all variants."""

    title: str
    points: Points
    bars: Mapping[str, tuple[float, float]] = {}
    """Variant to the ends of an interval."""
    baselines: Mapping[str, float] = {}
    """Variant to the value of its encoder untrained; neighbours of the same value share one line."""
    zero: bool = False
    """Whether 0 is marked."""


def draw(
    names: Sequence[str],
    panels: Sequence[Panel],
    papers: Mapping[str, Mapping[str, float]],
    heads: Mapping[str, Mapping[str, Points]],
    *,
    title: str,
    notes: Sequence[str],
) -> Figure:
    """Draw a comparison.

    Args:
        names: Variants in the order they are drawn.
        panels: Measures of the runs, in the upper row.
        papers: Measure to variant to what the paper reports; those with the same words before the comma share a panel.
        heads: Title of a panel of the lower row to place to what was measured of the attention heads there.
        title: Over the whole picture.
        notes: Below it, one paragraph each.
    """
    units = list(dict.fromkeys(name.partition(",")[0] for name in papers))
    columns = len(panels) + len(units)
    width = max(19.0, max(2.9, 0.32 * len(names)) * columns)
    lines = [line for note in notes for line in _wrapped(note, int(11 * width)).split("\n")]
    below = 0.2 * len(lines) + 0.2
    height = below + 11.3
    figure = Figure(figsize=(width, height), dpi=80)
    figure.text(_LEFT, 1 - 0.15 / height, _wrapped(title, 140), fontsize=14, va="top")
    figure.text(_LEFT, 0.12 / height, "\n".join(lines), fontsize=10, va="bottom", linespacing=1.3)
    tops = [1 - 1.1 / height, (below + 4.6) / height]
    bottoms = [(below + 7.0) / height, (below + 0.9) / height]
    upper = figure.add_gridspec(1, columns, top=tops[0], bottom=bottoms[0], left=_LEFT, right=_RIGHT, wspace=0.38)
    seeds = sorted({seed for panel in panels for values in panel.points.values() for seed in values})
    for number, panel in enumerate(panels):
        _measured(figure.add_subplot(upper[number]), panel, names, seeds)
    for number, unit in enumerate(units, len(panels)):
        _reported(figure.add_subplot(upper[number]), unit, papers, names)
    _legend(figure, _handles(panels, seeds, list(papers)), tops[0])
    lower = figure.add_gridspec(
        1, max(1, len(heads)), top=tops[1], bottom=bottoms[1], left=_LEFT, right=_RIGHT, wspace=0.12
    )
    for number, (label, places) in enumerate(heads.items()):
        _heads(figure.add_subplot(lower[number]), label, places, names)
    _legend(figure, [_mark(name, _colour(number), _shape(number)) for number, name in enumerate(names)], tops[1])
    return figure


def _measured(axes: Axes, panel: Panel, names: Sequence[str], seeds: Sequence[int]) -> None:
    axes.set_title(_wrapped(panel.title, 26), fontsize=11)
    for number, seed in enumerate(seeds):
        there = [
            (place, panel.points[name][seed]) for place, name in enumerate(names) if seed in panel.points.get(name, {})
        ]
        if there:
            axes.plot(
                *zip(*there, strict=True), color=_colour(number), marker="o", markersize=5, linewidth=0.8, alpha=0.8
            )
    for place, name in enumerate(names):
        if values := list(panel.points.get(name, {}).values()):
            axes.plot([place - 0.25, place + 0.25], [np.mean(values)] * 2, color="black", linewidth=2, zorder=3)
        if name in panel.bars:
            axes.plot([place + 0.12] * 2, panel.bars[name], color="black", linewidth=1, marker="_", markersize=6)
    for first, last, value in _runs_of(panel.baselines, names):
        axes.plot([first - 0.4, last + 0.4], [value] * 2, color=_UNTRAINED, linestyle="--", linewidth=1.5, zorder=1)
    if panel.zero:
        axes.axhline(0, color="0.6", linewidth=1, zorder=0)
    if not any(panel.points.values()):
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="grey")
        axes.set_yticks([])
    _name_axis(axes, names)


def _runs_of(values: Mapping[str, float], names: Sequence[str]) -> list[tuple[int, int, float]]:
    """First and last place of neighbours with the same value, and the value."""
    found: list[tuple[int, int, float]] = []
    for place, name in enumerate(names):
        if name in values:
            if found and found[-1][1:] == (place - 1, values[name]):
                found[-1] = (found[-1][0], place, values[name])
            else:
                found.append((place, place, values[name]))
    return found


def _reported(axes: Axes, unit: str, papers: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    axes.set_title(f"the paper: {unit}", fontsize=11)
    for number, (measure, values) in enumerate(papers.items()):
        if measure.partition(",")[0] == unit:
            there = [(place, values[name]) for place, name in enumerate(names) if name in values]
            axes.plot(
                *zip(*there, strict=True), linestyle="none", color=_PAPER, marker=_paper_marker(number), alpha=0.8
            )
    axes.set_facecolor("0.95")
    _name_axis(axes, names)


def _heads(axes: Axes, title: str, places: Mapping[str, Points], names: Sequence[str]) -> None:
    """Each variant's mean at each place, with a small dot for each seed."""
    axes.set_title(title, fontsize=11)
    for place, points in enumerate(places.values()):
        for number, name in enumerate(names):
            values = list(points.get(name, {}).values())
            x = place + _SPREAD * ((number + 0.5) / len(names) - 0.5)
            axes.plot([x] * len(values), values, ".", color=_colour(number), markersize=4, alpha=0.7)
            if values:
                axes.plot(x, np.mean(values), color=_colour(number), marker=_shape(number), markersize=8, alpha=0.8)
    for edge in range(len(places) - 1):
        axes.axvline(edge + 0.5, color="0.85", linewidth=1)
    axes.set_xticks(range(len(places)), [name.replace(" ", "\n") for name in places], fontsize=10)
    axes.set_xlim(-0.6, len(places) - 0.4)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", alpha=0.3)


def _handles(panels: Sequence[Panel], seeds: Sequence[int], papers: Sequence[str]) -> list[Line2D]:
    found = [_mark(f"seed {seed}", _colour(number), "o", line="-") for number, seed in enumerate(seeds)]
    found.append(Line2D([], [], color="black", linewidth=2, label="mean over seeds"))
    if any(panel.bars for panel in panels):
        found.append(Line2D([], [], color="black", linewidth=1, marker="_", label="95 % interval\nover patients"))
    if any(panel.baselines for panel in panels):
        found.append(Line2D([], [], color=_UNTRAINED, linestyle="--", label="the same encoder\nuntrained"))
    return found + [
        _mark(_wrapped(f"paper: {name}", 26), _PAPER, _paper_marker(number)) for number, name in enumerate(papers)
    ]


def _mark(label: str, colour: str, marker: str, *, line: str = "none") -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle=line, label=_wrapped(label, 26))


def _legend(figure: Figure, handles: Sequence[Line2D], top: float) -> None:
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(_RIGHT + 0.005, top), fontsize=10, frameon=False)


def _shape(number: int) -> str:
    """Another than that of the variant of the same colour."""
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _paper_marker(number: int) -> str:
    return MARKERS[1 + number % (len(MARKERS) - 1)]


def _name_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), [_wrapped(name, 16) for name in names], rotation=55, ha="right", fontsize=9)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(axis="y", alpha=0.3)


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width or not lines[-1] else [*lines, word]
    return "\n".join(lines)
