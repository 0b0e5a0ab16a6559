"""Labelled cases, and which of them a classifier learns from, chooses on and is tested with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from dagman import randomness
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.tasks import folds as folding
from dagman.tasks import labels as label_rules
from dagman.tasks import protocol as protocols
from dagman.tasks.protocol import HELD_OUT_RATIO, Part, Protocol, Sides
from dagman.tasks.table import Table

LEAST_TO_SPARE = 3
"""Patients that every class must have before one is held out."""


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
        """As `protocol.together`."""
        group_of = dict(enumerate(map(str, self.groups)))
        return protocols.together(self.table.case_ids, group_of, self.parts, self.protocol)


def stored(store: PreparedStore, rows: Sequence[int] | None = None) -> Table:
    """What a store says of its cases, or those of some rows, without features."""
    told = store.rows if rows is None else [store.rows[row] for row in rows]
    return Table(
        case_ids=tuple(str(row["case_id"]) for row in told),
        patients=tuple(row.get("patient") for row in told),
        labels=tuple(row.get("label") for row in told),
        splits=tuple(row.get("split") for row in told) if any(row.get("split") for row in told) else (),
        features=np.zeros((len(told), 0), np.float32),
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
    classes = label_rules.classes([str(label) for label in table.labels], positive, left_out=num_unlabelled)
    groups = protocols.groups(table.case_ids, table.patients, protocol.group_by, "cases")
    if protocol.split:
        sides = protocols.from_column(table.splits or [None] * len(groups), groups, "cases")
    else:
        plan = folding.fold_plan(classes.numbers, groups, folds=protocol.folds, seed=protocol.seed)
        sides = protocols.from_folds(plan)
    parts = tuple(_part(each, classes=classes, groups=groups, protocol=protocol, hold_out=hold_out) for each in sides)
    return Cohort(
        table=table, classes=classes, groups=groups, parts=parts, num_unlabelled=num_unlabelled, protocol=protocol
    )


def _part(
    sides: Sides, *, classes: label_rules.Classes, groups: np.ndarray, protocol: Protocol, hold_out: bool
) -> Part:
    """Few-shot and early choice by whole patients of each class, in one drawn order."""
    draws = randomness.generator(protocol.seed, "few", protocol.draw, sides.number)
    kept_of = [protocol.kept(order) for order in _orders(sides.train, classes, groups, draws)]
    learnt, held = set(), set()
    for kept in kept_of:
        # A held-out part without one of the classes would choose a network that never says it.
        spare = hold_out and not len(sides.chosen) and min(map(len, kept_of)) >= LEAST_TO_SPARE
        apart = max(1, round(HELD_OUT_RATIO * len(kept))) if spare else 0
        learnt |= set(kept[: len(kept) - apart])
        held |= set(kept[len(kept) - apart :])
    chosen = {patient for order in _orders(sides.chosen, classes, groups, draws) for patient in protocol.kept(order)}
    part = Part(
        number=sides.number,
        train=_rows(sides.train, groups, learnt),
        held_out=_rows(sides.train, groups, held) or _rows(sides.chosen, groups, chosen),
        test=tuple(sides.test.tolist()),
    )
    present = set(classes.numbers[list(part.train)].tolist())
    lacking = [name for number, name in enumerate(classes.names) if number not in present]
    if lacking:
        raise DagmanError(
            "FOLDS",
            f"fold {sides.number}",
            f"has no training case of {', '.join(lacking[:5])} in {protocol.fraction:.0%} of its training patients",
            "take a larger fraction, or label more patients",
        )
    return part


def _orders(
    rows: np.ndarray, classes: label_rules.Classes, groups: np.ndarray, draws: np.random.Generator
) -> list[list[str]]:
    """The patients of some rows in a drawn order, class by class; the highest class of a patient counts."""
    class_of = {name: int(classes.numbers[rows][groups[rows] == name].max()) for name in np.unique(groups[rows])}
    found = []
    for wanted in range(len(classes.names)):
        patients = sorted(name for name, held_class in class_of.items() if held_class == wanted)
        found.append([patients[place] for place in draws.permutation(len(patients))])
    return found


def _rows(among: np.ndarray, groups: np.ndarray, wanted: set[Any]) -> tuple[int, ...]:
    return tuple(int(row) for row in among if groups[row] in wanted)


def names(table: Table, rows: Sequence[int]) -> list[str]:
    """Cases of these rows."""
    return [table.case_ids[row] for row in rows]
