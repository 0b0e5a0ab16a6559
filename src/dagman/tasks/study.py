"""Which cases a segmentation learns from, chooses on and is tested with: patients whole, classes present."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dagman import randomness
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.tasks.classes import Classes, choose
from dagman.tasks.folds import Part

HELD_OUT_RATIO = 0.2
"""Of a fold's training patients, to choose the best step on."""
_ATTEMPTS = 50


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a table or store says of one case."""

    case_id: str
    patient: str | None
    split: str | None
    labels: frozenset[int] | None
    """That its mask holds; None without a mask."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """The cases that have masks."""

    source: Path
    rows: tuple[int, ...]
    """Of the store or table."""
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    """Patient of each."""
    holds: np.ndarray
    """(cases, classes): whether a case holds a class."""
    classes: Classes
    left_out: dict[str, int]
    """Why other cases are not in it, and how many."""


def stored(store: PreparedStore) -> list[Case]:
    """The cases of a store, row by row."""
    return [
        Case(
            case_id=row["case_id"],
            patient=row.get("patient"),
            split=row.get("split"),
            labels=frozenset(map(int, row["mask"]["voxels"])) if row["mask"] else None,
        )
        for row in store.rows
    ]


def study(
    source: Path, cases: Sequence[Case], *, labels: str | None, group_by: Literal["patient", "case"] = "patient"
) -> Study:
    """Cases with masks, their patients and classes.

    Args:
        source: For messages.
        cases: All of them.
        labels: As `classes.choose`.
        group_by: `case` where patients are unknown.

    Raises:
        DagmanError: `E-NODATA`, exit code 5, without masks; `E-PATIENT`, exit code 4, for cases without patient;
            `E-LABEL`.
    """
    masked = [(number, case, case.labels) for number, case in enumerate(cases) if case.labels is not None]
    if not masked:
        raise DagmanError(
            "NODATA",
            source,
            f"none of its {len(cases)} cases has a mask",
            "give a table with a mask column",
            exit_code=ExitCode.NOTHING_USABLE,
        )
    nameless = [case.case_id for _, case, _ in masked if not case.patient]
    if group_by == "patient" and nameless:
        raise DagmanError(
            "PATIENT",
            source,
            f"{len(nameless)} of {len(masked)} cases have no patient ({', '.join(nameless[:5])}): one patient's scans "
            "could stand in training and test",
            "add a patient column, or say --group-by case, which is then written into the result",
            exit_code=ExitCode.REFUSED,
        )
    classes = choose(labels, set().union(*(present for _, _, present in masked)))
    return Study(
        source=source,
        rows=tuple(number for number, _, _ in masked),
        splits=tuple(case.split or "train" for _, case, _ in masked),
        groups=tuple(str(case.patient if group_by == "patient" else case.case_id) for _, case, _ in masked),
        holds=np.array([[not present.isdisjoint(values) for values in classes.labels] for _, _, present in masked]),
        classes=classes,
        left_out={"no mask": len(cases) - len(masked)} if len(masked) < len(cases) else {},
    )


def parts(plan: Study, *, folds: int, split: bool = False, fraction: float = 1.0, seed: int) -> tuple[Part, ...]:
    """Folds by patient, or the one that the column `split` gives.

    Args:
        plan: From `study`.
        folds: Their number.
        split: Take the column.
        fraction: Of the training patients that are used; smaller ones lie inside larger ones.
        seed: Of the draws.

    Raises:
        DagmanError: `E-FOLDS` where a training part would lack a class or be empty; `E-LEAK`, exit code 4, where the
            column puts a patient on two sides.
    """
    if split:
        return (_by_column(plan, fraction, seed),)
    patients = sorted(set(plan.groups))
    for attempt in range(_ATTEMPTS):
        if len(patients) < folds:
            break
        test_of = _draw(plan, folds, seed, attempt)
        trained = [[index for index in range(len(plan.rows)) if test_of[index] != number] for number in range(folds)]
        if all(plan.holds[part].any(axis=0).all() for part in trained):
            return tuple(
                _part(
                    plan,
                    number,
                    part,
                    [i for i in range(len(plan.rows)) if test_of[i] == number],
                    fraction=fraction,
                    seed=seed,
                )
                for number, part in enumerate(trained)
            )
    counts = [len({plan.groups[i] for i in np.flatnonzero(column)}) for column in plan.holds.T]
    told = ", ".join(f"{count} with {name}" for count, name in zip(counts, plan.classes.names, strict=True))
    raise DagmanError(
        "FOLDS",
        plan.source,
        f"{len(patients)} patients, {told}: not every training part of {folds} folds can hold every class",
        "segment more patients, leave rare classes out with --labels, or change --folds",
    )


def _draw(plan: Study, folds: int, seed: int, attempt: int) -> np.ndarray:
    """Test fold of each case: patients whole, folds of about one size."""
    from sklearn.model_selection import GroupKFold

    state = randomness.torch_seed(seed, "segment.folds", attempt) % 2**32
    splitter = GroupKFold(folds, shuffle=True, random_state=state)
    fold = np.empty(len(plan.rows), dtype=np.int64)
    for number, (_, test) in enumerate(splitter.split(plan.holds, groups=np.array(plan.groups))):
        fold[test] = number
    return fold


def _by_column(plan: Study, fraction: float, seed: int) -> Part:
    unknown = set(plan.splits) - {"train", "validation", "test"}
    sides: dict[str, set[str]] = {}
    for group, side in zip(plan.groups, plan.splits, strict=True):
        sides.setdefault(group, set()).add(side)
    torn = sorted(group for group, where in sides.items() if len(where) > 1)
    if torn:
        raise DagmanError(
            "LEAK",
            plan.source,
            f"{len(torn)} patients stand on two sides of the column split ({', '.join(torn[:5])})",
            "put every patient on one side",
            exit_code=ExitCode.REFUSED,
        )
    train, chosen, test = (
        [i for i, side in enumerate(plan.splits) if side == word] for word in ("train", "validation", "test")
    )
    if unknown or not train or not test or not plan.holds[train].any(axis=0).all():
        problem = f"{len(train)} train and {len(test)} test cases" + (
            f", unknown {', '.join(unknown)}" if unknown else ""
        )
        raise DagmanError(
            "FOLDS", plan.source, f"column split gives {problem}", "write train, validation, test; every class in train"
        )
    part = _part(plan, 0, train, test, fraction=fraction, seed=seed, hold_out=not chosen)
    return part if not chosen else Part(number=0, train=part.train, held_out=_rows(plan, chosen), test=part.test)


def _part(
    plan: Study,
    number: int,
    train: Sequence[int],
    test: Sequence[int],
    *,
    fraction: float,
    seed: int,
    hold_out: bool = True,
) -> Part:
    """Few-shot and early choice, both by whole patients in one drawn order."""
    patients = sorted({plan.groups[index] for index in train})
    order = [patients[i] for i in randomness.generator(seed, "segment.few", number).permutation(len(patients))]
    kept = order[: max(1, math.ceil(fraction * len(order) - 1e-9))]
    most = max(1, round(HELD_OUT_RATIO * len(kept))) if hold_out and len(kept) > 2 else 0
    held = _held_out(plan, [index for index in train if plan.groups[index] in kept], list(reversed(kept)), most)
    learnt = [index for index in train if plan.groups[index] in kept and plan.groups[index] not in held]
    if not plan.holds[learnt].any(axis=0).all():
        raise DagmanError(
            "FOLDS",
            f"fold {number}",
            f"the {len(kept)} patients of the fraction {fraction:g} do not hold every class",
            "take a larger fraction, or leave rare classes out with --labels",
        )
    return Part(
        number=number,
        train=_rows(plan, learnt),
        held_out=_rows(plan, [index for index in train if plan.groups[index] in held]),
        test=_rows(plan, test),
    )


def _held_out(plan: Study, train: Sequence[int], patients: Sequence[str], wanted: int) -> list[str]:
    """Patients to choose the best step on, of every class as far as the training part keeps every class too.

    A class that no patient can stand for may cost more patients than wanted, up to half of them.
    """
    of = {patient: [index for index in train if plan.groups[index] == patient] for patient in patients}
    cases = {patient: plan.holds[rows].sum(axis=0) for patient, rows in of.items()}
    left, missing = plan.holds[list(train)].sum(axis=0), np.ones(len(plan.classes), bool)
    held: list[str] = []
    while wanted and len(held) < (max(wanted, len(patients) // 2) if missing.any() else wanted):
        able = [each for each in patients if each not in held and (left - cases[each] > 0).all()]
        gains = [int((missing & (cases[each] > 0)).sum()) for each in able]
        if not able or (len(held) >= wanted and not max(gains)):
            break
        held.append(able[int(np.argmax(gains))])
        left, missing = left - cases[held[-1]], missing & (cases[held[-1]] == 0)
    return held


def _rows(plan: Study, indices: Sequence[Any]) -> tuple[int, ...]:
    return tuple(plan.rows[index] for index in indices)
