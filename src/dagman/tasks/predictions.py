"""Predicted classes of labelled cases, what they are worth, and how two sets of them compare.

Scores of different folds come from different models and are never ranked against each other: an AUC counts the
(positive, negative) pairs within each fold, so that it equals the mean of the folds' AUCs weighted by their pairs, and
constant scores give exactly 0.5. Of more than two classes it is the mean over classes of each against the rest.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dagman import files
from dagman.errors import DagmanError, ExitCode
from dagman.randomness import generator
from dagman.tasks import statistics
from dagman.tasks.statistics import Estimate
from dagman.tasks.table import write_rows

ROWS, RESULT = "predictions.csv", "result.json"
SCORES = {
    2: ("auc", "sensitivity", "specificity", "balanced_accuracy", "brier"),
    3: ("auc", "accuracy", "balanced_accuracy", "brier"),
}
"""Of two classes, and of more."""
CHOSEN_ON = "threshold_chosen_on_"
"""Of the columns of `Predictions.chosen_on`, with the fold's number."""
CLASS_SCORES = ("auc", "sensitivity", "specificity")
"""Of each of more than two classes against the rest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Predictions for cases that were not learnt from; rows are sorted by case."""

    case_ids: tuple[str, ...]
    groups: Shaped[np.ndarray, " cases"]
    """Patient of each case."""
    labels: Int[np.ndarray, " cases"]
    """Number of the true class; of two classes 1 is the positive one."""
    names: tuple[str, ...]
    """Of the classes."""
    fold: Int[np.ndarray, " cases"]
    """Of two cases with the same number, the scores come from the same model."""
    probabilities: Float[np.ndarray, "cases classes"]
    thresholds: tuple[float, ...]
    """For each fold, the positive probability from which a case is called positive; not used with more classes."""
    chosen_on: Float[np.ndarray, "folds cases"] | None = None
    """Of two classes: the positive probability of each case when the threshold of each fold was chosen; NaN where it
    had no say. None of thresholds that came from elsewhere."""
    group_by: Literal["patient", "case"] = "patient"
    num_unlabelled: int = 0
    """Cases left out for want of a label."""
    seed: int = 0
    """Of the bootstrap."""

    @property
    def positive(self) -> Bool[np.ndarray, " cases"]:
        """Of two classes: the truth."""
        positive: np.ndarray = self.labels == 1
        return positive

    @property
    def probability(self) -> Float[np.ndarray, " cases"]:
        """Of two classes: of the positive one."""
        column: np.ndarray = self.probabilities[:, 1]
        return column

    @property
    def called(self) -> Int[np.ndarray, " cases"]:
        """Predicted class: the most likely, and of two classes the positive one from its fold's threshold on."""
        if len(self.names) == 2:
            found: np.ndarray = (self.probability >= np.array(self.thresholds)[self.fold]).astype(np.int64)
        else:
            found = self.probabilities.argmax(axis=1)
        return found

    @property
    def scores(self) -> dict[str, Estimate]:
        """Every score that this number of classes has, with its interval."""
        return {name: getattr(self, name)() for name in SCORES[min(3, len(self.names))]}

    def auc(self) -> Estimate:
        """Area under the ROC curve over pairs within folds; of more classes the mean of each against the rest."""
        return self.estimate(self.auc_of)

    def class_scores(self) -> dict[str, dict[str, Estimate]]:
        """`CLASS_SCORES` of each class against the rest, by score and class."""
        found: dict[str, dict[str, Estimate]] = {score: {} for score in CLASS_SCORES}
        for number, name in enumerate(self.names):
            true, called = self.labels == number, self.called == number
            found["auc"][name] = self.estimate(partial(self._against_rest, number), true)
            found["sensitivity"][name] = self.estimate(partial(statistics.share, called, true), true)
            found["specificity"][name] = self.estimate(partial(statistics.share, ~called, ~true), true)
        return found

    def sensitivity(self) -> Estimate:
        """Share of the positive cases called positive."""
        return self.estimate(partial(self._called_rightly, 1))

    def specificity(self) -> Estimate:
        """Share of the negative cases called negative."""
        return self.estimate(partial(self._called_rightly, 0))

    def _called_rightly(self, number: int, weights: np.ndarray) -> np.ndarray:
        """Share of one of two classes that is called so, for each row of case weights.

        In a cross-validation each row chooses the folds' thresholds anew: they move far more than the cases tested.
        """
        hits = np.zeros(len(weights))
        for fold, cut in enumerate(self.thresholds):
            rows = (self.fold == fold) & (self.labels == number)
            cuts = np.full(len(weights), cut)
            if len(self.thresholds) > 1 and self.chosen_on is not None:
                had = np.isfinite(self.chosen_on[fold])
                if had.any():
                    cuts = statistics.thresholds(self.chosen_on[fold, had], self.positive[had], weights[:, had])
            called = self.probability[rows] >= cuts[:, None]
            hits += (weights[:, rows] * (called == number)).sum(axis=1)
        of = weights[:, self.labels == number].sum(axis=1)
        found: np.ndarray = np.divide(hits, of, out=np.full(len(of), np.nan), where=of > 0)
        return found

    def accuracy(self) -> Estimate:
        """Share of the cases called what they are."""
        everyone = np.ones(len(self.labels), dtype=bool)
        return self.estimate(partial(statistics.share, self.called == self.labels, everyone))

    def balanced_accuracy(self) -> Estimate:
        """Mean over classes of the share of their cases called so."""
        return self.estimate(self._balanced)

    def brier(self) -> Estimate:
        """Mean squared error of the probabilities, lower is better: of the positive class, or summed over classes."""
        wrong = (self.probabilities - np.eye(len(self.names))[self.labels]) ** 2
        error = wrong[:, 1] if len(self.names) == 2 else wrong.sum(axis=1)
        return self.estimate(partial(statistics.mean, error))

    def auc_of(self, weights: np.ndarray) -> np.ndarray:
        """AUC for each row of case weights."""
        if len(self.names) == 2:
            return self._against_rest(1, weights)
        found: np.ndarray = np.mean([self._against_rest(number, weights) for number in range(len(self.names))], axis=0)
        return found

    def _against_rest(self, number: int, weights: np.ndarray) -> np.ndarray:
        found: np.ndarray = statistics.auc(
            self.probabilities[:, number], self.labels == number, weights, strata=self.fold
        )
        return found

    def fold_auc(self) -> list[float | None]:
        """AUC of each fold; None where it lacks a class."""
        found = []
        for number in range(len(self.thresholds)):
            value = float(self.auc_of((self.fold == number).astype(float)[None])[0])
            found.append(None if np.isnan(value) else value)
        return found

    def estimate(self, statistic: statistics.Statistic, classes: np.ndarray | None = None) -> Estimate:
        """A score with its interval over patients."""
        if classes is None:
            classes = self.positive if len(self.names) == 2 else self.labels
        return statistics.estimate(statistic, self.groups, classes, seed=self.seed, models=len(self.thresholds))

    def _balanced(self, weights: np.ndarray) -> np.ndarray:
        called = self.called
        shares = [
            statistics.share(called == number, self.labels == number, weights) for number in range(len(self.names))
        ]
        found: np.ndarray = np.mean(shares, axis=0)
        return found


def summary(found: Predictions) -> dict[str, Any]:
    """The scores as plain values for JSON."""
    binary = len(found.names) == 2
    words: dict[str, Any] = {"positive_label": found.names[1], "negative_label": found.names[0]} if binary else {}
    counts = np.bincount(found.labels, minlength=len(found.names)).tolist()
    return {
        "cases": len(found.case_ids),
        "classes": dict(zip(found.names, counts, strict=True)),
        **({"positive": int(found.positive.sum())} if binary else {}),
        "patients": None if found.group_by == "case" else len(np.unique(found.groups)),
        **words,
        "unlabelled_left_out": found.num_unlabelled,
        "group_by": found.group_by,
        "warning": None if found.group_by == "patient" else "not grouped by patient: scores may be too good",
        "folds": len(found.thresholds),
        "seed": found.seed,
        "interval": f"95 %, bias-corrected and accelerated bootstrap over {found.group_by}s, models not fitted again"
        + (statistics.WIDENED if len(found.thresholds) > 1 else "")
        + ("; of sensitivity and specificity, thresholds chosen again" if found.chosen_on is not None else ""),
        **{name: vars(score) for name, score in found.scores.items()},
        **({} if binary else _class_values(found)),
        "fold_auc": found.fold_auc(),
        "thresholds": list(found.thresholds) if binary else None,
    }


def _class_values(found: Predictions) -> dict[str, Any]:
    return {
        f"class_{score}": {name: vars(estimate) for name, estimate in by_class.items()}
        for score, by_class in found.class_scores().items()
    }


def lines(result: dict[str, Any]) -> list[str]:
    """The scores of a `summary` for a person; of more than two classes also of each against the rest."""
    names = SCORES[min(3, len(result["classes"]))]
    told = [f"{name.replace('_', ' '):18s} {Estimate(**result[name])}" for name in names]
    if len(result["classes"]) == 2:
        return told
    told.append(f"{'against the rest':18s} cases  " + "  ".join(f"{score:22s}" for score in CLASS_SCORES).rstrip())
    for name, count in result["classes"].items():
        scores = [str(Estimate(**result[f"class_{score}"][name])) for score in CLASS_SCORES]
        told.append(f"{name:18s} {count:5d}  " + "  ".join(f"{score:22s}" for score in scores).rstrip())
    return told


def write(found: Predictions, folder: Path, more: dict[str, Any] | None = None) -> list[Path]:
    """Write `predictions.csv` and `result.json` (`more` joins the summary); returns their paths."""
    words = np.array(found.names)
    patients = found.groups if found.group_by == "patient" else np.full(len(found.labels), "")
    columns = {f"probability_{name}": found.probabilities[:, number] for number, name in enumerate(found.names)}
    if found.chosen_on is not None:
        columns |= {f"{CHOSEN_ON}{fold}": row for fold, row in enumerate(found.chosen_on)}
    paths = [folder / ROWS, folder / RESULT]
    write_rows(
        paths[0],
        ("case_id", "patient", "fold", "label", "predicted", *columns),
        zip(
            *(found.case_ids, patients, found.fold, words[found.labels], words[found.called]),
            *columns.values(),
            strict=True,
        ),
    )
    files.write_json(paths[1], summary(found) | (more or {}))
    return paths


def read(folder: Path) -> Predictions:
    """Predictions that `write` wrote.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, where the folder holds none, or no case.
    """
    try:
        result = json.loads((folder / RESULT).read_text())
        rows = list(csv.DictReader(io.StringIO((folder / ROWS).read_text())))
        if not rows:
            raise _not_comparable(folder / ROWS, "holds no case")
        names = tuple(result["classes"])
        return Predictions(
            case_ids=tuple(row["case_id"] for row in rows),
            groups=np.array([row["patient"] or row["case_id"] for row in rows]),
            labels=np.array([names.index(row["label"]) for row in rows]),
            names=names,
            fold=np.array([int(row["fold"]) for row in rows]),
            probabilities=np.array([[float(row[f"probability_{name}"]) for name in names] for row in rows]),
            thresholds=tuple(result["thresholds"] or [0.5] * result["folds"]),
            chosen_on=_chosen_on(rows, result["folds"]),
            group_by=result["group_by"],
            num_unlabelled=result["unlabelled_left_out"],
            seed=result["seed"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"holds no {ROWS} and {RESULT} of a classification ({type(error).__name__})"
        raise _not_comparable(folder, problem) from None


def _not_comparable(subject: Path, problem: str) -> DagmanError:
    advice = "give the output folder of `dagman classify probe` or `finetune`"
    return DagmanError("COMPARE", subject, problem, advice, exit_code=ExitCode.REFUSED)


def _chosen_on(rows: Sequence[Mapping[str, str]], folds: int) -> np.ndarray | None:
    names = [f"{CHOSEN_ON}{fold}" for fold in range(folds)]
    if not names or names[0] not in rows[0]:
        return None
    return np.array([[float(row[name]) for row in rows] for name in names])


def together(parts: Sequence[Predictions], chosen_on: Sequence[Mapping[str, float]] = ()) -> Predictions:
    """Predictions of several folds as one, sorted by case.

    Args:
        parts: Of one fold each.
        chosen_on: For each fold, case to positive probability when its threshold was chosen; of two classes.
    """
    first = parts[0]
    values: dict[str, Any] = {field.name: getattr(first, field.name) for field in fields(Predictions)}
    case_ids = [case for part in parts for case in part.case_ids]
    order = sorted(range(len(case_ids)), key=case_ids.__getitem__)
    for name in ("groups", "labels", "fold", "probabilities"):
        values[name] = np.concatenate([getattr(part, name) for part in parts])[order]
    values["case_ids"] = tuple(case_ids[row] for row in order)
    values["thresholds"] = tuple(value for part in parts for value in part.thresholds)
    if len(parts) > 1 and len(first.names) == 2 and any(chosen_on):
        values["chosen_on"] = np.array([[one.get(case, np.nan) for case in values["case_ids"]] for one in chosen_on])
    return Predictions(**values)


def difference(first: Predictions, other: Predictions) -> Estimate:
    """AUC of the first less that of the other, with its interval: the same patients are drawn for both.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, when they do not share cases, labels and folds.
    """
    return mean_difference([(first, other)])


def mean_difference(pairs: Sequence[tuple[Predictions, Predictions]]) -> Estimate:
    """AUC of the first of a pair less that of the second, mean over pairs; the same patients are drawn for all.

    Args:
        pairs: At least one, of the same cases; one for each seed, say.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, when they do not share cases, labels and folds.
    """
    first = pairs[0][0]
    for one in (one for pair in pairs for one in pair):
        check_comparable(first, one)

    def mean(weights: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.mean([one.auc_of(weights) - other.auc_of(weights) for one, other in pairs], axis=0)
        return found

    return first.estimate(mean)


def difference_from_one_of(first: Predictions, others: Sequence[Predictions]) -> Estimate:
    """AUC of the first less that of one of the others, drawn at random: those are alike but for chance.

    Each resample draws patients again and one of the others. An interval over patients alone keeps the random weights
    that the other network happened to have, and sets every third pair of untrained encoders apart from each other.

    Args:
        first: Of a trained encoder.
        others: At least two, of encoders with other random weights each, on the same cases.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, when they do not share cases, labels and folds.
    """
    from scipy.special import ndtr, ndtri

    for other in others:
        check_comparable(first, other)
    people, person = np.unique(first.groups, return_inverse=True)
    draws = generator(first.seed, "predictions.one_of")
    models = len(first.thresholds)
    resamples = statistics.farther(models) * statistics.RESAMPLES
    weights = draws.multinomial(len(people), np.full(len(people), 1 / len(people)), resamples)
    counted = weights[:, person].astype(float)
    drawn = np.stack([other.auc_of(counted) for other in others])
    gained = first.auc_of(counted) - drawn[draws.integers(len(others), size=len(counted)), np.arange(len(counted))]
    once = np.ones((1, len(person)))
    value = float(first.auc_of(once)[0] - np.mean([other.auc_of(once)[0] for other in others]))
    if not np.isfinite(value):
        return Estimate(value=None, why=first.auc().why)
    if (why := first.auc().why) and why != statistics.UNMOVED:  # of an AUC that no patient moves, the others may vary
        return Estimate(value=value, why=why)
    ends = ndtr(statistics.widening(models) * ndtri(np.array([0.025, 0.975])))
    low, high = np.nanquantile(gained, ends)
    if low == high:
        return Estimate(value=value, why=statistics.UNMOVED)
    return Estimate(value=value, low=float(low), high=float(high))


def check_comparable(first: Predictions, other: Predictions, name: object = "second result") -> None:
    """Refuse to compare what was not predicted for the same cases.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4.
    """
    checks: dict[str, Callable[[Predictions], object]] = {
        "cases": lambda one: one.case_ids,
        "classes": lambda one: one.names,
        "labels": lambda one: one.labels.tolist(),
        "folds": lambda one: one.fold.tolist(),
        "patients": lambda one: (one.group_by, one.groups.tolist()),
    }
    wrong = [word for word, value in checks.items() if value(first) != value(other)]
    if wrong:
        alone = sorted({*first.case_ids} ^ {*other.case_ids})
        more = f" ({alone[0]} is in one of them alone)" if alone else ""
        problem = f"its {', '.join(wrong)} differ from the first one's{more}"
        advice = "predict the same cases with the same folds and seed"
        raise DagmanError("COMPARE", name, problem, advice, exit_code=ExitCode.REFUSED)
