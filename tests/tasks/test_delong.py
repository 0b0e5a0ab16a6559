"""DeLong's test against other implementations and against what it must be by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from dagman.tasks import delong


def drawn(seed=7, cases=60):
    rng = np.random.default_rng(seed)
    positive = rng.random(cases) < 0.4
    first = np.round(positive + rng.normal(size=cases), 1)
    second = np.round(0.5 * positive + rng.normal(size=cases), 1)
    return first, second, positive


def test_it_gives_the_numbers_of_mlstatkit():
    """Computed once by MLstatkit 0.1.91, `Delong_test(positive, first, second)`, on the same draws, with ties."""
    found = delong.compare(*drawn())
    assert found.first == pytest.approx(0.7211428571428571, abs=1e-12)
    assert found.second == pytest.approx(0.6662857142857144, abs=1e-12)
    assert found.standard_error**2 == pytest.approx(0.008152329731892756, abs=1e-12)
    assert found.p == pytest.approx(0.5434764206059357, abs=1e-12)


def test_areas_are_scikit_learns():
    first, second, positive = drawn(3, 200)
    found = delong.compare(first, second, positive)
    assert found.first == pytest.approx(roc_auc_score(positive, first), abs=1e-12)
    assert found.second == pytest.approx(roc_auc_score(positive, second), abs=1e-12)


def test_equal_scores_differ_by_nothing():
    first, _, positive = drawn()
    assert delong.compare(first, first * 2 + 1, positive) == pytest.approx((0.721142857, 0.721142857, 0.0, 1.0))


def test_folds_are_weighted_by_their_pairs_and_their_variances_add_doubled_for_models_in_turn():
    first, second, positive = drawn(1, 90)
    fold = np.arange(90) % 3
    whole = delong.compare(first, second, positive, fold, models=3)
    parts = [delong.compare(first[fold == k], second[fold == k], positive[fold == k]) for k in range(3)]
    pairs = np.array([positive[fold == k].sum() * (~positive[fold == k]).sum() for k in range(3)])
    share = pairs / pairs.sum()
    assert whole.first == pytest.approx(np.sum(share * [part.first for part in parts]))
    apart = np.sum(share**2 * [part.standard_error**2 for part in parts])
    assert whole.standard_error**2 == pytest.approx(2 * apart)


def test_its_p_is_uniform_where_nothing_differs():
    """At level .05, it says so in about one of twenty of 300 studies."""
    below = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        positive = rng.random(80) < 0.5
        signal = positive + rng.normal(size=80)
        noise = rng.normal(size=(2, 80))
        below += delong.compare(signal + noise[0], signal + noise[1], positive).p < 0.05
    assert 5 <= below <= 27


@pytest.mark.parametrize("positive", [[True] * 4, [False, True, True, True], [False] * 4])
def test_too_few_of_a_class_give_nothing(positive):
    scores = np.arange(4.0)
    assert delong.compare(scores, scores[::-1], np.array(positive)) is None
