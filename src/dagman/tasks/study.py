"""Which cases a segmentation learns from, chooses on and is tested with: patients whole, classes present."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped

from dagman import randomness
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.tasks import protocol as protocols
from dagman.tasks.classes import Classes, choose
from dagman.tasks.protocol import HELD_OUT_RATIO, GroupBy, Part, Protocol, Sides

_ATTEMPTS = 50


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a table or store says of one case."""

    case_id: str
    patient: str | None
    split: str | None
    labels: frozenset[int] | None
    """That its mask holds; None without a mask."""
    names: Mapping[int, str] = field(default_factory=dict)
    """What its labels are called, where that is known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """The cases that have masks."""

    source: Path
    rows: tuple[int, ...]
    """Of the store or table."""
    splits: tuple[str | None, ...]
    groups: Shaped[np.ndarray, " cases"]
    """Patient of each."""
    holds: Bool[np.ndarray, "cases classes"]
    """Whether a case holds a class."""
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
            names=label_names(row),
        )
        for row in store.rows
    ]


def label_names(row: Mapping[str, Any]) -> dict[int, str]:
    """What a manifest's row calls the labels of its mask."""
    return {int(label): name for label, name in ((row["mask"] or {}).get("names") or {}).items()}


def agreed(names: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """Names of labels that nobody contradicts, each of one label."""
    said: dict[int, set[str]] = {}
    for one in names:
        for label, name in one.items():
            said.setdefault(label, set()).add(name)
    found = {label: next(iter(given)) for label, given in said.items() if len(given) == 1}
    uses = Counter(found.values())
    return {label: name for label, name in found.items() if uses[name] == 1}


def study(source: Path, cases: Sequence[Case], *, labels: str | None, group_by: GroupBy = "patient") -> Study:
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
    ids, patients = [case.case_id for _, case, _ in masked], [case.patient for _, case, _ in masked]
    groups = protocols.groups(ids, patients, group_by, source)
    names = agreed(case.names for _, case, _ in masked)
    classes = choose(labels, set().union(*(present for _, _, present in masked)), names)
    return Study(
        source=source,
        rows=tuple(number for number, _, _ in masked),
        splits=tuple(case.split for _, case, _ in masked),
        groups=groups,
        holds=np.array([[not present.isdisjoint(values) for values in classes.labels] for _, _, present in masked]),
        classes=classes,
        left_out={"no mask": len(cases) - len(masked)} if len(masked) < len(cases) else {},
    )


def parts(plan: Study, protocol: Protocol) -> tuple[Part, ...]:
    """Folds by patient, or what the column `split` gives.

    Args:
        plan: From `study`, grouped as the protocol says.
        protocol: How it is cut.

    Raises:
        DagmanError: `E-FOLDS` where a training part would lack a class or be empty; `E-LEAK`, exit code 4, where the
            column puts a patient on two sides.
    """
    sides = protocols.from_column(plan.splits, plan.groups, plan.source) if protocol.split else _drawn(plan, protocol)
    return tuple(_part(plan, each, protocol) for each in sides)


def _drawn(plan: Study, protocol: Protocol) -> list[Sides]:
    """Folds of about one size, patients whole, every class in every training part."""
    from sklearn.model_selection import GroupKFold

    num_patients, folds = len(set(plan.groups)), protocol.folds
    for attempt in range(_ATTEMPTS if num_patients >= folds else 0):
        state = randomness.torch_seed(protocol.seed, "segment.folds", attempt) % 2**32
        fold = np.empty(len(plan.rows), dtype=np.int64)
        splitter = GroupKFold(folds, shuffle=True, random_state=state)
        for number, (_, test) in enumerate(splitter.split(plan.holds, groups=plan.groups)):
            fold[test] = number
        if all(plan.holds[fold != number].any(axis=0).all() for number in range(folds)):
            return protocols.from_folds(fold)
    counts = [len(set(plan.groups[column])) for column in plan.holds.T]
    told = ", ".join(f"{count} with {name}" for count, name in zip(counts, plan.classes.names, strict=True))
    raise DagmanError(
        "FOLDS",
        plan.source,
        f"{num_patients} patients, {told}: not every training part of {folds} folds can hold every class",
        "segment more patients, leave rare classes out with --labels, or change --folds",
    )


def _part(plan: Study, sides: Sides, protocol: Protocol) -> Part:
    """Few-shot and early choice, both by whole patients in one drawn order."""
    draws = randomness.generator(protocol.seed, "segment.few", protocol.draw, sides.number)
    kept, chosen = (protocol.kept(_order(plan, rows, draws)) for rows in (sides.train, sides.chosen))
    most = max(1, round(HELD_OUT_RATIO * len(kept))) if not chosen and len(kept) > 2 else 0
    held = _held_out(plan, _of(plan, sides.train, kept), list(reversed(kept)), most)
    learnt = _of(plan, sides.train, set(kept) - set(held))
    if not plan.holds[learnt].any(axis=0).all():
        raise DagmanError(
            "FOLDS",
            f"fold {sides.number}",
            f"the {len(kept)} patients of the fraction {protocol.fraction:g} do not hold every class",
            "take a larger fraction, or leave rare classes out with --labels",
        )
    return Part(
        number=sides.number,
        train=_rows(plan, learnt),
        held_out=_rows(plan, _of(plan, sides.train, held) or _of(plan, sides.chosen, chosen)),
        test=_rows(plan, sides.test),
    )


def _order(plan: Study, rows: np.ndarray, draws: np.random.Generator) -> list[str]:
    patients = sorted(set(plan.groups[rows].tolist()))
    return [patients[place] for place in draws.permutation(len(patients))]


def _of(plan: Study, rows: np.ndarray, patients: Collection[str]) -> list[int]:
    """Those of the rows that are of these patients."""
    return [int(row) for row in rows if plan.groups[row] in patients]


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


def _rows(plan: Study, indices: Iterable[Any]) -> tuple[int, ...]:
    return tuple(plan.rows[index] for index in indices)
