"""What a column `split` says, and whom a fraction keeps, for every task alike."""

from pathlib import Path

import numpy as np
import pytest

from dagman.errors import DagmanError
from dagman.tasks import cohort, protocol, study
from dagman.tasks.protocol import Part, Protocol
from dagman.tasks.table import Table

NAMES = [f"c{number:02d}" for number in range(24)]
VALIDATION = ["train"] * 12 + ["validation"] * 8 + ["test"] * 4
FOLDS = [f"fold-{number % 3}" for number in range(24)]


def classified(splits: list[str], given: Protocol) -> tuple[Part, ...]:
    table = Table(
        case_ids=tuple(NAMES),
        patients=tuple(NAMES),
        labels=tuple(str(number % 2) for number in range(24)),
        splits=tuple(splits),
        features=np.zeros((24, 0), np.float32),
    )
    return cohort.cohort(table, given, hold_out=True).parts


def segmented(splits: list[str], given: Protocol) -> tuple[Part, ...]:
    cases = [
        study.Case(case_id=name, patient=name, split=split, labels=frozenset({1}))
        for name, split in zip(NAMES, splits, strict=True)
    ]
    return study.parts(study.study(Path("t"), cases, labels=None), given)


@pytest.mark.parametrize("parts", [classified, segmented])
def test_folds_of_the_column_are_tested_one_by_one(parts):
    found = parts(FOLDS, Protocol(split=True))
    assert [part.number for part in found] == [0, 1, 2]
    for part in found:
        assert part.test == tuple(range(part.number, 24, 3))
        assert part.held_out, "the best step is chosen within the training part"
        assert sorted([*part.train, *part.held_out, *part.test]) == list(range(24))


@pytest.mark.parametrize("parts", [classified, segmented])
def test_a_fraction_thins_what_is_chosen_on_as_well_and_never_what_is_tested(parts):
    before: set[int] = set()
    for fraction, learnt, chosen in ((0.25, 4, 2), (0.5, 6, 4), (1.0, 12, 8)):
        (part,) = parts(VALIDATION, Protocol(split=True, fraction=fraction))
        assert len(part.train) in (learnt, learnt - 1)
        assert len(part.held_out) == chosen
        assert set(part.held_out) <= set(range(12, 20))
        assert part.test == (20, 21, 22, 23)
        assert before <= {*part.train, *part.held_out}
        before = {*part.train, *part.held_out}


def test_draws_of_a_fraction_differ():
    kept = {segmented(VALIDATION, Protocol(split=True, fraction=0.5, draw=draw))[0].train for draw in range(4)}
    assert len(kept) > 1


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        (["fold-0"] * 12 + ["test"] * 12, "E-FOLDS t: column split has 0 train and 12 test cases, and fold-0"),
        (["fold-0"] * 24, "0 train and 0 test"),
        (["train"] * 24, "24 train and 0 test"),
        (["train"] * 20 + ["dev"] * 4, "20 train and 0 test cases, and dev"),
    ],
)
def test_a_column_that_cannot_be_used_is_refused(splits, said):
    with pytest.raises(DagmanError) as caught:
        segmented(splits, Protocol(split=True))
    assert said in str(caught.value)


def test_folds_of_a_table_are_numbered_from_0_whatever_their_names():
    found = protocol.from_column(["fold-2", "fold-7", "fold-2"], np.array(["one", "two", "three"]), "t")
    assert [(part.number, part.test.tolist(), part.train.tolist()) for part in found] == [
        (0, [0, 2], [1]),
        (1, [1], [0, 2]),
    ]


def test_a_patient_in_two_folds_is_refused():
    with pytest.raises(DagmanError, match=r"E-LEAK.*1 patients.*\(one\)"):
        protocol.from_column(["fold-0", "fold-1", "fold-0"], np.array(["one", "one", "two"]), "t")


def test_cases_stay_with_their_patient_or_with_the_side_that_a_table_says():
    group_of = dict(enumerate(NAMES))
    folds = protocol.together(NAMES, group_of, classified(FOLDS, Protocol(split=True)), Protocol(split=True))
    assert folds == dict(zip(NAMES, NAMES, strict=True))
    sides = protocol.together(NAMES, group_of, classified(VALIDATION, Protocol(split=True)), Protocol(split=True))
    assert sides == {name: "test" if number >= 20 else "training" for number, name in enumerate(NAMES)}


def test_a_number_of_folds_beside_a_split_is_refused():
    with pytest.raises(DagmanError, match=r"E-CONFIG folds: 5 are to be drawn, but the split says its own"):
        Protocol(split=True, folds=5)
