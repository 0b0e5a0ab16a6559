"""Probes less those of untrained encoders, against steps, beside baselines without one: does pretraining pay, when."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dagman.figures import image

BASELINES = {
    "voxels": ("C1", "raw voxels"),
    "histogram": ("C3", "histogram of intensities"),
    "shells": ("C5", "shells by hand"),
}
COLUMNS = 3
SPAN = (-0.25, 0.25)
"""Heights that all plots show, so that questions can be laid beside each other."""
SHADES = (0, 2, 4)
"""Colours of the cycle for the seeds."""
APART = 0.012
"""Of the length of the run, by which the seeds' points stand beside each other."""


def png(results: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> bytes:
    """Draw the probes with 32 labels of one or several runs on one corpus, less those of untrained encoders.

    Args:
        results: Files of `benchmarks/learning_curve.py`, one for each seed.
        titles: Question to the title of its plot, in order.

    Returns:
        A PNG file.
    """
    first = results[0]
    height = -(-len(titles) // COLUMNS)
    figure = Figure(figsize=(15, 4.4 * height + 1.1), dpi=80)
    figure.subplots_adjust(left=0.06, right=0.99, bottom=0.16 / height + 0.06, top=0.82, wspace=0.2, hspace=0.72)
    corpus = "CTs" if first["corpus"] == "real" else "phantoms"
    figure.suptitle(f"Pretrained on {first['volumes']} {corpus}: AUC with 32 labels less that of an untrained encoder")
    axes = figure.subplots(height, COLUMNS, squeeze=False).ravel()
    batch = first["config"]["optimisation"]["batch_size"]
    for plot in axes[len(titles) :]:
        plot.set_axis_off()
    for plot, (question, title) in zip(axes, titles.items(), strict=False):
        plot.set_title(f"{title}\n{_heights(first, question)}", fontsize=11)
        plot.set_xlabel("step (0: where the run set out)")
        plot.set_ylabel("AUC above untrained")
        plot.grid(alpha=0.3)
        plot.axhline(0, color="black", linewidth=1)
        above = plot.secondary_xaxis("top", functions=(lambda step: step * batch, lambda seen: seen / batch))
        above.set_xlabel("pairs of views seen", fontsize=8)
        above.tick_params(labelsize=8)
        for number, result in enumerate(results):
            style = {"color": f"C{SHADES[number % len(SHADES)]}", "label": f"pretrained, seed {result['seed']}"}
            _curve(plot, result, question, APART * first["steps"] * (number - 1), style)
        for name, (colour, label) in BASELINES.items():
            gain = _find(first["baselines"][name], question)
            if gain:
                plot.axhline(gain["value"], color=colour, linestyle="--", label=label)
        low, high = plot.get_ylim()
        plot.set_ylim(min(low, SPAN[0]), max(high, SPAN[1]))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=10)
    return image.png(figure)


def _heights(result: Mapping[str, Any], question: str) -> str:
    """AUC of untrained encoders, and where labels that were drawn again come to."""
    tables = [row["auc"]["value"] for table in result["untrained"] if (row := _row(table, question))]
    (luck,) = (row for row in result["chance"] if (row["question"], row["labels"]) == (question, 32))
    mean = sum(tables) / len(tables)
    return f"AUC untrained {mean:.2f}, by chance {luck['low']:.2f} to {luck['high']:.2f}"


def _curve(plot: Any, result: Mapping[str, Any], question: str, shift: float, style: Mapping[str, Any]) -> None:
    gains = [(probe["step"] + shift, gain) for probe in result["probes"] if (gain := _find(probe["rows"], question))]
    values = [gain["value"] for _, gain in gains]
    errors = [
        [gain["value"] - gain["low"] for _, gain in gains],
        [gain["high"] - gain["value"] for _, gain in gains],
    ]
    plot.errorbar([step for step, _ in gains], values, errors, marker="o", markersize=4, capsize=3, **style)


def _find(rows: Sequence[Mapping[str, Any]], question: str) -> dict[str, float] | None:
    row = _row(rows, question)
    return dict(row["above untrained"]) if row else None


def _row(rows: Sequence[Mapping[str, Any]], question: str) -> Mapping[str, Any] | None:
    wanted = (question, "all", 32)
    return next((row for row in rows if (row["question"], row["features"], row["labels"]) == wanted), None)
