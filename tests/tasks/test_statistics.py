"""Scores against scikit-learn, intervals against simulated studies."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import recall_score, roc_auc_score

from dagman.tasks import statistics


def ones(cases):
    return np.ones((1, cases))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 10**6))
def test_auc_equals_scikit_learn_with_ties_and_case_weights(cases, levels, seed):
    rng = np.random.default_rng(seed)
    positive = np.r_[True, False, rng.random(cases - 2) < 0.4]
    scores = rng.integers(0, levels, cases) / levels
    weights = rng.integers(0, 3, (4, cases)) + 0.5
    found = statistics.auc(scores, positive, weights)
    wanted = [roc_auc_score(positive, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_auc_within_folds_is_the_mean_of_the_folds_weighted_by_pairs():
    rng = np.random.default_rng(0)
    fold, positive, scores = rng.integers(0, 3, 90), rng.random(90) < 0.3, rng.random(90)
    parts = [fold == number for number in range(3)]
    aucs = [roc_auc_score(positive[part], scores[part]) for part in parts]
    pairs = [positive[part].sum() * (~positive[part]).sum() for part in parts]
    found = statistics.auc(scores, positive, ones(90), fold)
    assert found[0] == pytest.approx(np.average(aucs, weights=pairs), abs=1e-9)


def test_constant_scores_per_fold_are_worth_exactly_one_half():
    fold = np.array([0, 0, 0, 1, 1, 1])
    positive = np.array([True, False, False, True, True, False])
    prevalence_of_the_training_part = np.array([0.7, 0.7, 0.7, 0.3, 0.3, 0.3])
    assert statistics.auc(prevalence_of_the_training_part, positive, ones(6), fold)[0] == 0.5


def test_share_equals_recall():
    rng = np.random.default_rng(1)
    positive, called = rng.random(50) < 0.5, rng.random(50) < 0.5
    assert statistics.share(called, positive, ones(50))[0] == pytest.approx(recall_score(positive, called), abs=1e-9)
    found = statistics.share(~called, ~positive, ones(50))[0]
    assert found == pytest.approx(recall_score(positive, called, pos_label=False), abs=1e-9)


def estimate_auc(scores, positive, groups, seed=0, resamples=300):
    statistic = partial(statistics.auc, scores, positive)
    return statistics.estimate(statistic, groups, positive, seed=seed, resamples=resamples)


@pytest.mark.parametrize("cases", [0, 1, 2])
def test_without_two_classes_there_is_no_score(cases):
    found = estimate_auc(np.zeros(cases), np.ones(cases, bool), np.arange(cases))
    assert (found.value, found.low, str(found)[:3]) == (None, None, "n/a")


def test_without_two_patients_in_a_class_there_is_no_interval():
    positive = np.array([True, True, False, False, False])
    found = estimate_auc(np.arange(5.0), positive, np.array(["a", "a", "b", "c", "d"]))
    assert found.value == 0.0
    assert found.low is None
    assert "1 patients are positive" in found.why


def test_a_score_that_no_resample_changes_has_no_interval():
    positive = np.arange(20) < 8
    found = estimate_auc(positive.astype(float), positive, np.arange(20))
    assert (found.value, found.low) == (1.0, None)


def test_interval_is_the_same_for_a_seed_and_for_any_order_of_rows():
    rng = np.random.default_rng(3)
    groups, positive = rng.integers(0, 25, 60), rng.random(60) < 0.5
    scores = rng.random(60) + 0.3 * positive
    first, again = (estimate_auc(scores, positive, groups) for _ in range(2))
    order = rng.permutation(60)
    shuffled = estimate_auc(scores[order], positive[order], groups[order])
    assert first == again
    assert (shuffled.low, shuffled.high) == pytest.approx((first.low, first.high), abs=1e-12)
    assert estimate_auc(scores, positive, groups, seed=1) != first


def test_interval_is_wider_when_the_cases_come_from_fewer_patients():
    rng = np.random.default_rng(4)
    patient = np.repeat(np.arange(20), 10)
    positive = patient % 2 == 0
    scores = positive + 1.5 * rng.normal(size=20)[patient]
    by_patient = estimate_auc(scores, positive, patient)
    by_case = estimate_auc(scores, positive, np.arange(200))
    assert by_patient.high - by_patient.low > 1.5 * (by_case.high - by_case.low)


def test_intervals_cover_the_truth_in_93_to_97_percent_of_simulated_studies():
    """1000 studies, 70 patients of 1-3 cases each with a patient's own effect; binormal AUC 0.75."""
    rng, truth, studies = np.random.default_rng(5), 0.75, 1000
    hits = 0
    for _ in range(studies):
        patient = np.repeat(np.arange(70), rng.integers(1, 4, 70))
        positive = rng.random(len(patient)) < 0.4
        noise = np.sqrt(0.3) * rng.normal(size=70)[patient] + np.sqrt(0.7) * rng.normal(size=len(patient))
        found = estimate_auc(np.sqrt(2) * norm.ppf(truth) * positive + noise, positive, patient)
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / studies <= 0.97


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_scores_of_folds_that_learnt_from_each_other_vary_together(folds):
    """Differences between the classes that are chance, in each fold: a model follows those of all other folds."""
    rng = np.random.default_rng(0)
    found = rng.normal(size=(4000, folds, 64))
    learnt = found.sum(axis=1, keepdims=True) - found
    scores = (found * learnt).sum(axis=2) / np.linalg.norm(learnt, axis=2)
    apart = scores.mean(axis=1).var() / (scores.var() / folds)
    assert apart == pytest.approx(statistics.widening(folds) ** 2, rel=0.1)


def test_folds_widen_an_interval_and_change_no_score():
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.5
    statistic = partial(statistics.auc, positive + rng.normal(size=300), positive)
    one, three = (statistics.estimate(statistic, np.arange(300), positive, seed=0, models=n) for n in (1, 3))
    assert (three.high - three.low) / (one.high - one.low) == pytest.approx(statistics.widening(3), rel=0.1)
    assert three.value == one.value


def test_a_mean_leaves_out_what_has_no_value_and_counts_weights():
    values = np.array([1.0, np.nan, 4.0])
    assert statistics.mean(values, np.array([[1.0, 5.0, 1.0], [2.0, 0.0, 1.0], [0.0, 1.0, 0.0]])) == pytest.approx(
        [2.5, 2.0, np.nan], nan_ok=True
    )


def test_the_interval_of_a_mean_holds_the_truth_and_draws_patients():
    rng = np.random.default_rng(0)
    held = 0
    for study in range(200):
        patients = [f"p{number // 2}" for number in range(60)]
        values = np.repeat(rng.normal(1.0, 1.0, 30), 2) + 0.1 * rng.normal(size=60)
        found = statistics.mean_over_patients(values, patients, seed=study)
        held += found.low <= 1.0 <= found.high
    assert 0.9 < held / 200 < 0.985, "cases in place of patients would hold it in about 83 %"


@pytest.mark.parametrize(
    ("patients", "why"), [(["p", "p"], "1 patient, 2 needed"), (["p", None], "patients unknown"), ([], "no cases")]
)
def test_a_mean_without_enough_patients_has_no_interval(patients, why):
    found = statistics.mean_over_patients(np.ones(len(patients)), patients, seed=0)
    assert (found.value, found.low, found.why) == (1.0 if patients else None, None, why)
    nothing = statistics.mean_over_patients(np.full(len(patients), np.nan), patients, seed=0)
    assert (nothing.value, nothing.why) == (None, "no cases")
