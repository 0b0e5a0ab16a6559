"""Linear probe: what can be read off frozen features, in cross-validation that keeps every patient in one fold.

Whatever is chosen (scaling, regularisation, threshold) is chosen by `fit` from the rows it is given, and `fit` is given
training rows only. Scores of different folds come from different models and are never ranked against each other: the
AUC counts the (positive, negative) pairs within each fold, so that it equals the mean of the folds' AUCs weighted by
their pairs, and constant scores give exactly 0.5.

The intervals draw patients again and keep the fitted probes: they say how far the score of these probes may be off for
want of test patients, not how much another training set would change them. Under random labels (60 to 200 patients)
they hold 0.5 in about nine of ten simulated studies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dagman import files
from dagman.errors import DagmanError, ExitCode
from dagman.tasks import folds as folding
from dagman.tasks import labels as label_rules
from dagman.tasks import statistics
from dagman.tasks.statistics import Estimate
from dagman.tasks.table import Table, write_rows

STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 3))
"""Inverse regularisation tried, strongest regularisation first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A fitted linear probe."""

    model: Any
    strength: float
    """Inverse regularisation C, chosen by grouped inner cross-validation."""
    threshold: float
    """Probability from which a case is called positive, chosen on inner out-of-fold probabilities."""

    def probabilities(self, features: Float[np.ndarray, "cases width"]) -> Float[np.ndarray, " cases"]:
        """Probability of the positive class."""
        found: np.ndarray = self.model.predict_proba(features)[:, 1]
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeResult:
    """Out-of-fold predictions of a probe and the scores computed from them; rows are sorted by case."""

    case_ids: tuple[str, ...]
    groups: Shaped[np.ndarray, " cases"]
    positive: Bool[np.ndarray, " cases"]
    fold: Int[np.ndarray, " cases"]
    probability: Float[np.ndarray, " cases"]
    called: Bool[np.ndarray, " cases"]
    """Probability at or above the threshold of its fold."""
    probes: tuple[Probe, ...]
    positive_word: str
    negative_word: str
    group_by: Literal["patient", "case"]
    num_unlabelled: int
    """Cases left out for want of a label."""
    seed: int

    def auc(self) -> Estimate:
        """Area under the ROC curve over pairs within folds."""
        return self._estimate(partial(statistics.auc, self.probability, self.positive, strata=self.fold))

    def sensitivity(self) -> Estimate:
        """Share of the positive cases called positive."""
        return self._estimate(partial(statistics.share, self.called, self.positive))

    def specificity(self) -> Estimate:
        """Share of the negative cases called negative."""
        return self._estimate(partial(statistics.share, ~self.called, ~self.positive))

    def balanced_accuracy(self) -> Estimate:
        """Mean of sensitivity and specificity."""
        return self._estimate(self._balanced)

    def fold_auc(self) -> list[float]:
        """AUC of each fold."""
        return [_auc(self.probability[rows], self.positive[rows]) for rows in self._folds()]

    def _folds(self) -> list[np.ndarray]:
        return [self.fold == number for number in range(len(self.probes))]

    def _balanced(self, weights: np.ndarray) -> np.ndarray:
        positive = statistics.share(self.called, self.positive, weights)
        negative = statistics.share(~self.called, ~self.positive, weights)
        return np.asarray((positive + negative) / 2)

    def _estimate(self, statistic: statistics.Statistic) -> Estimate:
        return statistics.estimate(statistic, self.groups, self.positive, seed=self.seed)


def probe(
    table: Table,
    *,
    positive: str | None = None,
    folds: int = 3,
    seed: int = 0,
    group_by: Literal["patient", "case"] = "patient",
    unlabelled: label_rules.Unlabelled = "refuse",
) -> ProbeResult:
    """Logistic regression on standardised features in grouped, stratified cross-validation.

    Args:
        table: Features, patients and labels of two classes (`labels.override` takes labels from another CSV).
        positive: Which label is positive; needed where labels are words.
        folds: 3 (the paper's protocol).
        seed: Of the fold plan and the bootstrap.
        group_by: `case` treats every case as its own patient; it is then written into the result.
        unlabelled: What to do about cases without a label.

    Raises:
        DagmanError: `E-LABEL` and `E-FEATURES` for unusable rows; `E-PATIENT` (exit code 4) for cases without patient;
            `E-FOLDS` where no plan gives every fold both classes.

    Reference:
        Section 4, linear probing.
    """
    table, num_unlabelled = label_rules.labelled(table, unlabelled)
    classes, groups, fold = plan(table, positive=positive, folds=folds, seed=seed, group_by=group_by)
    features = _usable(table)
    probability, probes = cross_validate(features, classes.positive, groups, fold, seed=seed)
    return ProbeResult(
        case_ids=table.case_ids,
        groups=groups,
        positive=classes.positive,
        fold=fold,
        probability=probability,
        called=probability >= np.array([part.threshold for part in probes])[fold],
        probes=probes,
        positive_word=classes.positive_word,
        negative_word=classes.negative_word,
        group_by=group_by,
        num_unlabelled=num_unlabelled,
        seed=seed,
    )


def plan(
    table: Table, *, positive: str | None, folds: int, seed: int, group_by: Literal["patient", "case"]
) -> tuple[label_rules.Classes, Shaped[np.ndarray, " cases"], Int[np.ndarray, " cases"]]:
    """Classes, groups and folds of labelled cases, whatever their features.

    Raises:
        DagmanError: As `probe`, but for features.
    """
    classes = label_rules.binary([str(label) for label in table.labels], positive)
    groups = _groups(table, group_by)
    return classes, groups, folding.fold_plan(classes.positive, groups, folds=folds, seed=seed)


def _usable(table: Table) -> np.ndarray:
    features = table.features.astype(np.float64)
    bad = [case for case, row in zip(table.case_ids, features, strict=True) if not np.isfinite(row).all()]
    if bad:
        problem = f"{len(bad)} cases with NaN or infinite features ({', '.join(bad[:5])})"
        raise DagmanError("FEATURES", "feature table", problem, "embed these cases again or remove them")
    if not np.ptp(features, axis=0).any():
        problem = f"all {features.shape[1]} features are the same for all {len(features)} cases"
        raise DagmanError("FEATURES", "feature table", problem, "check the encoder for collapse")
    return features


def _groups(table: Table, group_by: str) -> np.ndarray:
    if group_by == "case":
        return np.array(table.case_ids)
    without = [case for case, patient in zip(table.case_ids, table.patients, strict=True) if not patient]
    if without:
        raise DagmanError(
            "PATIENT",
            "feature table",
            f"{len(without)} of {len(table.case_ids)} cases have no patient ({', '.join(without[:5])}): "
            "one patient's scans could stand in training and test",
            "add a patient column, or say --group-by case, which is then written into the result",
            exit_code=ExitCode.REFUSED,
        )
    return np.array([str(patient) for patient in table.patients])


def cross_validate(
    features: Float[np.ndarray, "cases width"],
    positive: Bool[np.ndarray, " cases"],
    groups: Shaped[np.ndarray, " cases"],
    fold: Int[np.ndarray, " cases"],
    *,
    seed: int,
) -> tuple[Float[np.ndarray, " cases"], tuple[Probe, ...]]:
    """Out-of-fold probability of every case, and the probe of every fold.

    Raises:
        DagmanError: `E-FOLDS`, before anything is fitted, when a training part cannot be split again.
    """
    numbers = range(int(fold.max()) + 1)
    inner = [folding.inner_plan(positive[fold != number], groups[fold != number], seed=seed) for number in numbers]
    probability = np.empty(len(positive))
    probes = []
    for number in numbers:
        train, test = fold != number, fold == number
        probes.append(fit(features[train], positive[train], inner[number]))
        probability[test] = probes[-1].probabilities(features[test])
    return probability, tuple(probes)


def fit(
    features: Float[np.ndarray, "cases width"],
    positive: Bool[np.ndarray, " cases"],
    fold: Int[np.ndarray, " cases"],
) -> Probe:
    """Fit a probe; strength and threshold come from cross-validation over the folds of the rows given.

    The strength is the one with the least out-of-fold log loss (a tie goes to the stronger regularisation); the
    threshold the one with the best balanced accuracy of its out-of-fold probabilities.
    """
    outside = np.stack([_outside(features, positive, fold, strength) for strength in STRENGTHS])
    likelihood = np.where(positive, outside, 1 - outside)
    best = int(np.argmin(-np.log(np.maximum(likelihood, 1e-12)).mean(axis=1)))
    model = _pipeline(STRENGTHS[best]).fit(features, positive)
    return Probe(model=model, strength=STRENGTHS[best], threshold=_threshold(outside[best], positive))


def _outside(features: np.ndarray, positive: np.ndarray, fold: np.ndarray, strength: float) -> np.ndarray:
    probability = np.empty(len(positive))
    for number in range(int(fold.max()) + 1):
        train, test = fold != number, fold == number
        model = _pipeline(strength).fit(features[train], positive[train])
        probability[test] = model.predict_proba(features[test])[:, 1]
    return probability


def _pipeline(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, tol=1e-6, max_iter=20_000))


def _threshold(probability: np.ndarray, positive: np.ndarray) -> float:
    """Cut with the best balanced accuracy, midway between two neighbouring values; of equals the one nearest 0.5."""
    values = np.unique(probability)
    cuts = np.r_[values[0], (values[1:] + values[:-1]) / 2]
    called = probability >= cuts[:, None]
    balanced = called[:, positive].mean(axis=1) - called[:, ~positive].mean(axis=1)
    best = cuts[np.isclose(balanced, balanced.max(), rtol=0, atol=1e-12)]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _auc(probability: np.ndarray, positive: np.ndarray) -> float:
    return float(statistics.auc(probability, positive, np.ones((1, len(positive))))[0])


def summary(result: ProbeResult) -> dict[str, Any]:
    """The result as plain values for JSON."""
    scores = {name: getattr(result, name)() for name in ("auc", "sensitivity", "specificity", "balanced_accuracy")}
    return {
        "cases": len(result.case_ids),
        "positive": int(result.positive.sum()),
        "patients": None if result.group_by == "case" else len(np.unique(result.groups)),
        "positive_label": result.positive_word,
        "negative_label": result.negative_word,
        "unlabelled_left_out": result.num_unlabelled,
        "group_by": result.group_by,
        "warning": None if result.group_by == "patient" else "not grouped by patient: scores may be too good",
        "folds": len(result.probes),
        "seed": result.seed,
        "interval": "95 %, bias-corrected and accelerated bootstrap over patients, probes not refitted",
        **{name: vars(score) for name, score in scores.items()},
        "fold_auc": result.fold_auc(),
        "strengths": [part.strength for part in result.probes],
        "thresholds": [part.threshold for part in result.probes],
    }


def write(result: ProbeResult, folder: Path) -> list[Path]:
    """Write `predictions.csv` and `result.json`; returns their paths."""
    words = np.where(result.positive, result.positive_word, result.negative_word)
    predicted = np.where(result.called, result.positive_word, result.negative_word)
    patients = result.groups if result.group_by == "patient" else np.full(len(words), "")
    paths = [folder / "predictions.csv", folder / "result.json"]
    write_rows(
        paths[0],
        ("case_id", "patient", "fold", "label", "probability", "predicted"),
        zip(result.case_ids, patients, result.fold, words, result.probability, predicted, strict=True),
    )
    files.write_json(paths[1], summary(result))
    return paths


def beside(results: Mapping[str, ProbeResult]) -> list[dict[str, Any]]:
    """One row for each feature set: its AUC, and the first one's AUC minus its own, resampling the same patients.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, when the results do not share cases, labels and folds.
    """
    first = next(iter(results.values()))
    rows = []
    for name, result in results.items():
        if (
            result.case_ids != first.case_ids
            or not np.array_equal(result.fold, first.fold)
            or not np.array_equal(result.positive, first.positive)
        ):
            raise DagmanError(
                "COMPARE",
                name,
                "its cases, labels or folds differ from the first one's",
                "probe both on the same cases with the same seed",
                exit_code=ExitCode.REFUSED,
            )
        rows.append({"features": name, "auc": result.auc(), "first_minus_this": _difference(first, result)})
    return rows


def _difference(first: ProbeResult, other: ProbeResult) -> Estimate | None:
    if other is first:
        return None

    def statistic(weights: np.ndarray) -> np.ndarray:
        ours: np.ndarray = statistics.auc(first.probability, first.positive, weights, first.fold)
        theirs: np.ndarray = statistics.auc(other.probability, other.positive, weights, other.fold)
        gained: np.ndarray = np.subtract(ours, theirs)
        return gained

    return statistics.estimate(statistic, first.groups, first.positive, seed=first.seed)
