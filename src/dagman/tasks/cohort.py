"""Labelled cases, and which of them a classifier learns from, chooses on and is tested with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int, Shaped

from dagman import randomness
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.tasks import folds as folding
from dagman.tasks import labels as label_rules
from dagman.tasks.folds import Part
from dagman.tasks.table import Table

HELD_OUT_RATIO = 0.2
"""Of each class's patients of a training part, to choose the best step on."""
LEAST_TO_SPARE = 3
"""Patients that every class must have before one is held out."""
_SIDES = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a labelled study is cut into parts to learn from and to be tested on."""

    folds: int = 3
    """The paper's."""
    split: bool = False
    """Take the column `split` (train, validation, test) in place of folds."""
    fraction: float = 1.0
    """Of the training patients of each class; a smaller part of a draw lies inside a larger one."""
    draw: int = 0
    """Which draw of the fraction."""
    group_by: Literal["patient", "case"] = "patient"
    """`case` where patients are unknown; it is then written into the result."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise DagmanError("CONFIG", "fraction", f"cannot be {self.fraction}", "give a share above 0, up to 1")

    @property
    def words(self) -> str:
        """For a person."""
        how = "split column" if self.split else f"{self.folds} folds by {self.group_by}"
        return how if self.fraction == 1 else f"{how}, {self.fraction:.0%} of the training patients, draw {self.draw}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """The labelled cases of a table, sorted by case."""

    table: Table
    classes: label_rules.Classes
    groups: Shaped[np.ndarray, " cases"]
    parts: tuple[Part, ...]
    num_unlabelled: int
    protocol: Protocol

    @property
    def numbers(self) -> Int[np.ndarray, " cases"]:
        """Class of each case."""
        return self.classes.numbers

    @property
    def together(self) -> dict[str, str]:
        """What keeps cases on one side, by their names: the patient, or the side itself where the table says it."""
        if not self.protocol.split:
            return dict(zip(self.table.case_ids, map(str, self.groups), strict=True))
        sides = {"training": (*self.parts[0].train, *self.parts[0].held_out), "test": self.parts[0].test}
        return {case: side for side, rows in sides.items() for case in names(self.table, rows)}


def stored(store: PreparedStore) -> Table:
    """What a store says of its cases, without features."""
    return Table(
        case_ids=tuple(str(row["case_id"]) for row in store.rows),
        patients=tuple(row.get("patient") for row in store.rows),
        labels=tuple(row.get("label") for row in store.rows),
        splits=tuple(row.get("split") for row in store.rows) if any(row.get("split") for row in store.rows) else (),
        features=np.zeros((len(store), 0), np.float32),
    )


def cohort(
    table: Table,
    protocol: Protocol,
    *,
    positive: str | None = None,
    unlabelled: label_rules.Unlabelled = "refuse",
    hold_out: bool = False,
) -> Cohort:
    """Classes, patients and parts of the labelled cases.

    Args:
        table: All cases; features are not looked at.
        protocol: How they are cut.
        positive: The positive class, where there are two and labels are words.
        unlabelled: What to do about cases without a label.
        hold_out: Keep a fifth of each training part's patients to choose on (or the split `validation`).

    Raises:
        DagmanError: `E-LABEL` for unusable labels; `E-PATIENT` and `E-LEAK` (exit code 4) for cases without patient and
            for a patient on two sides; `E-FOLDS` where no plan gives every part every class.
    """
    table, num_unlabelled = label_rules.labelled(table, unlabelled)
    classes = label_rules.classes([str(label) for label in table.labels], positive)
    groups = _groups(table, protocol.group_by)
    if protocol.split:
        sides = [_by_column(table, classes, groups)]
    else:
        fold = folding.fold_plan(classes.numbers, groups, folds=protocol.folds, seed=protocol.seed)
        sides = [
            (np.flatnonzero(fold != k), np.array([], int), np.flatnonzero(fold == k)) for k in range(protocol.folds)
        ]
    parts = tuple(
        _part(number, *side, classes=classes, groups=groups, protocol=protocol, hold_out=hold_out)
        for number, side in enumerate(sides)
    )
    return Cohort(
        table=table, classes=classes, groups=groups, parts=parts, num_unlabelled=num_unlabelled, protocol=protocol
    )


def _groups(table: Table, group_by: str) -> np.ndarray:
    if group_by == "case":
        return np.array(table.case_ids)
    without = [case for case, patient in zip(table.case_ids, table.patients, strict=True) if not patient]
    if without:
        raise DagmanError(
            "PATIENT",
            "cases",
            f"{len(without)} of {len(table.case_ids)} cases have no patient ({', '.join(without[:5])}): "
            "one patient's scans could stand in training and test",
            "add a patient column, or say --group-by case, which is then written into the result",
            exit_code=ExitCode.REFUSED,
        )
    return np.array([str(patient) for patient in table.patients])


def _by_column(table: Table, classes: label_rules.Classes, groups: np.ndarray) -> tuple[np.ndarray, ...]:
    """Rows to train on, to choose on, and to test on, as the column `split` says; all else is in training."""
    column = np.array([split or "train" for split in table.splits] or ["train"] * len(groups))
    unknown = sorted(set(column) - set(_SIDES))
    if unknown:
        raise DagmanError(
            "FOLDS", "column split", f"holds {', '.join(unknown[:5])}", "write train, validation and test"
        )
    torn = [name for name in np.unique(groups) if len(set(column[groups == name])) > 1]
    if torn:
        raise DagmanError(
            "LEAK",
            "column split",
            f"{len(torn)} patients stand on two sides ({', '.join(map(str, torn[:5]))})",
            "put every patient on one side",
            exit_code=ExitCode.REFUSED,
        )
    train, chosen, test = (np.flatnonzero(column == side) for side in _SIDES)
    present = set(classes.numbers[train])
    lacking = [name for number, name in enumerate(classes.names) if number not in present]
    if lacking or not len(test):
        what = f"no training case of {', '.join(lacking[:5])}" if lacking else "no test case"
        raise DagmanError("FOLDS", "column split", f"leaves {what}", "give train and test cases of every class")
    return train, chosen, test


def _part(
    number: int,
    train: np.ndarray,
    chosen: np.ndarray,
    test: np.ndarray,
    *,
    classes: label_rules.Classes,
    groups: np.ndarray,
    protocol: Protocol,
    hold_out: bool,
) -> Part:
    """Few-shot and early choice by whole patients of each class, in one drawn order."""
    draws = randomness.generator(protocol.seed, "few", protocol.draw, number)
    class_of = {name: int(classes.numbers[train][groups[train] == name].max()) for name in np.unique(groups[train])}
    learnt, held, kept_of = set(), set(), {}
    for wanted in range(len(classes.names)):
        patients = sorted(name for name, held_class in class_of.items() if held_class == wanted)
        order = [patients[place] for place in draws.permutation(len(patients))]
        kept_of[wanted] = order[: math.ceil(protocol.fraction * len(order) - 1e-9)]
    for kept in kept_of.values():
        # A held-out part without one of the classes would choose a network that never says it.
        spare = hold_out and not len(chosen) and min(map(len, kept_of.values())) >= LEAST_TO_SPARE
        apart = max(1, round(HELD_OUT_RATIO * len(kept))) if spare else 0
        learnt |= set(kept[: len(kept) - apart])
        held |= set(kept[len(kept) - apart :])
    part = Part(
        number=number,
        train=_rows(train, groups, learnt),
        held_out=_rows(train, groups, held) or tuple(chosen.tolist()),
        test=tuple(test.tolist()),
    )
    if len(set(classes.numbers[list(part.train)])) < len(classes.names):
        raise DagmanError(
            "FOLDS",
            f"fold {number}",
            f"{protocol.fraction:.0%} of its training patients do not hold every class",
            "take a larger fraction, or label more patients",
        )
    return part


def _rows(among: np.ndarray, groups: np.ndarray, wanted: set[Any]) -> tuple[int, ...]:
    return tuple(int(row) for row in among if groups[row] in wanted)


def names(table: Table, rows: Sequence[int]) -> list[str]:
    """Cases of these rows."""
    return [table.case_ids[row] for row in rows]
