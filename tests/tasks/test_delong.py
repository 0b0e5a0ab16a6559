"""DeLong's test against other implementations and against what it must be by hand."""

import numpy as np
import pytest
from scipy.stats import binom
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


def by_pairs(scores, positive, person):
    """Variance of the difference as Obuchowski writes it, pair by pair and patient by patient."""
    up, down = np.flatnonzero(positive), np.flatnonzero(~positive)
    wins = [(score[up, None] > score[down]) + 0.5 * (score[up, None] == score[down]) for score in scores]
    gained = wins[0] - wins[1]
    apart = gained.mean()
    sums = []
    for one in np.unique(person):
        mine, others = person[up] == one, person[down] == one
        sums.append(
            (
                gained.mean(axis=1)[mine].sum() - mine.sum() * apart,
                gained.mean(axis=0)[others].sum() - others.sum() * apart,
                mine.any(),
                others.any(),
            )
        )
    of_up, of_down, has_up, has_down = np.array(sums, dtype=float).T
    total, with_up, with_down = len(sums), has_up.sum(), has_down.sum()
    return (
        with_up / (with_up - 1) / len(up) ** 2 * np.sum(of_up**2)
        + with_down / (with_down - 1) / len(down) ** 2 * np.sum(of_down**2)
        + 2 * total / (total - 1) / (len(up) * len(down)) * np.sum(of_up * of_down)
    )


def test_one_case_a_patient_is_delong_as_it_was():
    """The variance of DeLong's paper, from the covariance of placements of independent cases."""
    first, second, positive = drawn()
    names = np.array([f"p{number * 7 % 60}" for number in range(60)])
    found = delong.compare(first, second, positive, patients=names)
    assert found == pytest.approx(delong.compare(first, second, positive), abs=1e-12)
    wins = [
        (score[positive][:, None] > score[~positive]) + 0.5 * (score[positive][:, None] == score[~positive])
        for score in (first, second)
    ]
    by_up, by_down = (np.cov([one.mean(axis=axis) for one in wins]) for axis in (1, 0))
    covariance = by_up / positive.sum() + by_down / (~positive).sum()
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert found.standard_error**2 == pytest.approx(variance, abs=1e-12)


def test_cases_of_a_patient_are_taken_together_as_obuchowski_does():
    """Patients with one case, with several of one class, and of both."""
    first, second, positive = drawn(5, 90)
    person = np.random.default_rng(5).integers(40, size=90)
    assert any(len(np.unique(positive[person == one])) == 2 for one in range(40))
    found = delong.compare(first, second, positive, patients=person)
    assert found.standard_error**2 == pytest.approx(by_pairs((first, second), positive, person), abs=1e-12)
    assert (found.first, found.second) == delong.compare(first, second, positive)[:2]


def test_a_case_given_many_times_is_no_more_certain():
    first, second, positive = drawn()
    once = delong.compare(first, second, positive)
    five = delong.compare(*(np.repeat(values, 5) for values in drawn()), patients=np.repeat(np.arange(60), 5))
    assert five == pytest.approx(once, abs=1e-12)


def found_in(studies, patients, *, mixed):
    """How many find a difference at .05 where there is none: patients taken together, and cases as independent."""
    together = apart = 0
    for seed in range(studies):
        rng = np.random.default_rng(seed)
        person = np.repeat(np.arange(patients), 4)
        positive = rng.random(len(person)) < 0.5 if mixed else person % 2 == 0
        of_the_patient = rng.normal(size=(2, patients))[:, person]
        scores = positive + rng.normal(size=len(person)) + of_the_patient + 0.5 * rng.normal(size=(2, len(person)))
        together += delong.compare(*scores, positive, patients=person).p < 0.05
        apart += delong.compare(*scores, positive).p < 0.05
    return together, apart


@pytest.mark.parametrize("mixed", [False, True])
def test_its_p_is_uniform_where_cases_of_a_patient_are_alike(mixed):
    """Of patients with cases of one class, and of both."""
    together, apart = found_in(1000, 80, mixed=mixed)
    low, high = binom.interval(0.99, 1000, 0.05)
    assert low <= together <= high
    if not mixed:
        assert apart > 200, "cases are not independent"


def test_of_ten_patients_its_p_is_too_small():
    """As of every variance that is estimated from few, and far less than with cases as independent."""
    together, apart = found_in(1000, 10, mixed=False)
    assert 60 < together < 100 < 250 < apart


def test_too_few_patients_of_a_class_give_nothing():
    first, second, positive = drawn()
    assert delong.compare(first, second, positive, patients=np.where(positive, 0, np.arange(60) + 1)) is None
