"""ROC curves of classifications side by side."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from dagman.figures import image

GRID = np.linspace(0, 1, 201)


@runtime_checkable
class Scores(Protocol):
    """One set of predictions, such as `tasks.predictions.Predictions`."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes."""

    @property
    def labels(self) -> Int[np.ndarray, " cases"]:
        """Numbers of the true classes."""

    @property
    def probabilities(self) -> Float[np.ndarray, "cases classes"]:
        """Of each class."""

    @property
    def fold(self) -> Int[np.ndarray, " cases"]:
        """Cases with the same number were scored by the same model."""


def png(runs: Mapping[str, Scores]) -> bytes:
    """Draw one curve a run: the mean over its folds, weighted by their pairs, of their curves; folds faint behind.

    Of more than two classes, the mean over classes of each against the rest.

    Args:
        runs: By what the legend shall say, such as name and AUC.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(6.4, 6.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    for number, (name, scores) in enumerate(runs.items()):
        colour, curves = f"C{number}", _mean_curves(scores)
        if len(scores.names) == 2:
            for fold in np.unique(scores.fold):
                for curve, _ in _curves(scores, scores.fold == fold).values():
                    axes.plot(GRID, curve, color=colour, alpha=0.2, linewidth=0.8)
        mean = np.mean(curves, axis=0) if curves else np.full(len(GRID), np.nan)
        axes.plot(GRID, mean, color=colour, linewidth=2, label=name)
    first = next(iter(runs.values()))
    positive = first.names[1] if len(first.names) == 2 else "each class"
    axes.set(
        xlabel="1 - specificity",
        ylabel="sensitivity",
        title=f"{positive} against {'the rest' if len(first.names) > 2 else first.names[0]}, {len(first.labels)} cases",
        xlim=(0, 1),
        ylim=(0, 1.01),
        aspect="equal",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="AUC (95 % interval); pale: folds", fontsize=9)
    return image.png(figure)


def _mean_curves(scores: Scores) -> list[np.ndarray]:
    """Of each class the mean over folds, weighted by their pairs: the area below is its AUC within folds."""
    found: dict[int, list[tuple[np.ndarray, float]]] = {}
    for fold in np.unique(scores.fold):
        for number, curve in _curves(scores, scores.fold == fold).items():
            found.setdefault(number, []).append(curve)
    return [
        np.average([curve for curve, _ in each], axis=0, weights=[pairs for _, pairs in each])
        for each in found.values()
    ]


def _curves(scores: Scores, rows: np.ndarray) -> dict[int, tuple[np.ndarray, float]]:
    """Sensitivity at each 1 - specificity of the grid, and the number of pairs, for each class that has both sides."""
    found = {}
    for number in (1,) if len(scores.names) == 2 else range(len(scores.names)):
        score, positive = scores.probabilities[rows, number], scores.labels[rows] == number
        if positive.all() or not positive.any():
            continue
        cuts = np.r_[np.inf, np.unique(score)[::-1]]
        up = [(score[positive] >= cut).mean() for cut in cuts]
        down = [(score[~positive] >= cut).mean() for cut in cuts]
        found[number] = (np.interp(GRID, down, up), float(positive.sum() * (~positive).sum()))
    return found
