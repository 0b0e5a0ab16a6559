"""Patients stay whole, classes are present, small parts lie inside larger ones; what cannot be is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagman.errors import DagmanError
from dagman.tasks.classes import choose
from dagman.tasks.protocol import Protocol
from dagman.tasks.study import Case, agreed, parts, study


def cases(patients, labels=None, splits=None):
    return [
        Case(
            case_id=f"c{number:03d}",
            patient=patient,
            split=splits[number] if splits else None,
            labels=frozenset(labels[number] if labels else {1}),
        )
        for number, patient in enumerate(patients)
    ]


def plan(*given, labels=None, **more):
    return study(Path("table.csv"), cases(*given, **more), labels=labels)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=3, max_size=40), st.integers(2, 4), st.integers(0, 99))
def test_no_patient_on_two_sides_and_every_case_tested_once(patients, folds, seed):
    given_plan = plan([f"p{patient}" for patient in patients])
    if len(set(patients)) < folds:
        with pytest.raises(DagmanError, match="E-FOLDS"):
            parts(given_plan, Protocol(folds=folds, seed=seed))
        return
    made = parts(given_plan, Protocol(folds=folds, seed=seed))
    assert sorted(row for part in made for row in part.test) == list(range(len(patients)))
    for part in made:
        sides = [{patients[row] for row in rows} for rows in (part.train, part.held_out, part.test)]
        assert sum(map(len, sides)) == len(set.union(*sides))
        assert part.train
        assert part.test


@settings(max_examples=30, deadline=None)
@given(st.integers(6, 30), st.integers(0, 99))
def test_smaller_fractions_lie_inside_larger_ones_and_are_tested_alike(num_patients, seed):
    given_plan = plan([f"p{number}" for number in range(num_patients)])
    before = None
    for fraction in (0.25, 0.5, 1.0):
        made = parts(given_plan, Protocol(folds=3, fraction=fraction, seed=seed))
        if before:
            for small, large in zip(before, made, strict=True):
                assert {*small.train, *small.held_out} <= {*large.train, *large.held_out}
                assert small.test == large.test
        before = made


def test_the_order_of_patients_names_not_of_rows_decides():
    one = parts(plan(["a", "b", "c", "d", "e", "f"]), Protocol(folds=3, seed=4))
    assert one == parts(plan(["a", "b", "c", "d", "e", "f"]), Protocol(folds=3, seed=4))
    assert one != parts(plan(["a", "b", "c", "d", "e", "f"]), Protocol(folds=3, seed=5))


def test_a_rare_class_stays_in_every_training_part_or_is_refused():
    rare = [{1, 2}, {1, 2}, {1}, {1}, {1}, {1}]
    patients = list("abcdef")
    made = parts(plan(patients, labels=None), Protocol(folds=3, seed=0))
    assert len(made) == 3
    with_rare = study(Path("t"), cases(patients, rare), labels=None)
    for part in parts(with_rare, Protocol(folds=3, seed=0)):
        assert {0, 1} & set(part.train)
    once = study(Path("t"), cases(patients, [{1, 2}] + [{1}] * 5), labels=None)
    with pytest.raises(DagmanError, match=r"E-FOLDS.*1 with label 2"):
        parts(once, Protocol(folds=3, seed=0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.integers(3, 5))
def test_the_best_step_is_chosen_on_cases_that_hold_every_class(seed, per_class):
    labels = [{1}] * per_class + [{2}] * per_class + [set()] * 14
    given_plan = study(Path("t"), cases([f"p{number}" for number in range(len(labels))], labels), labels=None)
    for part in parts(given_plan, Protocol(folds=2, seed=seed)):
        held = set().union(*(labels[row] for row in part.held_out))
        learnt = [label for row in part.train for label in labels[row]]
        assert {1, 2} <= set(learnt)
        for label in (1, 2):  # It is held out unless training has it from one patient only.
            assert label in held or learnt.count(label) == 1


def test_one_patient_and_no_patient_are_refused():
    with pytest.raises(DagmanError, match=r"E-FOLDS.*1 patients"):
        parts(plan(["same"] * 5), Protocol(folds=3, seed=0))
    with pytest.raises(DagmanError, match=r"E-PATIENT.*c000"):
        plan([None, "a", "b"])
    assert study(Path("t"), cases([None, "a", None]), labels=None, group_by="case").groups.tolist() == [
        "c000",
        "c001",
        "c002",
    ]


def test_the_split_column_is_taken_as_it_is_and_a_torn_patient_is_refused():
    sides = ["train", "train", "validation", "test", "test"]
    (part,) = parts(plan(list("abcde"), splits=sides), Protocol(split=True))
    assert (part.train, part.held_out, part.test) == ((0, 1), (2,), (3, 4))
    with pytest.raises(DagmanError, match=r"E-LEAK.*1 patients.*\(a\)"):
        parts(plan(list("abcda"), splits=sides), Protocol(split=True))
    with pytest.raises(DagmanError, match=r"E-FOLDS.*and dev"):
        parts(plan(list("abc"), splits=["train", "dev", "test"]), Protocol(split=True))


def test_empty_masks_are_cases():
    assert study(Path("t"), cases(list("abc"), [{1}, set(), {1}]), labels=None).rows == (0, 1, 2)
    with pytest.raises(DagmanError, match="E-LABEL"):
        study(Path("t"), cases(list("abc"), [set(), set(), set()]), labels=None)


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        (None, ("label 1", "label 2", "label 5"), ((1,), (2,), (5,))),
        ("5,1", ("label 5", "label 1"), ((5,), (1,))),
        ("tumour=1+2, node=5", ("tumour", "node"), ((1, 2), (5,))),
    ],
)
def test_labels_are_chosen_and_joined(text, names, labels):
    made = choose(text, [0, 5, 2, 1])
    assert (made.names, made.labels) == (names, labels)


def test_labels_have_the_names_that_a_data_set_gives_them():
    known = {1: "liver", 5: "spleen"}
    assert choose(None, [1, 2, 5], known).names == ("liver", "label 2", "spleen")
    named = choose("spleen,1", [1, 2, 5], known)
    assert (named.names, named.labels) == (("spleen", "liver"), ((5,), (1,)))
    assert choose("organ=1+2", [1, 2, 5], known).names == ("organ",)


def test_names_that_contradict_each_other_are_none():
    assert agreed([{1: "a", 2: "b"}, {1: "a", 2: "c"}, {3: "b"}, {4: "b"}]) == {1: "a"}


@pytest.mark.parametrize("text", ["7", "x", "a=1,b=1", "1+", "a=1,a=2"])
def test_labels_that_cannot_be_are_refused(text):
    with pytest.raises(DagmanError, match="E-LABEL"):
        choose(text, [1, 2])


@pytest.mark.parametrize(("label", "kind"), [(255, np.uint8), (256, np.int16), (32767, np.int16), (40000, np.int32)])
def test_label_maps_come_back_in_a_type_that_holds_them(label, kind):
    written = choose(None, [1, label]).label_map(np.array([[[0, 1, 2]]], np.uint8))
    assert written.dtype == kind
    assert written.tolist() == [[[0, 1, label]]]
