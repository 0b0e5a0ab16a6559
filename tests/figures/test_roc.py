"""ROC curves: the area below is the AUC that the legend says, and what has no curve is still named."""

import numpy as np
import pytest

from dagman.figures import roc
from dagman.tasks.predictions import Predictions


def made(classes=2, fold=None, cases=240, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, cases)
    scores = rng.normal(size=(cases, classes))
    scores[np.arange(cases), labels] += 1.2
    likely = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return Predictions(
        case_ids=tuple(f"c{number:03d}" for number in range(cases)),
        groups=np.arange(cases),
        labels=labels,
        names=tuple("abc"[:classes]),
        fold=rng.integers(0, 3, cases) if fold is None else fold(labels),
        probabilities=likely,
        thresholds=(0.5,) * 3,
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_the_area_is_the_auc_within_folds(classes):
    found = made(classes)
    area = np.trapezoid(np.mean(roc._mean_curves(found), axis=0), roc.GRID)
    assert area == pytest.approx(found.auc().value, abs=0.01)


def test_a_run_without_a_curve_is_named_all_the_same():
    folds_of_one_class = made(fold=lambda labels: labels)
    assert folds_of_one_class.auc().value is None
    assert roc.png({f"one: {folds_of_one_class.auc()}": folds_of_one_class}).startswith(b"\x89PNG")
