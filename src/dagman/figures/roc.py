"""ROC curves of classifications side by side."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dagman.figures import image
from dagman.figures.palette import COLOURS, MARKERS

GRID = np.linspace(0, 1, 201)
STYLES = ("-", "--", "-.", ":")
"""Of several runs of more than two classes."""
_MEAN = "#000000"
_PALE = tuple(colour for colour in COLOURS if colour != _MEAN)


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

    Of more than two classes, the mean over classes of each against the rest, and those of the classes faint behind.

    Args:
        runs: By what the legend shall say, such as name and AUC.

    Returns:
        A PNG file.
    """
    return image.png(drawn(runs))


def drawn(runs: Mapping[str, Scores]) -> Figure:
    """The figure that `png` writes."""
    first = next(iter(runs.values()))
    several = len(first.names) > 2
    figure = Figure(figsize=(8.6 if several else 6.4, 6.4), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", linewidth=1)
    folds, named, means = False, dict[int, Line2D](), list[Line2D]()
    for number, (name, scores) in enumerate(runs.items()):
        curves, style = _mean_curves(scores), STYLES[number % len(STYLES)] if several else "-"
        colour = _MEAN if several else f"C{number}"
        if several:
            for place, curve in curves.items():
                [line] = axes.plot(GRID, curve, linestyle=style, alpha=0.6, linewidth=1.1, **_of_class(place))
                named.setdefault(place, line)
        elif len(parts := np.unique(scores.fold)) > 1:
            for fold in parts:
                for curve, _ in _curves(scores, scores.fold == fold).values():
                    axes.plot(GRID, curve, color=colour, alpha=0.2, linewidth=0.8)
                    folds = True
        mean = np.mean(list(curves.values()), axis=0) if curves else np.full(len(GRID), np.nan)
        means += axes.plot(GRID, mean, color=colour, linestyle=style, linewidth=2, label=name)
    if named:
        beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "fontsize": 9}
        lines = [named[place] for place in sorted(named)]
        names = [first.names[place] for place in sorted(named)]
        axes.add_artist(axes.legend(lines, names, title="against the rest", **beside))
    axes.set(
        xlabel="1 - specificity",
        ylabel="sensitivity",
        title=f"{'each class' if several else first.names[1]} against {'the rest' if several else first.names[0]}, "
        f"{len(first.labels)} cases",
        xlim=(0, 1),
        ylim=(0, 1.01),
        aspect="equal",
    )
    axes.grid(alpha=0.3)
    title = "mean of the classes, " * several + "AUC (95 % interval)" + "; pale: folds" * folds
    axes.legend(handles=means, loc="lower right", title=title, fontsize=9)
    return figure


def _of_class(number: int) -> dict[str, Any]:
    """How the curve of a class is drawn; those beyond the colours have marks too."""
    turn, colour = divmod(number, len(_PALE))
    marks = {"marker": MARKERS[(turn - 1) % len(MARKERS)], "markersize": 4, "markevery": 20} if turn else {}
    return {"color": _PALE[colour], **marks}


def _mean_curves(scores: Scores) -> dict[int, np.ndarray]:
    """Of each class the mean over folds, weighted by their pairs: the area below is its AUC within folds."""
    found: dict[int, list[tuple[np.ndarray, float]]] = {}
    for fold in np.unique(scores.fold):
        for number, curve in _curves(scores, scores.fold == fold).items():
            found.setdefault(number, []).append(curve)
    return {
        number: np.average([curve for curve, _ in each], axis=0, weights=[pairs for _, pairs in each])
        for number, each in found.items()
    }


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
