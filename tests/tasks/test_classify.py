"""The probe finds what is there, nothing where nothing is, and never sees a patient twice."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import multilabel_confusion_matrix, roc_auc_score

from dagman.errors import DagmanError, ExitCode
from dagman.tasks import classify, cohort, folds, predictions, statistics
from dagman.tasks.protocol import Protocol
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
    assert result.auc().low > 0.7
    assert statistics.estimate(result.auc_of, result.groups, result.positive, seed=0).low > 0.75, "not widened"
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
    """A protocol that chose anything on test rows would push these AUCs above 0.5; two cases a patient."""
    inside, values = 0, []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        table = make(rng.normal(size=(60, 20)), rng.random(60) < 0.5, np.repeat(np.arange(30), 2))
        auc = classify.probe(table, Protocol(seed=seed), positive="malignant").auc()
        values.append(auc.value)
        inside += auc.low <= 0.5 <= auc.high
    assert inside >= 18
    assert abs(np.mean(values) - 0.5) < 0.05


def at_random(features, seed, choose=lambda features, _: features):
    """The AUC of a whole probe in cross-validation whose labels are drawn."""
    positive = np.random.default_rng(seed).random(len(features)) < 0.5
    return classify.probe(make(choose(features, positive), positive), Protocol(seed=seed), positive="malignant").auc()


@pytest.mark.slow
def test_200_random_labellings_of_frozen_random_features_are_worth_one_half(monkeypatch):
    """The leak detector: no fewer than 94 % of the intervals hold .5, and their mean is .5."""
    monkeypatch.setattr(statistics, "FARTHER", 1)  # ends from fewer resamples, for time
    frozen = np.random.default_rng(0).normal(size=(360, 12))
    found = [at_random(frozen, seed) for seed in range(200)]
    assert sum(auc.low <= 0.5 <= auc.high for auc in found) >= 188
    values = np.array([auc.value for auc in found])
    assert abs(values.mean() - 0.5) < 3 * values.std() / 200**0.5 < 0.01, "a leak worth .01 is seen"


def test_intervals_of_a_fixed_test_set_are_not_widened_those_of_folds_and_of_their_differences_are():
    rng = np.random.default_rng(0)
    positive = np.arange(120) % 2 == 0
    table = make(rng.normal(size=(120, 6)) + 0.5 * positive[:, None], positive)
    fixed = dataclasses.replace(table, splits=("train",) * 60 + ("test",) * 60)
    for one, split, wide in ((table, False, 1.41), (fixed, True, 1.0)):
        found, other = (
            classify.probe(each, Protocol(split=split), positive="malignant")
            for each in (one, dataclasses.replace(one, features=one.features + rng.normal(size=(120, 6))))
        )
        plain = statistics.estimate(found.auc_of, found.groups, found.positive, seed=0)
        ends = found.auc()
        assert (ends.high - ends.low) / (plain.high - plain.low) == pytest.approx(wide, rel=0.12)
        plain = statistics.estimate(
            lambda w, f=found, o=other: f.auc_of(w) - o.auc_of(w), found.groups, found.positive, seed=0
        )
        for gain in (predictions.difference(found, other), predictions.difference_from_one_of(found, [other, other])):
            assert (gain.high - gain.low) / (plain.high - plain.low) == pytest.approx(wide, rel=0.12)
        assert ("1.41" in predictions.summary(found)["interval"]) == (wide > 1)


@pytest.mark.slow
def test_a_fixed_test_set_is_worth_one_half_under_200_random_labellings():
    """30 cases are learnt from. Of the intervals no fewer hold .5 than chance allows of 95 % (1 % of studies would)."""
    frozen, found = np.random.default_rng(0).normal(size=(330, 4)), []
    for seed in range(200):
        positive = np.random.default_rng(seed).random(330) < 0.5
        table = dataclasses.replace(make(frozen, positive), splits=("train",) * 30 + ("test",) * 300)
        found.append(classify.probe(table, Protocol(split=True, seed=seed), positive="malignant").auc())
    assert sum(auc.low <= 0.5 <= auc.high for auc in found) >= 182
    values = np.array([auc.value for auc in found])
    assert abs(values.mean() - 0.5) < 3 * values.std() / 200**0.5
    assert 3 * values.std() / 200**0.5 < 0.01, "a leak worth .01 is seen"


def test_a_leak_is_seen_by_its_detector():
    """Features chosen by all labels, tested ones included: the mistake that the test above is there for."""
    wide = np.random.default_rng(0).normal(size=(90, 300))

    def most_apart(features, positive):
        apart = np.abs(features[positive].mean(axis=0) - features[~positive].mean(axis=0))
        return features[:, np.argsort(apart)[-4:]]

    found = [at_random(wide, seed, most_apart) for seed in range(8)]
    assert np.mean([auc.value for auc in found]) > 0.6
    assert sum(auc.low <= 0.5 <= auc.high for auc in found) < 4


def test_features_that_tell_the_patient_do_not_help_when_patients_are_kept_together():
    """Each patient has its own label and a fingerprint: perfect by case, worthless by patient."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    positive = (rng.random(40) < 0.5)[patients]
    fingerprint = rng.normal(size=(40, 60))[patients] + 0.05 * rng.normal(size=(200, 60))
    table = make(fingerprint, positive, patients)
    assert classify.probe(table, Protocol(group_by="case"), positive="malignant").auc().value > 0.95
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


def test_rows_of_other_folds_and_labels_of_the_same_fold_do_not_touch_a_prediction(result):
    table = planted()
    cases = cohort.cohort(table, Protocol(), positive="malignant")
    (part,) = [part for part in cases.parts if part.number == 1]
    train, test = list(part.train), list(part.test)
    changed = cases.table.features.astype(float)
    changed[test[1:]] = 1e3
    inner = folds.inner_plan(cases.numbers[train], cases.groups[train], seed=0)
    again = classify.fit(changed[train], cases.numbers[train], inner)
    told = again.probabilities(changed[test[:1]])[0, 1]
    assert told == pytest.approx(result.probability[test[0]], rel=1e-12)  # a product of one row may round otherwise
    assert 0 < again.threshold < 1


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
    assert not np.array_equal(classify.probe(planted(), Protocol(seed=1), positive="malignant").fold, result.fold)


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
        (planted(), {"folds": 1}, "CONFIG", "folds: cannot be 1"),
        (make(np.eye(9), np.arange(9) < 2), {}, "FOLDS", "2 with positive and 7 with negative"),
        (make(np.eye(4), np.arange(4) < 2), {"folds": 2}, "FOLDS", "training part of a fold"),
        (make(np.eye(9), np.arange(9) < 4, [0] * 9), {}, "FOLDS", "1 patients"),
        (make(np.eye(9), np.zeros(9)), {}, "LABEL", "1 classes over 9 cases"),
        (make(np.zeros((0, 2)), []), {}, "LABEL", "0 classes over 0 cases"),
        (planted(), {"split": True}, "FOLDS", "90 train and 0 test cases"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_training(table, options, code, says, monkeypatch):
    monkeypatch.setattr(classify, "fit", None)
    with pytest.raises(DagmanError, match=f"E-{code}.*{says}"):
        classify.probe(table, Protocol(**options), positive="malignant")


def test_without_patients_it_is_refused_unless_said_and_then_stamped(tmp_path):
    table = dataclasses.replace(planted(), patients=(None,) * 90)
    with pytest.raises(DagmanError, match="90 of 90 cases have no patient") as caught:
        classify.probe(table, positive="malignant")
    assert caught.value.exit_code == ExitCode.REFUSED
    stamped = predictions.summary(classify.probe(table, Protocol(group_by="case"), positive="malignant"))
    assert stamped["patients"] is None
    assert "not grouped by patient" in stamped["warning"]


def test_written_predictions_and_result_give_the_scores_again(result, tmp_path):
    written, summary = classify.write(result, tmp_path)
    rows = np.genfromtxt(written, delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert rows.dtype.names == (
        *("case_id", "patient", "fold", "label", "predicted"),
        *("probability_benign", "probability_malignant"),
        *(f"threshold_chosen_on_{fold}" for fold in range(3)),
    )
    np.testing.assert_array_equal(rows["probability_malignant"], result.probability)
    np.testing.assert_array_equal(rows["label"] == "malignant", result.positive)
    found = json.loads(summary.read_text())
    assert (found["cases"], found["patients"], found["positive"]) == (90, 45, int(result.positive.sum()))
    assert found["auc"] == dataclasses.asdict(result.auc())
    assert found["warning"] is None
    again = predictions.read(tmp_path)
    assert (again.sensitivity(), again.specificity()) == (result.sensitivity(), result.specificity())


def test_intervals_of_sensitivity_and_specificity_know_that_folds_choose_their_thresholds(monkeypatch):
    monkeypatch.setattr(statistics, "FARTHER", 1)
    monkeypatch.setattr(classify, "STRENGTHS", (0.01,))
    drawn, kept = [], []
    for seed in range(48):
        rng = np.random.default_rng(seed)
        malignant = rng.random(150) < 0.4
        features = rng.normal(size=(150, 12)) + 0.4 * malignant[:, None] * (np.arange(12) < 4)
        result = classify.probe(make(features, malignant, np.arange(150)), positive="malignant")
        fixed = dataclasses.replace(result, chosen_on=None)
        assert result.sensitivity().value == pytest.approx(result.called[result.positive].mean())
        assert result.specificity().value == pytest.approx((result.called == 0)[~result.positive].mean())
        drawn.append([(one.value, one.low, one.high) for one in (result.sensitivity(), result.specificity())])
        kept.append([(one.value, one.low, one.high) for one in (fixed.sensitivity(), fixed.specificity())])

    def held(intervals):
        value, low, high = np.moveaxis(np.array(intervals), 2, 0)
        mean = value.mean(axis=0)
        return ((low <= mean) & (mean <= high)).sum()

    assert held(drawn) >= 86, "of 96; 95 % are 91"
    assert held(kept) < 86


def test_the_threshold_under_weights_is_that_of_cases_that_come_so_often():
    rng = np.random.default_rng(0)
    for _ in range(50):
        probability, positive = rng.integers(0, 8, 20) / 10, rng.random(20) < 0.5
        weights = rng.integers(0, 3, (4, 20))
        found = statistics.thresholds(probability, positive, weights.astype(float))
        for cut, row in zip(found, weights, strict=True):
            again, true = np.repeat(probability, row), np.repeat(positive, row)
            if not true.any() or true.all():
                continue
            cuts = [np.unique(probability)[0], *(np.unique(probability)[1:] + np.unique(probability)[:-1]) / 2]
            worth = [(again >= each)[true].mean() - (again >= each)[~true].mean() for each in cuts]
            best = [each for each, value in zip(cuts, worth, strict=True) if value > max(worth) - 1e-9]
            assert abs(cut - 0.5) == pytest.approx(min(abs(each - 0.5) for each in best))


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
        classify.beside({"a": result, "b": classify.probe(noise, Protocol(seed=5), positive="malignant")})
    other = dataclasses.replace(result, case_ids=(*result.case_ids[:-1], "zz"))
    with pytest.raises(DagmanError, match=rf"\({result.case_ids[-1]} is in one of them alone\)"):
        classify.beside({"a": result, "b": other})


def test_a_first_that_no_patient_moves_is_set_apart_from_others_that_move():
    positive = np.arange(60) % 2
    rng = np.random.default_rng(0)

    def scored(score):
        likely = 1 / (1 + np.exp(-score))
        return predictions.Predictions(
            case_ids=tuple(f"c{case:02}" for case in range(60)),
            groups=np.array([f"p{case:02}" for case in range(60)]),
            labels=positive,
            names=("benign", "malignant"),
            fold=np.zeros(60, int),
            probabilities=np.stack([1 - likely, likely], axis=1),
            thresholds=(0.5,),
        )

    perfect, others = scored(positive * 20.0 - 10), [scored(rng.normal(size=60)) for _ in range(3)]
    assert perfect.auc().why == statistics.UNMOVED
    found, one = predictions.difference_from_one_of(perfect, others), predictions.difference(perfect, others[0])
    assert found.low < found.value < found.high
    assert found.high - found.low > 0.8 * (one.high - one.low)
    assert predictions.difference_from_one_of(perfect, [perfect, perfect]).why == statistics.UNMOVED


def test_one_of_several_alike_is_drawn_with_the_patients(result):
    table = planted()
    noise = [
        classify.probe(
            dataclasses.replace(table, features=np.random.default_rng(seed).normal(size=(90, 4)).astype(np.float32)),
            positive="malignant",
        )
        for seed in range(4)
    ]
    gained = predictions.difference_from_one_of(result, noise)
    each = [predictions.difference(result, one) for one in noise]
    assert gained.value == pytest.approx(np.mean([one.value for one in each]))
    assert gained.low < min(one.value for one in each) < max(one.value for one in each) < gained.high
    same = predictions.difference_from_one_of(result, [result, dataclasses.replace(result)])
    assert (same.value, same.low, same.high) == (0, None, None), "no resample changes it, which is no certainty"
    assert same.why == "resampling the patients does not change it"
    best = max(noise, key=lambda one: one.auc().value)
    against = predictions.difference_from_one_of(best, [one for one in noise if one is not best])
    assert against.low < 0 < against.high
    other = classify.probe(planted(), Protocol(seed=5), positive="malignant")
    with pytest.raises(DagmanError, match="E-COMPARE"):
        predictions.difference_from_one_of(result, [noise[0], other])


def organs(cases=120, width=6, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(3, size=cases)
    features = rng.normal(size=(cases, width))
    features[np.arange(cases), kind] += 2.5
    table = make(features, kind == 0)
    return dataclasses.replace(table, labels=tuple(np.array(["heart", "liver", "lung"])[kind]))


def test_three_classes_are_each_scored_against_the_rest(tmp_path):
    found = classify.probe(organs())
    one = [
        roc_auc_score((found.labels == k)[found.fold == 0], found.probabilities[found.fold == 0, k]) for k in range(3)
    ]
    assert found.fold_auc()[0] == pytest.approx(np.mean(one), abs=1e-9)
    assert found.auc().low > 0.8
    assert found.accuracy().value == pytest.approx(np.mean(found.called == found.labels))
    assert set(found.scores) == {"auc", "accuracy", "balanced_accuracy", "brier"}
    classify.write(found, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    for score in ("auc", "sensitivity", "specificity"):
        assert set(result[f"class_{score}"]) == {"heart", "liver", "lung"}
    assert result["thresholds"] is None
    again = predictions.read(tmp_path)
    assert predictions.summary(again) == predictions.summary(found)


def test_each_class_has_the_sensitivity_and_specificity_of_its_confusion_matrix():
    """Eight cases of six patients, called by hand: 4 heart (1 missed), 3 liver (2 missed), 1 lung (found)."""
    true, called = np.array([0, 0, 0, 0, 1, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 0, 2, 2])
    found = predictions.Predictions(
        case_ids=tuple("abcdefgh"),
        groups=np.array(["p0", "p0", "p1", "p2", "p3", "p3", "p4", "p5"]),
        labels=true,
        names=("heart", "liver", "lung"),
        fold=np.zeros(8, int),
        probabilities=np.eye(3)[called] * 0.4 + 0.2,
        thresholds=(0.5,),
    )
    scores = found.class_scores()
    by_hand = {"sensitivity": (3 / 4, 1 / 3, 1), "specificity": (3 / 4, 4 / 5, 6 / 7)}
    for number, ((left, wrongly), (missed, hit)) in enumerate(multilabel_confusion_matrix(true, called)):
        name = found.names[number]
        assert scores["sensitivity"][name].value == pytest.approx(hit / (missed + hit))
        assert scores["specificity"][name].value == pytest.approx(left / (left + wrongly))
        for score, values in by_hand.items():
            assert scores[score][name].value == pytest.approx(values[number])
    heart = scores["sensitivity"]["heart"]
    assert heart.low < 0.75 < heart.high
    assert scores["sensitivity"]["lung"].why == "1 patients are positive and 5 negative, 2 needed"
    told = predictions.lines(predictions.summary(found))
    assert told[4].split() == ["against", "the", "rest", "cases", "auc", "sensitivity", "specificity"]
    [line] = [line for line in told if line.startswith("heart")]
    assert line.split()[1] == "4"
    assert str(heart) in line
    assert str(scores["specificity"]["heart"]) in line


def test_brier_is_the_mean_squared_error(result):
    assert result.brier().value == pytest.approx(np.mean((result.probability - result.positive) ** 2))
    several = classify.probe(organs())
    wanted = np.mean(np.sum((several.probabilities - np.eye(3)[several.labels]) ** 2, axis=1))
    assert several.brier().value == pytest.approx(wanted)


def test_a_probe_is_a_linear_layer(result):
    features = np.random.default_rng(0).normal(size=(7, 12))
    for made in (result.probes[0], classify.probe(organs()).probes[0]):
        weights, biases = made.linear()
        logits = features[:, : weights.shape[1]] @ weights.T + biases
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        wanted = made.probabilities(features[:, : weights.shape[1]])
        np.testing.assert_allclose(share / share.sum(axis=1, keepdims=True), wanted, atol=1e-9)


def test_a_written_result_reads_back_and_a_strange_folder_is_refused(result, tmp_path):
    classify.write(result, tmp_path / "probe")
    again = predictions.read(tmp_path / "probe")
    assert predictions.summary(again) == predictions.summary(result)
    assert predictions.difference(result, again).value == 0
    with pytest.raises(DagmanError, match=r"E-COMPARE.*holds no predictions.csv"):
        predictions.read(tmp_path)


def with_splits(table, seed=0):
    sides = np.random.default_rng(seed).choice(["train", "validation", "test"], p=[0.5, 0.2, 0.3], size=45)
    return dataclasses.replace(table, splits=tuple(np.repeat(sides, 2)))


def test_a_fixed_test_set_is_the_only_one_tested():
    table = with_splits(planted())
    found = classify.probe(table, Protocol(split=True), positive="malignant")
    test = [case for case, side in zip(table.case_ids, table.splits, strict=True) if side == "test"]
    assert list(found.case_ids) == test
    assert set(found.fold) == {0}
    cases = cohort.cohort(table, Protocol(split=True), positive="malignant", hold_out=True)
    (part,) = cases.parts
    assert {table.splits[row] for row in part.train} == {"train"}
    assert {table.splits[row] for row in part.held_out} == {"validation"}


def test_a_patient_on_two_sides_is_refused():
    table = dataclasses.replace(planted(), splits=("train", "test") * 45)
    with pytest.raises(
        DagmanError, match=r"E-LEAK.*45 patients stand on two sides of the column split \(p0, p1"
    ) as caught:
        classify.probe(table, Protocol(split=True), positive="malignant")
    assert caught.value.exit_code == ExitCode.REFUSED


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 5), st.booleans())
@example(85880, 0, True)
def test_fractions_are_nested_whole_patients_of_every_class_and_never_tested(seed, draw, hold_out):
    table = planted(cases=120, seed=seed)
    seen = []
    for fraction in (0.25, 0.5, 1.0):
        protocol = Protocol(fraction=fraction, draw=draw, seed=seed)
        cases = cohort.cohort(table, protocol, positive="malignant", hold_out=hold_out)
        for part in cases.parts:
            sides = [{cases.groups[row] for row in rows} for rows in (part.train, part.held_out, part.test)]
            assert sum(map(len, sides)) == len(set.union(*sides))
            assert {int(cases.numbers[row]) for row in part.train} == {0, 1}
            learnt = [*part.train, *part.held_out]
            of = [{cases.groups[row] for row in learnt if cases.numbers[row] == number} for number in (0, 1)]
            assert not part.held_out or hold_out
            if hold_out and min(len(of[0] - of[1]), len(of[1] - of[0])) >= 3:
                assert part.held_out, "each class can spare a patient"
        seen.append([set(part.train) | set(part.held_out) for part in cases.parts])
        assert [part.test for part in cases.parts] == [
            part.test for part in cohort.cohort(table, Protocol(seed=seed), positive="malignant").parts
        ]
    for quarter, half, whole in zip(*seen, strict=True):
        assert quarter < half < whole


def test_other_draws_are_other_patients():
    parts = [
        cohort.cohort(planted(), Protocol(fraction=0.25, draw=draw), positive="malignant").parts[0].train
        for draw in (0, 1)
    ]
    assert parts[0] != parts[1]


def test_no_step_is_chosen_on_a_part_that_lacks_a_class():
    """Two patients of a class are too few to spare one, so nothing is held out, of neither class."""
    table = make(np.eye(30), np.arange(30) < 4)
    few = cohort.cohort(table, Protocol(folds=2), positive="malignant", hold_out=True)
    assert all(part.held_out == () for part in few.parts)
    enough = cohort.cohort(make(np.eye(30), np.arange(30) < 6), Protocol(folds=2), positive="malignant", hold_out=True)
    for part in enough.parts:
        assert {int(enough.numbers[row]) for row in part.held_out} == {0, 1}


def test_the_probe_for_new_cases_learns_from_every_case_that_is_no_test_case(monkeypatch):
    seen = []
    made = classify.Probe(model=None, strength=1.0, threshold=0.5, outside=np.ones((90, 2)))
    monkeypatch.setattr(classify, "fit", lambda features, *_: seen.append(len(features)) or made)
    table = with_splits(planted())
    given = {"positive": "malignant", "unlabelled": "refuse"}
    classify.fit_all(table, Protocol(fraction=0.25), **given)
    classify.fit_all(table, Protocol(split=True), **given)
    assert seen == [90, 90 - table.splits.count("test")]


def test_with_a_split_the_probe_that_is_tested_is_the_one_that_is_kept():
    table = with_splits(planted())
    tested = classify.probe(table, Protocol(split=True), positive="malignant")
    kept, _, learnt = classify.fit_all(table, Protocol(split=True), positive="malignant", unlabelled="refuse")
    assert len(learnt) == 90 - len(tested.case_ids)
    rows = [table.case_ids.index(case) for case in tested.case_ids]
    np.testing.assert_array_equal(kept.probabilities(table.features[rows].astype(float)), tested.probabilities)
    assert (kept.threshold,) == tested.thresholds
