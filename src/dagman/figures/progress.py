"""A run at a glance: one picture of `metrics.jsonl`, to be looked at while it trains."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dagman.figures import image

POINTS = 2000
"""Most points of a curve; longer runs are thinned."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: curves that share an axis, with the lines to judge them by."""

    title: str
    curves: Mapping[str, str]
    """Column of the metrics to its label."""
    lines: Mapping[str, float] = field(default_factory=dict)
    """Label to the height of a dotted line."""
    logarithmic: bool = False
    decades: int = 5
    """Tens from the top of a logarithmic axis to its bottom, at most."""
    span: tuple[float, float] | None = None
    """Heights that are always shown, so that two runs can be laid side by side."""
    absent: str = "not part of this run"
    """What stands in place of curves."""
    band: tuple[str, str] | None = None
    """Columns of the ends of the first curve's 95 % interval."""
    start: str = ""
    """Column whose first value is drawn as a line: where the run set out."""


_HEADS = {"ampd": "cells (ampd)", "aitd": "[CLS] (aitd)", "gitd": "pooled (gitd)"}
_EVEN = {"uniform = 1": 1.0}
PANELS = (
    Panel(title="Image term", curves={"amip": "AMIP", "validation_amip": "AMIP, validation cases"}),
    Panel(
        title="Image error / error of the visible mean",
        curves={"image_error_ratio": "ratio"},
        lines={"visible mean = 1": 1.0},
        span=(0.4, 1.5),
    ),
    Panel(
        title="Distillation losses / ln K",
        curves={f"{term}_loss_ratio": name for term, name in _HEADS.items()},
        lines={"nothing learned = 1": 1.0},
        span=(0.4, 1.2),
    ),
    Panel(
        title="Entropy / ln K: teacher (full), student (dashed)",
        curves={f"{term}_teacher_entropy": name for term, name in _HEADS.items()}
        | {f"{term}_student_entropy": "" for term in _HEADS},
        lines=_EVEN,
        span=(0.0, 1.05),
    ),
    Panel(
        title="What the teacher's targets tell, nats",
        curves={f"{term}_image_nats": f"{name}: image" for term, name in _HEADS.items()}
        | {"ampd_position_nats": "cells: place alone", "aitd_within_nats": "[CLS]: within a volume"},
        span=(0.0, 5.5),
    ),
    Panel(
        title="Spread of the features",
        curves={"tokens_spread": "cells", "cls_spread": "[CLS]", "pooled_spread": "pooled"},
        lines={"random directions = 1": 1.0},
        span=(0.0, 1.05),
    ),
    Panel(
        title="Effective rank of the teacher's features by level",
        curves={f"level{level}_effective_rank": f"level {level}" for level in range(5)},
        logarithmic=True,
    ),
    Panel(
        title="Attention: entropy / ln N",
        curves={"attention_entropy": "guides hiding", "clean_attention_entropy": "teacher without noise"},
        lines=_EVEN,
        span=(0.9, 1.0),
    ),
    Panel(
        title="Attention: largest / mean",
        curves={"attention_peak": "guides hiding", "clean_attention_peak": "teacher without noise"},
        lines=_EVEN,
    ),
    Panel(
        title="Spread of the teacher's features by level",
        curves={f"level{level}_spread": f"level {level}" for level in range(5)},
        lines={"random directions = 1": 1.0},
        span=(0.0, 1.05),
    ),
    Panel(
        title="Hidden: share of cells, of attention; dropped / chance",
        curves={
            "hidden_ratio": "share of cells",
            "attention_hidden_ratio": "share of attention",
            "hidden_dropped_excess": "dropped / chance",
        },
        lines={"unrelated = 1": 1.0},
        span=(0.0, 1.2),
    ),
    Panel(
        title="Head center / mean teacher logits",
        curves={f"{term}_center_size": name for term, name in _HEADS.items()},
        lines={"alarm = 10": 10.0},
        logarithmic=True,
    ),
    Panel(title="Teacher's distance from the student / its length", curves={"teacher_distance": "distance"}),
    Panel(
        title="Linear probe on labelled cases, AUC",
        curves={"probe_auc": "AUC"},
        band=("probe_low", "probe_high"),
        lines={"chance = .5": 0.5},
        start="probe_auc",
        absent="none: pretrain with --labelled STORE",
    ),
    Panel(title="Gradient norm before clipping", curves={"grad_norm": "norm"}, logarithmic=True),
    Panel(
        title="Schedules",
        curves={"learning_rate": "learning rate", "momentum": "teacher momentum", "weight_decay": "weight decay"},
        logarithmic=True,
        decades=9,
    ),
)
"""The sixteen plots."""


def png(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw a run's metrics.

    Args:
        rows: From `Run.metrics`; a value of None, or a column that is absent, leaves a gap.
        title: Over the whole picture.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(19, 14.5), dpi=80)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.04, top=0.93, wspace=0.2, hspace=0.36)
    figure.suptitle(title, fontsize=13)
    step = np.array([row["step"] for row in rows], dtype=float)
    for axes, panel in zip(figure.subplots(4, 4).flat, PANELS, strict=True):
        _draw(axes, panel, step, rows)
    return image.png(figure)


def _draw(axes: Axes, panel: Panel, step: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    colours: dict[str, str] = {}
    for column, label in panel.curves.items():
        values = np.array([np.nan if row.get(column) is None else row[column] for row in rows], dtype=float)
        there = np.isfinite(values)
        if not there.any():
            continue
        seldom = there.sum() < 0.5 * len(there)
        kind = column.removesuffix("_teacher_entropy").removesuffix("_student_entropy")
        colour = colours.setdefault(kind, f"C{len(colours)}")
        style = "--" if column.endswith("_student_entropy") else "-"
        if seldom:
            axes.plot(step[there], values[there], style, color=colour, marker="o", markersize=3, label=label or None)
        else:
            _curve(axes, step[there], values[there], colour, style=style, label=label)
    if not axes.lines:
        axes.text(0.5, 0.5, panel.absent, ha="center", va="center", transform=axes.transAxes, color="grey")
        return
    _judge(axes, panel, step, rows)
    if panel.logarithmic:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, high / 10**panel.decades), high)
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if panel.span:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, panel.span[0]), max(high, panel.span[1]))
    _name(axes, logarithmic=panel.logarithmic)


def _name(axes: Axes, *, logarithmic: bool) -> None:
    """A legend in a space of its own above the curves; plain figures on an axis of less than two decades."""
    lines = math.ceil(len(axes.get_legend_handles_labels()[1]) / 2)
    room = (0.04 + 0.085 * lines) if lines else 0.0
    low, high = axes.get_ylim()
    if logarithmic:
        if high < 100 * low:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(_plainly))
            axes.yaxis.set_minor_formatter(NullFormatter())
        high *= (high / low) ** (room / (1 - room))
    else:
        high += (high - low) * room / (1 - room)
    axes.set_ylim(low, high)
    if lines:
        axes.legend(fontsize=8, loc="upper center", ncols=2, framealpha=0.6)


def _plainly(value: float, _: int | None) -> str:
    return f"{value:g}"


def _judge(axes: Axes, panel: Panel, step: np.ndarray, rows: Sequence[Mapping[str, Any]]) -> None:
    """What the curves are to be judged by: an interval, the start, fixed heights."""
    if panel.band:
        ends = [[row.get(end) for row in rows] for end in panel.band]
        low, high = np.array(ends, dtype=float)
        there = np.isfinite(low) & np.isfinite(high)
        axes.fill_between(step[there], low[there], high[there], color="C0", alpha=0.2, linewidth=0, label="95 %")
    set_out = next((row[panel.start] for row in rows if row.get(panel.start) is not None), None)
    if set_out is not None:
        axes.axhline(set_out, color="grey", linestyle="--", linewidth=1, label="where it set out: untrained")
    for label, height in panel.lines.items():
        axes.axhline(height, color="black", linestyle=":", linewidth=1, label=label)


def _curve(axes: Axes, step: np.ndarray, values: np.ndarray, colour: str, *, style: str, label: str) -> None:
    """The values, faint, under their running mean; few points are drawn as they are."""
    thin = slice(None, None, math.ceil(len(step) / POINTS))
    width = len(step) // 25
    if width < 3:
        marker = "o" if len(step) < 30 else ""
        axes.plot(step, values, style, color=colour, marker=marker, markersize=3, linewidth=1.3, label=label or None)
        return
    axes.plot(step[thin], values[thin], style, color=colour, alpha=0.25, linewidth=0.8)
    total = np.cumsum(np.concatenate([[0.0], values]))
    mean = (total[width:] - total[:-width]) / width
    centre = step[width // 2 : width // 2 + len(mean)]
    axes.plot(centre[thin], mean[thin], style, color=colour, linewidth=1.6, label=label or None)
