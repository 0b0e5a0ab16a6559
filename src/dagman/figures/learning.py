"""Probe scores against steps, beside an untrained encoder and baselines without one: does pretraining pay, and when."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dagman.figures import image

BASELINES = {
    "untrained": ("C7", "untrained encoder"),
    "voxels": ("C1", "raw voxels"),
    "histogram": ("C3", "histogram of intensities"),
    "shells": ("C5", "shells by hand"),
}
COLUMNS = 3
SPAN = (0.35, 1.0)
"""Heights of all plots, so that questions can be laid beside each other."""
SHADES = (0, 2, 4)
"""Colours of the cycle for the seeds."""


def png(results: Sequence[Mapping[str, Any]], titles: Mapping[str, str], *, features: str = "all") -> bytes:
    """Draw the probes with 32 labels of one or several runs on one corpus, against steps and samples seen.

    Each seed's untrained encoder stands at step 0; dashed lines are means over the seeds, bands their range.

    Args:
        results: Files of `benchmarks/learning_curve.py`, one for each seed.
        titles: Question to the title of its plot, in order.
        features: Which features are shown.

    Returns:
        A PNG file.
    """
    height = -(-len(titles) // COLUMNS)
    figure = Figure(figsize=(15, 4.6 * height + 0.9), dpi=80)
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.2 / height + 0.03, top=0.91, wspace=0.2, hspace=0.5)
    axes = figure.subplots(height, COLUMNS, squeeze=False).ravel()
    batch = results[0]["config"]["optimisation"]["batch_size"]
    for plot in axes[len(titles) :]:
        plot.set_axis_off()
    for plot, (question, title) in zip(axes, titles.items(), strict=False):
        plot.set_title(title, fontsize=11)
        plot.set_xlabel("step (0: untrained)")
        plot.set_ylabel("AUC, 32 labels")
        plot.grid(alpha=0.3)
        plot.set_ylim(*SPAN)
        plot.axhline(0.5, color="black", linestyle=":", linewidth=1, label="chance = .5")
        above = plot.secondary_xaxis("top", functions=(lambda step: step * batch, lambda seen: seen / batch))
        above.set_xlabel("pairs of views seen", fontsize=8)
        above.tick_params(labelsize=8)
        for number, result in enumerate(results):
            style = {"color": f"C{SHADES[number % len(SHADES)]}", "label": f"pretrained, seed {result['seed']}"}
            _curve(plot, result, question, features, style)
        for name, (colour, label) in BASELINES.items():
            found = [
                _find(result["baselines"].get(name, ()), question, features if name == "untrained" else "all")
                for result in results
            ]
            aucs = [auc["value"] for auc in found if auc]
            if aucs:
                plot.axhline(sum(aucs) / len(aucs), color=colour, linestyle="--", label=label)
                plot.axhspan(min(aucs), max(aucs), color=colour, alpha=0.15)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=10)
    return image.png(figure)


def _curve(plot: Any, result: Mapping[str, Any], question: str, kind: str, style: Mapping[str, Any]) -> None:
    start = _find(result["baselines"]["untrained"], question, kind)
    found = [(0, start), *((probe["step"], _find(probe["rows"], question, kind)) for probe in result["probes"])]
    steps, aucs = zip(*[(step, auc) for step, auc in found if auc], strict=True)
    values = [auc["value"] for auc in aucs]
    errors = [[auc["value"] - auc["low"] for auc in aucs], [auc["high"] - auc["value"] for auc in aucs]]
    plot.errorbar(steps, values, errors, marker="o", markersize=4, capsize=3, **style)


def _find(rows: Sequence[Mapping[str, Any]], question: str, kind: str) -> dict[str, float] | None:
    for row in rows:
        if (row["question"], row["features"], row["labels"]) == (question, kind, 32) and row["auc"]["low"] is not None:
            return dict(row["auc"])
    return None
