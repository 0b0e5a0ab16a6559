"""Linear probe: what can be read off frozen features, in cross-validation that keeps every patient in one fold.

Whatever is chosen (scaling, regularisation, threshold) is chosen by `fit` from the rows it is given, and `fit` is given
training rows only.

The intervals draw patients again and keep the fitted probes, and are widened in cross-validation, where each fold's
cases taught the probes that test the others (`statistics.widening`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from threadpoolctl import threadpool_limits

from dagman.errors import DagmanError
from dagman.tasks import cohort as cohorts
from dagman.tasks import folds as folding
from dagman.tasks import labels as label_rules
from dagman.tasks import predictions, statistics
from dagman.tasks.cohort import Cohort
from dagman.tasks.predictions import Predictions
from dagman.tasks.protocol import Part, Protocol
from dagman.tasks.table import Table

TASK = "classification"
STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 3))
"""Inverse regularisation tried, strongest regularisation first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """A fitted linear probe."""

    model: Any
    strength: float
    """Inverse regularisation C, chosen by grouped inner cross-validation."""
    threshold: float
    """Of two classes: probability from which a case is called positive, chosen on `outside`."""
    outside: Float[np.ndarray, "cases classes"]
    """Inner out-of-fold probabilities of the cases that it was fitted on."""

    def probabilities(self, features: Float[np.ndarray, "cases width"]) -> Float[np.ndarray, "cases classes"]:
        """Probability of each class."""
        found: np.ndarray = self.model.predict_proba(features)
        return found

    def linear(self) -> tuple[Float[np.ndarray, "classes width"], Float[np.ndarray, " classes"]]:
        """Weights and biases whose softmax on the features themselves gives the same probabilities."""
        scaler, regression = self.model[0], self.model[-1]
        weights = regression.coef_ / scaler.scale_
        biases = regression.intercept_ - weights @ scaler.mean_
        if len(weights) == 1:
            weights, biases = np.stack([0 * weights[0], weights[0]]), np.r_[0.0, biases]
        return weights, biases


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeResult(Predictions):
    """Predictions of a probe for each fold's test cases, and the probes."""

    probes: tuple[Probe, ...]


def probe(
    table: Table,
    protocol: Protocol | None = None,
    *,
    positive: str | None = None,
    unlabelled: label_rules.Unlabelled = "refuse",
) -> ProbeResult:
    """Logistic regression on standardised features in grouped, stratified cross-validation, or on a fixed test set.

    Args:
        table: Features, patients and labels (`labels.override` takes labels from another CSV).
        protocol: Folds by patient, or the column `split`, whose validation cases are learnt from as well: a probe
            chooses inside what it learns from; 3 folds without.
        positive: Which of two labels is positive; needed where labels are words.
        unlabelled: What to do about cases without a label.

    Raises:
        DagmanError: `E-LABEL` and `E-FEATURES` for unusable rows; `E-PATIENT` (exit code 4) for cases without patient;
            `E-FOLDS` where no plan gives every fold every class.

    Reference:
        Section 4, linear probing.
    """
    protocol = protocol or Protocol()
    cohort = cohorts.cohort(table, protocol, positive=positive, unlabelled=unlabelled)
    features = _usable(cohort.table)
    learnt = [sorted((*part.train, *part.held_out)) for part in cohort.parts]
    inner = [_inner(cohort, rows) for rows in learnt]
    parts, probes = [], []
    for part, rows, plan in zip(cohort.parts, learnt, inner, strict=True):
        probes.append(fit(features[rows], cohort.numbers[rows], plan))
        parts.append(predicted(cohort, part, probes[-1].probabilities(features[list(part.test)]), probes[-1].threshold))
    chosen_on = [
        dict(zip(cohorts.names(cohort.table, rows), fitted.outside[:, -1].tolist(), strict=True))
        for rows, fitted in zip(learnt, probes, strict=True)
    ]
    return ProbeResult(**vars(predictions.together(parts, chosen_on)), probes=tuple(probes))


def predicted(
    cohort: Cohort, part: Part, probabilities: Float[np.ndarray, "cases classes"], threshold: float
) -> Predictions:
    """Probabilities of a part's test cases, as predictions of one model."""
    rows = list(part.test)
    return Predictions(
        case_ids=tuple(cohorts.names(cohort.table, rows)),
        groups=cohort.groups[rows],
        labels=cohort.numbers[rows],
        names=cohort.classes.names,
        fold=np.full(len(rows), part.number),
        probabilities=probabilities,
        thresholds=(threshold,),
        group_by=cohort.protocol.group_by,
        num_unlabelled=cohort.num_unlabelled,
        seed=cohort.protocol.seed,
    )


def fit_all(
    table: Table, protocol: Protocol, *, positive: str | None, unlabelled: label_rules.Unlabelled
) -> tuple[Probe, tuple[str, ...], set[str]]:
    """A probe of all labelled cases but those of the split `test`, to predict new cases with; classes; its cases."""
    cohort = cohorts.cohort(table, replace(protocol, fraction=1.0), positive=positive, unlabelled=unlabelled)
    features = _usable(cohort.table)
    rows = sorted({row for part in cohort.parts for row in (*part.train, *part.held_out)})
    return fit_rows(cohort, rows, features[rows]), cohort.classes.names, {cohort.table.case_ids[row] for row in rows}


def fit_rows(cohort: Cohort, rows: Sequence[int], features: Float[np.ndarray, "cases width"]) -> Probe:
    """A probe of these cases of a cohort, whose features are given.

    Raises:
        DagmanError: `E-FOLDS` where they are too few to choose anything on.
    """
    return fit(features, cohort.numbers[list(rows)], _inner(cohort, rows))


def can_fit(cohort: Cohort, rows: Sequence[int]) -> bool:
    """Whether `fit_rows` can: two patients of every class and more."""
    try:
        _inner(cohort, rows)
    except DagmanError:
        return False
    return True


def _inner(cohort: Cohort, rows: Any) -> np.ndarray:
    rows = list(rows)
    return folding.inner_plan(cohort.numbers[rows], cohort.groups[rows], seed=cohort.protocol.seed)


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


def fit(
    features: Float[np.ndarray, "cases width"],
    classes: Shaped[np.ndarray, " cases"],
    fold: Int[np.ndarray, " cases"],
) -> Probe:
    """Fit a probe; strength and threshold come from cross-validation over the folds of the rows given.

    The strength is the one with the least out-of-fold log loss (a tie goes to the stronger regularisation); the
    threshold the one with the best balanced accuracy of its out-of-fold probabilities.
    """
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    numbers = classes.astype(np.int64)
    with threadpool_limits(1, "blas"):  # the products of small studies: threads would wait for one another
        outside = _outside(features, numbers, fold)
        likelihood = outside[:, np.arange(len(numbers)), numbers]
        best = int(np.argmin(-np.log(np.maximum(likelihood, 1e-12)).mean(axis=1)))
        model = make_pipeline(StandardScaler(), _regression(STRENGTHS[best])).fit(features, numbers)
    cut = threshold(outside[best, :, 1], numbers == 1) if outside.shape[2] == 2 else 0.5
    return Probe(model=model, strength=STRENGTHS[best], threshold=cut, outside=outside[best])


def _outside(features: np.ndarray, numbers: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Out-of-fold probabilities at each strength, (strengths, cases, classes)."""
    from sklearn.preprocessing import StandardScaler

    probability = np.empty((len(STRENGTHS), len(numbers), int(numbers.max()) + 1))
    for number in range(int(fold.max()) + 1):
        train, test = fold != number, fold == number
        scaler = StandardScaler().fit(features[train])
        learnt, asked = scaler.transform(features[train]), scaler.transform(features[test])
        for place, strength in enumerate(STRENGTHS):
            probability[place, test] = _regression(strength).fit(learnt, numbers[train]).predict_proba(asked)
    return probability


def _regression(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, tol=1e-6, max_iter=20_000)


def threshold(probability: Float[np.ndarray, " cases"], positive: Shaped[np.ndarray, " cases"]) -> float:
    """Cut with the best balanced accuracy, as `statistics.thresholds`."""
    return float(statistics.thresholds(probability, positive.astype(bool), np.ones((1, len(probability))))[0])


def about(result: ProbeResult) -> dict[str, Any]:
    """What else a result of a probe says of itself."""
    return {"strengths": [part.strength for part in result.probes]}


def write(result: ProbeResult, folder: Path, more: dict[str, Any] | None = None) -> list[Path]:
    """Write `predictions.csv` and `result.json`; returns their paths."""
    return predictions.write(result, folder, about(result) | (more or {}))


def beside(results: Mapping[str, Predictions]) -> list[dict[str, Any]]:
    """One row for each feature set: its AUC, and the first one's AUC minus its own, resampling the same patients.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, when the results do not share cases, labels and folds.
    """
    first = next(iter(results.values()))
    rows = []
    for name, result in results.items():
        predictions.check_comparable(first, result, name)
        gained = None if result is first else predictions.difference(first, result)
        rows.append({"features": name, "auc": result.auc(), "first_minus_this": gained})
    return rows
