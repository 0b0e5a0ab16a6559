"""Scores with intervals: every figure is a function of case weights, and patients, not cases, are drawn again.

One vectorised function per score takes a matrix of weights, one row per resample; all ones give the score itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from dagman import randomness

RESAMPLES = 2000
UNMOVED = "resampling the patients does not change it"
FARTHER = 5
"""Times as many where an interval is widened (`farther`)."""
WIDENED = "; standard error times 1.41, as each fold's cases taught the models that test the others"
"""Of the intervals of a cross-validation, for a person."""
Weights = Float[np.ndarray, "resamples cases"]
Statistic = Callable[[np.ndarray], np.ndarray]
_BLOCK = 2_000_000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score and its 95 % interval; what cannot be computed is None, and `why` says so."""

    value: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"n/a ({self.why})"
        if self.low is None or self.high is None:
            return f"{self.value:.3f} (interval n/a: {self.why})"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def auc(
    scores: Float[np.ndarray, " cases"],
    positive: Bool[np.ndarray, " cases"],
    weights: Weights,
    strata: Int[np.ndarray, " cases"] | None = None,
) -> Float[np.ndarray, " resamples"]:
    """Weighted share of (positive, negative) pairs ranked rightly, ties counting half.

    Args:
        scores: Higher means more likely positive.
        positive: True classes.
        weights: How often each case counts, per resample.
        strata: Only pairs within one stratum count (cross-validation folds, whose scores come from different models);
            None pairs every case with every other.

    Returns:
        One value per resample, NaN where it holds no pair.
    """
    strata = np.zeros(len(scores), dtype=int) if strata is None else strata
    order = np.lexsort((scores, strata))
    scores, strata = scores[order], strata[order]
    new_stratum = np.r_[True, strata[1:] != strata[:-1]]
    starts = np.flatnonzero(new_stratum | np.r_[True, scores[1:] != scores[:-1]])
    up = np.add.reduceat((weights * positive)[:, order], starts, axis=1)
    down = np.add.reduceat((weights * ~positive)[:, order], starts, axis=1)
    wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    firsts = np.searchsorted(starts, np.flatnonzero(new_stratum))
    for first, last in zip(firsts, [*firsts[1:], len(starts)], strict=True):
        ups, downs = up[:, first:last], down[:, first:last]
        wins += (ups * (np.cumsum(downs, axis=1) - 0.5 * downs)).sum(axis=1)
        pairs += ups.sum(axis=1) * downs.sum(axis=1)
    return _ratio(wins, pairs)


def thresholds(
    probability: Float[np.ndarray, " cases"], positive: Bool[np.ndarray, " cases"], weights: Weights
) -> Float[np.ndarray, " resamples"]:
    """Cut with the best balanced accuracy under each row of case weights.

    It lies midway between two neighbouring probabilities, or at the least; of equals it is the one nearest 0.5.
    """
    values, number = np.unique(probability, return_inverse=True)
    cuts = np.r_[values[0], (values[1:] + values[:-1]) / 2]
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(len(values)))

    def called(among: np.ndarray) -> np.ndarray:
        counted = np.add.reduceat((weights * among)[:, order], starts, axis=1)
        above = counted[:, ::-1].cumsum(axis=1)[:, ::-1]
        found: np.ndarray = above / np.maximum(above[:, :1], 1e-12)
        return found

    balanced = called(positive) - called(~positive)
    best = balanced >= balanced.max(axis=1, keepdims=True) - 1e-12
    found: np.ndarray = cuts[np.where(best, np.abs(cuts - 0.5), np.inf).argmin(axis=1)]
    return found


def share(
    hits: Bool[np.ndarray, " cases"], among: Bool[np.ndarray, " cases"], weights: Weights
) -> Float[np.ndarray, " resamples"]:
    """Weighted share of the cases in `among` that are hits (sensitivity, specificity); NaN where there is none."""
    return _ratio(weights @ (hits & among).astype(float), weights @ among.astype(float))


def mean(values: Float[np.ndarray, " cases"], weights: Weights) -> Float[np.ndarray, " resamples"]:
    """Weighted mean of the cases that have a value; those without one are NaN, and so is the mean of none."""
    known = np.isfinite(values)
    return _ratio(weights @ np.where(known, values, 0.0), weights @ known.astype(float))


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
    return quotient


def estimate(
    statistic: Statistic,
    groups: Shaped[np.ndarray, " cases"],
    classes: Bool[np.ndarray, " cases"] | Int[np.ndarray, " cases"] | None = None,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    models: int = 1,
) -> Estimate:
    """A score with its 95 % bias-corrected and accelerated bootstrap interval, drawing whole patients.

    Resamples in which the score does not exist (a class is absent) are left out. The same seed and patients give the
    same resamples for every statistic, so differences between scores are paired.

    Args:
        statistic: Case weights (resamples, cases) to one value per resample.
        groups: Patient of each case.
        classes: Class of each case: below 2 patients in any class there is no interval. None for scores without
            classes: below 2 patients in all.
        seed: Of the resampling.
        resamples: Number of draws, of one model.
        models: That predicted the cases: the folds of a cross-validation, whose interval is wider (`widening`).

    Reference:
        Efron, Better bootstrap confidence intervals, JASA 1987.
    """
    if len(groups) == 0:
        return Estimate(value=None, why="no cases")
    names, patient = np.unique(groups, return_inverse=True)
    value = float(_values(statistic, np.ones((1, len(names))), patient)[0])
    if np.isnan(value):
        return Estimate(value=None, why="no case counts" if classes is None else "a class is absent")
    if why := _too_few(patient, classes):
        return Estimate(value=value, why=why)
    resamples *= farther(models)
    draws = randomness.generator(seed, "bootstrap").multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=resamples
    )
    replicates = _values(statistic, draws, patient)
    replicates = np.sort(replicates[~np.isnan(replicates)])
    if len(replicates) < resamples / 2:
        what = "a case that counts" if classes is None else "a class"
        return Estimate(value=value, why=f"most resamples of the patients lack {what}")
    if replicates[0] == replicates[-1]:
        return Estimate(value=value, why=UNMOVED)
    without_one = _values(statistic, 1 - np.eye(len(names)), patient)
    low, high = _accelerated(value, replicates, without_one[~np.isnan(without_one)], widening(models))
    return Estimate(value=value, low=low, high=high)


def widening(models: int) -> float:
    """What a standard error over patients is multiplied by where they were tested by so many models in turn.

    In a cross-validation each fold's cases taught the models that test the others, so that the folds' scores move
    together. Where the labels tell nothing and a model follows the classes' differences linearly, those of two of K
    folds correlate by up to 1 / (K - 1), a fold's cases over those that one model learnt from, and the variance of
    their mean is up to twice that of independent folds. Where labels tell much they hardly correlate, and twice is too
    much. One model on a fixed test set gives 1.

    Reference:
        For the problem: Nadeau and Bengio, Inference for the generalization error, Machine Learning 2003 (whose
        correlation is 1 / K); Bengio and Grandvalet, JMLR 2004 (no estimate of it is unbiased). The factor is held
        against simulated studies in `tests/tasks/test_statistics.py` and `tests/tasks/test_classify.py`.
    """
    return 2**0.5 if models > 1 else 1.0


def farther(models: int) -> int:
    """Times as many resamples: the ends of a widened interval lie farther out among them."""
    return FARTHER if models > 1 else 1


def _too_few(patient: np.ndarray, classes: np.ndarray | None) -> str:
    """Why there are too few patients for an interval; empty where there are enough."""
    if classes is None:
        number = len(np.unique(patient))
        return "" if number > 1 else f"{number} patient, 2 needed"
    if classes.dtype == bool:
        per_class = [len(np.unique(patient[classes])), len(np.unique(patient[~classes]))]
        told = f"{per_class[0]} patients are positive and {per_class[1]} negative"
    else:
        per_class = [len(np.unique(patient[classes == number])) for number in np.unique(classes)]
        told = f"{min(per_class)} patients are of one class"
    return "" if min(per_class) > 1 else f"{told}, 2 needed"


def ratio(
    above: Float[np.ndarray, " cases"], below: Float[np.ndarray, " cases"], weights: Weights
) -> Float[np.ndarray, " resamples"]:
    """Weighted sum of one number over that of another (lesions found over lesions); NaN where there is none."""
    return _ratio(weights @ above, weights @ below)


def mean_over_patients(values: Float[np.ndarray, " cases"], patients: Sequence[str | None], *, seed: int) -> Estimate:
    """Mean of the cases that have a value, with its interval where every one of them has a known patient.

    Args:
        values: One for each case, NaN where there is none.
        patients: Of each case.
        seed: Of the resampling; values that are compared share it.
    """
    known = np.isfinite(values)
    if any(patient is None for patient, has in zip(patients, known, strict=True) if has):
        return Estimate(value=float(values[known].mean()), why="patients unknown")
    groups = np.array([str(patient) for patient in patients])[known]
    return estimate(partial(mean, values[known]), groups, seed=seed)


def _values(statistic: Statistic, draws: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """The statistic for each row of patient weights, in blocks that bound the memory."""
    blocks = np.array_split(draws, max(1, draws.shape[0] * len(patient) // _BLOCK))
    return np.concatenate([statistic(block[:, patient].astype(float)) for block in blocks])


def _accelerated(value: float, replicates: np.ndarray, without_one: np.ndarray, wider: float) -> tuple[float, float]:
    """BCa end points from sorted bootstrap replicates and the leave-one-patient-out values, so many times as far."""
    from scipy.special import ndtr, ndtri

    below = (np.sum(replicates < value) + 0.5 * np.sum(replicates == value)) / len(replicates)
    bias = ndtri(np.clip(below, 1 / len(replicates), 1 - 1 / len(replicates)))
    influence = without_one.mean() - without_one
    spread = np.sum(influence**2)
    acceleration = np.sum(influence**3) / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + wider * ndtri(np.array([0.025, 0.975]))
    low, high = np.quantile(replicates, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)
