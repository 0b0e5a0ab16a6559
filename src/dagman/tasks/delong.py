"""DeLong's test of two AUCs on the same cases."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dagman.tasks.statistics import widening


class DeLong(NamedTuple):
    """Two AUCs, their difference and how sure it is."""

    first: float
    second: float
    standard_error: float
    """Of the difference."""
    p: float
    """Two-sided; 1 where the two score every pair alike."""


def compare(
    first: Float[np.ndarray, " cases"],
    second: Float[np.ndarray, " cases"],
    positive: Bool[np.ndarray, " cases"],
    strata: Int[np.ndarray, " cases"] | None = None,
    models: int = 1,
) -> DeLong | None:
    """DeLong's test; None where a stratum that holds pairs has fewer than two cases of a class, or nothing varies.

    It takes cases as independent. Where a patient has several, its p is too small: the bootstrap over patients stands.

    Args:
        first: Scores, higher is more likely positive.
        second: Other scores of the same cases.
        positive: Truth.
        strata: Only pairs within one stratum count (folds): the AUC is the mean over strata weighted by their pairs,
            and the variances add, as no two strata test the same case.
        models: That gave the scores, the folds of a cross-validation: the standard error is widened
            (`statistics.widening`).

    Reference:
        DeLong et al., Biometrics 1988; mid-ranks as Sun and Xu, IEEE Signal Processing Letters 2014.
    """
    from scipy.special import ndtr

    strata = np.zeros(len(positive), dtype=int) if strata is None else strata
    inside = [(strata == number) for number in np.unique(strata)]
    inside = [rows for rows in inside if positive[rows].any() and not positive[rows].all()]
    if not inside or min(min(positive[rows].sum(), (~positive[rows]).sum()) for rows in inside) < 2:
        return None
    pairs = np.array([float(positive[rows].sum()) * float((~positive[rows]).sum()) for rows in inside])
    share = pairs / pairs.sum()
    aucs, variance = np.zeros(2), 0.0
    for weight, rows in zip(share, inside, strict=True):
        found, covariance = _one(np.stack([first[rows], second[rows]]), positive[rows])
        aucs += weight * found
        variance += weight**2 * float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    error = widening(models) * float(np.sqrt(max(variance, 0.0)))
    apart = float(aucs[0] - aucs[1])
    if error < 1e-12 < abs(apart):
        return None  # both separate their classes so plainly that no variance can be told from these cases
    p = 1.0 if error < 1e-12 else 2 * float(ndtr(-abs(apart) / error))
    return DeLong(float(aucs[0]), float(aucs[1]), error, p)


def _one(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs and their covariance matrix within one stratum."""
    from scipy.stats import rankdata

    up, down = scores[:, positive], scores[:, ~positive]
    num_up, num_down = up.shape[1], down.shape[1]
    among_all = rankdata(np.concatenate([up, down], axis=1), axis=1)
    beaten_by_up = (among_all[:, :num_up] - rankdata(up, axis=1)) / num_down
    beating_down = 1 - (among_all[:, num_up:] - rankdata(down, axis=1)) / num_up
    covariance = np.cov(beaten_by_up) / num_up + np.cov(beating_down) / num_down
    return beaten_by_up.mean(axis=1), covariance
