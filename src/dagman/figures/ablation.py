"""A family of runs side by side: probes beside the paper's figures, head diversity by stage, how training ended."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ENDS = {
    "image_error_ratio": "image error / visible mean",
    "attention_entropy": "guiding attention, entropy / ln N",
    "pooled_spread": "spread of pooled features",
}
"""How training ended, one panel each."""


def png(rows: Sequence[Mapping[str, Any]], papers: Mapping[str, Mapping[str, float]], *, title: str) -> bytes:
    """Draw a comparison.

    Args:
        rows: One for each run: `variant`, `seed`, `heads`, metrics, and probes where there are labels.
        papers: Variant to what the paper reports of it, in the order of drawing.
        title: Over the whole picture.

    Returns:
        A PNG file.
    """
    names = [name for name in papers if any(row["variant"] == name for row in rows)]
    places = list(dict.fromkeys(place for row in rows for place in row["heads"]))
    width = max(17.0, 2.2 * len(places))
    figure = Figure(figsize=(width, 11), dpi=80)
    figure.suptitle(_wrapped(title, 150), fontsize=11)
    grid = figure.add_gridspec(2, 1, left=0.06, right=0.99, top=0.9, bottom=0.16, hspace=0.45)
    upper = grid[0].subgridspec(1, 2 + len(ENDS), wspace=0.32)
    _probes(figure.add_subplot(upper[0]), rows, names)
    _reported(figure.add_subplot(upper[1]), papers, names)
    for number, (column, label) in enumerate(ENDS.items(), 2):
        _dots(figure.add_subplot(upper[number]), rows, names, column, label)
    lower = grid[1].subgridspec(1, max(1, len(places)), wspace=0.3)
    for number, place in enumerate(places):
        _heads(figure.add_subplot(lower[number]), rows, names, place)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _name_axis(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), [_wrapped(name, 14) for name in names], rotation=60, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", alpha=0.3)


def _probes(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    axes.set_title("Linear probe, AUC (here)", fontsize=10)
    drawn = False
    for kind, colour, shift in (("probe_pretrained", "C0", -0.12), ("probe_untrained", "C7", 0.12)):
        for place, name in enumerate(names):
            found = [row[kind] for row in rows if row["variant"] == name and row.get(kind)]
            found = [auc for auc in found if auc["value"] is not None]
            for number, auc in enumerate(found):
                label = kind.removeprefix("probe_") if not number and not place else None
                x = place + shift + 0.06 * number
                axes.errorbar(
                    x, auc["value"], _errors(auc), color=colour, marker="o", markersize=4, capsize=2, label=label
                )
                drawn = True
    if drawn:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "no labels given", ha="center", va="center", transform=axes.transAxes, color="grey")
    _name_axis(axes, names)


def _errors(auc: Mapping[str, Any]) -> list[list[float]] | None:
    if auc["low"] is None:
        return None
    return [[auc["value"] - auc["low"]], [auc["high"] - auc["value"]]]


def _reported(axes: Axes, papers: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    axes.set_title("What the paper reports (its data and size)", fontsize=10)
    kinds = list(dict.fromkeys(kind for paper in papers.values() for kind in paper))
    for number, kind in enumerate(kinds):
        there = [(place, papers[name][kind]) for place, name in enumerate(names) if kind in papers[name]]
        axes.plot(*zip(*there, strict=True), "s", color=f"C{number + 1}", label=kind)
    if kinds:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "no numbers given", ha="center", va="center", transform=axes.transAxes, color="grey")
    _name_axis(axes, names)


def _dots(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str], column: str, label: str) -> None:
    axes.set_title(label, fontsize=10)
    for place, name in enumerate(names):
        values = [row[column] for row in rows if row["variant"] == name and row.get(column) is not None]
        axes.plot([place] * len(values), values, "o", color="C0", markersize=5)
    _name_axis(axes, names)


def _heads(axes: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str], place: str) -> None:
    """Box plot of the heads' distances, all seeds together, with the entropy across heads, in nats, above."""
    axes.set_title(f"{place}: distance of heads, mm", fontsize=10)
    axes.margins(y=0.15)
    for at, name in enumerate(names):
        found = [row["heads"][place] for row in rows if row["variant"] == name and place in row["heads"]]
        if not found:
            continue
        axes.boxplot(
            np.concatenate([one["distance_mm"] for one in found]), positions=[at], widths=0.6, manage_ticks=False
        )
        entropy = np.mean([one["distance_entropy"] for one in found])
        axes.annotate(
            f"{entropy:.3f}", (at, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=7
        )
    _name_axis(axes, names)


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], joined] if len(joined) <= width or not lines[-1] else [*lines, word]
    return "\n".join(lines)
