"""The probe finds what is there, nothing where nothing is, and never sees a patient twice."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dagman.errors import DagmanError, ExitCode
from dagman.tasks import classify, folds
from dagman.tasks.table import Table


def make(features, positive, patients=None):
    cases = len(features)
    return Table(
        case_ids=tuple(f"case_{index:04d}" for index in range(cases)),
        patients=tuple(f"p{patient}" for patient in (range(cases) if patients is None else patients)),
        labels=tuple("malignant" if value else "benign" for value in positive),
        features=np.asarray(features, dtype=np.float32),
    )


def planted(cases=90, width=12, signal=2.0, seed=0):
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.arange(cases // 2), 2)
    positive = rng.random(cases) < 0.4
    features = rng.normal(size=(cases, width)) * 10.0 ** rng.integers(-3, 4, width)
    features[:, 3] += signal * positive * features[:, 3].std()
    return make(features, positive, patients)


@pytest.fixture(scope="module")
def result():
    return classify.probe(planted(), positive="malignant")


def test_a_planted_signal_is_found(result):
    assert result.auc().low > 0.75
    assert result.balanced_accuracy().value > 0.7
    assert 0.6 < result.sensitivity().value <= 1
    assert 0.6 < result.specificity().value <= 1


def test_auc_of_each_fold_is_scikit_learns(result):
    wanted = [
        roc_auc_score(result.positive[result.fold == number], result.probability[result.fold == number])
        for number in range(3)
    ]
    np.testing.assert_allclose(result.fold_auc(), wanted, atol=1e-9)
    assert min(wanted) <= result.auc().value <= max(wanted)


def test_random_labels_are_worth_one_half_within_the_interval():
    """A protocol that chose anything on test rows would push these AUCs above 0.5.

    The intervals resample patients and do not refit, so under random labels they hold 0.5 less often than 95 %.
    """
    inside, values = 0, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = make(rng.normal(size=(60, 20)), rng.random(60) < 0.5, np.repeat(np.arange(30), 2))
        auc = classify.probe(table, positive="malignant", seed=seed).auc()
        values.append(auc.value)
        inside += auc.low <= 0.5 <= auc.high
    assert inside >= 15
    assert abs(np.mean(values) - 0.5) < 0.05


def test_features_that_tell_the_patient_do_not_help_when_patients_are_kept_together():
    """Each patient has its own label and a fingerprint: perfect by case, worthless by patient."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    positive = (rng.random(40) < 0.5)[patients]
    fingerprint = rng.normal(size=(40, 60))[patients] + 0.05 * rng.normal(size=(200, 60))
    table = make(fingerprint, positive, patients)
    assert classify.probe(table, positive="malignant", group_by="case").auc().value > 0.95
    assert classify.probe(table, positive="malignant").auc().value < 0.75


@settings(max_examples=200, deadline=None)
@given(st.integers(6, 60), st.integers(0, 10**6), st.integers(2, 5))
def test_no_patient_stands_in_two_folds(patients, seed, number):
    rng = np.random.default_rng(seed)
    groups = np.repeat(rng.permutation(patients), rng.integers(1, 6, patients))
    positive = rng.random(len(groups)) < rng.uniform(0.1, 0.9)
    try:
        fold = folds.fold_plan(positive, groups, folds=number, seed=seed)
    except DagmanError as error:
        assert error.code == "FOLDS"  # noqa: PT017
        return
    for patient in range(patients):
        assert len(set(fold[groups == patient])) == 1
    for part in range(number):
        assert set(positive[fold == part]) == {True, False}


def test_a_table_like_lidc_is_split_by_patient_and_evenly():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(1010), rng.integers(1, 5, 1010))
    positive = rng.random(len(groups)) < 0.3
    fold = folds.fold_plan(positive, groups, folds=3, seed=0)
    assert all(len(set(fold[groups == patient])) == 1 for patient in range(1010))
    shares = [positive[fold == number].mean() for number in range(3)]
    assert np.ptp(shares) < 0.03
    assert np.ptp(np.bincount(fold)) < 0.05 * len(groups)


def test_rows_of_other_folds_and_labels_of_the_same_fold_do_not_touch_a_prediction():
    table = planted()
    positive = np.array([label == "malignant" for label in table.labels])
    groups = np.array(table.patients)
    features = table.features.astype(float)
    fold = folds.fold_plan(positive, groups, folds=3, seed=0)
    probability, _ = classify.cross_validate(features, positive, groups, fold, seed=0)
    test = np.flatnonzero(fold == 1)
    changed, flipped = features.copy(), positive.copy()
    changed[test[1:]] = 1e3
    flipped[test[1:]] = ~flipped[test[1:]]
    again, probes = classify.cross_validate(changed, flipped, groups, fold, seed=0)
    assert again[test[0]] == probability[test[0]]
    assert 0 < probes[1].threshold < 1


def test_order_of_rows_changes_nothing_and_order_of_features_next_to_nothing(result):
    table = planted()
    rng = np.random.default_rng(1)
    rows, columns = rng.permutation(90), rng.permutation(12)
    shuffled = Table(
        case_ids=tuple(table.case_ids[row] for row in rows),
        patients=tuple(table.patients[row] for row in rows),
        labels=tuple(table.labels[row] for row in rows),
        features=table.features[rows],
    )
    again = classify.probe(shuffled, positive="malignant")
    np.testing.assert_array_equal(again.probability, result.probability)
    turned = classify.probe(dataclasses.replace(table, features=table.features[:, columns]), positive="malignant")
    np.testing.assert_allclose(turned.probability, result.probability, atol=1e-4)
    assert turned.auc().value == pytest.approx(result.auc().value, abs=1e-3)


def test_seed_decides_the_folds(result):
    assert np.array_equal(classify.probe(planted(), positive="malignant").fold, result.fold)
    assert not np.array_equal(classify.probe(planted(), positive="malignant", seed=1).fold, result.fold)


def test_more_features_than_cases_separable_and_constant_columns_converge_without_warnings():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(40, 300))
    features[:, :5] = 7.0
    positive = np.arange(40) % 2 == 0
    features[:, 9:60] = positive[:, None] * 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = classify.probe(make(features, positive), positive="malignant")
    assert found.auc().value == 1
    assert found.auc().low is None


@pytest.mark.parametrize(
    ("table", "options", "code", "says"),
    [
        (make(np.zeros((20, 3)), np.arange(20) < 9), {}, "FEATURES", "all 3 features are the same for all 20"),
        (make(np.full((20, 3), np.nan), np.arange(20) < 9), {}, "FEATURES", "20 cases with NaN"),
        (planted(), {"folds": 1}, "FOLDS", "1 folds"),
        (make(np.eye(9), np.arange(9) < 2), {}, "FOLDS", "2 with positive and 7 with negative"),
        (make(np.eye(4), np.arange(4) < 2), {"folds": 2}, "FOLDS", "training part of a fold"),
        (make(np.eye(9), np.arange(9) < 4, [0] * 9), {}, "FOLDS", "1 patients"),
        (make(np.eye(9), np.zeros(9)), {}, "LABEL", "1 classes over 9 cases"),
        (make(np.zeros((0, 2)), []), {}, "LABEL", "0 classes over 0 cases"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(table, options, code, says, monkeypatch):
    monkeypatch.setattr(classify, "fit", None)
    with pytest.raises(DagmanError, match=f"E-{code}.*{says}"):
        classify.probe(table, positive="malignant", **options)


def test_without_patients_it_is_refused_unless_said_and_then_stamped(tmp_path):
    table = dataclasses.replace(planted(), patients=(None,) * 90)
    with pytest.raises(DagmanError, match="90 of 90 cases have no patient") as caught:
        classify.probe(table, positive="malignant")
    assert caught.value.exit_code == ExitCode.REFUSED
    stamped = classify.summary(classify.probe(table, positive="malignant", group_by="case"))
    assert stamped["patients"] is None
    assert "not grouped by patient" in stamped["warning"]


def test_written_predictions_and_result_give_the_scores_again(result, tmp_path):
    predictions, summary = classify.write(result, tmp_path)
    rows = np.genfromtxt(predictions, delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert rows.dtype.names == ("case_id", "patient", "fold", "label", "probability", "predicted")
    np.testing.assert_array_equal(rows["probability"], result.probability)
    np.testing.assert_array_equal(rows["label"] == "malignant", result.positive)
    found = json.loads(summary.read_text())
    assert (found["cases"], found["patients"], found["positive"]) == (90, 45, int(result.positive.sum()))
    assert found["auc"] == dataclasses.asdict(result.auc())
    assert found["warning"] is None


def test_feature_sets_side_by_side_on_the_same_folds(result):
    noise = dataclasses.replace(planted(), features=np.random.default_rng(9).normal(size=(90, 4)).astype(np.float32))
    rows = classify.beside({"signal": result, "noise": classify.probe(noise, positive="malignant")})
    assert [row["features"] for row in rows] == ["signal", "noise"]
    assert rows[0]["first_minus_this"] is None
    difference = rows[1]["first_minus_this"]
    assert difference.value == pytest.approx(rows[0]["auc"].value - rows[1]["auc"].value)
    assert 0 < difference.low < difference.value < difference.high
    same = classify.beside({"a": result, "b": dataclasses.replace(result)})
    assert same[1]["first_minus_this"].value == 0
    with pytest.raises(DagmanError, match="E-COMPARE"):
        classify.beside({"a": result, "b": classify.probe(noise, positive="malignant", seed=5)})
