"""ROC curves: the area below is the AUC that the legend says, and what has no curve is still named."""

import numpy as np
import pytest
from matplotlib.legend import Legend

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
    area = np.trapezoid(np.mean(list(roc._mean_curves(found).values()), axis=0), roc.GRID)
    assert area == pytest.approx(found.auc().value, abs=0.01)


def words(runs):
    """What a figure writes: its legends' titles and entries, and how many curves it draws."""
    figure = roc.drawn(runs)
    [axes] = figure.axes
    legends = [child for child in axes.get_children() if isinstance(child, Legend)]
    found = {legend.get_title().get_text(): [text.get_text() for text in legend.get_texts()] for legend in legends}
    return found, len(axes.lines) - 1  # the diagonal


def test_each_of_several_classes_has_a_curve_and_a_name():
    one, other = made(3), made(3, seed=1)
    found, curves = words({"one": one, "other": other})
    mean = "mean of the classes, AUC (95 % interval)"
    assert found == {mean: ["one", "other"], "against the rest": ["a", "b", "c"]}
    assert curves == 2 * (3 + 1)


@pytest.mark.parametrize(("fold", "told", "curves"), [(None, "; pale: folds", 4), (np.zeros_like, "", 1)])
def test_folds_are_told_of_where_they_are_drawn(fold, told, curves):
    assert words({"one": made(fold=fold)}) == ({"AUC (95 % interval)" + told: ["one"]}, curves)


def test_a_run_without_a_curve_is_named_all_the_same():
    folds_of_one_class = made(fold=lambda labels: labels)
    assert folds_of_one_class.auc().value is None
    assert roc.png({f"one: {folds_of_one_class.auc()}": folds_of_one_class}).startswith(b"\x89PNG")
    of_three = made(3, fold=lambda labels: labels)
    assert words({"one": of_three})[0] == {"mean of the classes, AUC (95 % interval)": ["one"]}
