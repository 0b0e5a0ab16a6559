"""DeLong's test of two AUCs on the same cases, with the cases of a patient taken together."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

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
    *,
    patients: Shaped[np.ndarray, " cases"] | None = None,
) -> DeLong | None:
    """DeLong's test; None where a stratum that holds pairs has fewer than two patients of a class, or nothing varies.

    Patients are taken as independent, not their cases.

    Args:
        first: Scores, higher is more likely positive.
        second: Other scores of the same cases.
        positive: Truth.
        strata: Only pairs within one stratum count (folds): the AUC is the mean over strata weighted by their pairs,
            and the variances add, as no two strata test the same patient.
        models: That gave the scores, the folds of a cross-validation: the standard error is widened
            (`statistics.widening`).
        patients: Of each case; each case is its own where None.

    Reference:
        DeLong et al., Biometrics 1988; mid-ranks as Sun and Xu, IEEE Signal Processing Letters 2014; patients with
        several cases as Obuchowski, Nonparametric analysis of clustered ROC curve data, Biometrics 1997.
    """
    from scipy.special import ndtr

    strata = np.zeros(len(positive), dtype=int) if strata is None else strata
    patients = np.arange(len(positive)) if patients is None else patients
    inside = [(strata == number) for number in np.unique(strata)]
    inside = [rows for rows in inside if positive[rows].any() and not positive[rows].all()]
    of_a_class = [len(np.unique(patients[rows & one])) for rows in inside for one in (positive, ~positive)]
    if min(of_a_class, default=0) < 2:
        return None
    pairs = np.array([float(positive[rows].sum()) * float((~positive[rows]).sum()) for rows in inside])
    share = pairs / pairs.sum()
    aucs, variance = np.zeros(2), 0.0
    for weight, rows in zip(share, inside, strict=True):
        found, of_difference = _one(np.stack([first[rows], second[rows]]), positive[rows], patients[rows])
        aucs += weight * found
        variance += weight**2 * of_difference
    error = widening(models) * float(np.sqrt(max(variance, 0.0)))
    apart = float(aucs[0] - aucs[1])
    if error < 1e-12 < abs(apart):
        return None  # both separate their classes so plainly that no variance can be told from these cases
    p = 1.0 if error < 1e-12 else 2 * float(ndtr(-abs(apart) / error))
    return DeLong(float(aucs[0]), float(aucs[1]), error, p)


def _one(scores: np.ndarray, positive: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, float]:
    """AUCs and the variance of their difference within one stratum."""
    from scipy.stats import rankdata

    up, down = scores[:, positive], scores[:, ~positive]
    num_up, num_down = up.shape[1], down.shape[1]
    among_all = rankdata(np.concatenate([up, down], axis=1), axis=1)
    beaten_by_up = (among_all[:, :num_up] - rankdata(up, axis=1)) / num_down
    beating_down = 1 - (among_all[:, num_up:] - rankdata(down, axis=1)) / num_up
    people, person = np.unique(patients, return_inverse=True)
    of_up, with_up = _per_patient(beaten_by_up, person[positive], len(people))
    of_down, with_down = _per_patient(beating_down, person[~positive], len(people))
    variance = with_up / (with_up - 1) * of_up @ of_up + with_down / (with_down - 1) * of_down @ of_down
    # Not 0 where patients have cases of both classes, whose pairs a patient's high scores move both ways.
    variance += 2 * len(people) / (len(people) - 1) * of_up @ of_down
    return beaten_by_up.mean(axis=1), float(variance)


def _per_patient(placements: np.ndarray, person: np.ndarray, people: int) -> tuple[np.ndarray, int]:
    """What each patient's cases of one class add to the difference of the AUCs; how many patients have such cases."""
    gained = placements[0] - placements[1]
    sums = np.bincount(person, weights=gained - gained.mean(), minlength=people)
    return sums / len(gained), len(np.unique(person))
