"""How a labelled study is cut into parts to learn from, to choose on and to be tested with, whatever its task."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Shaped

from dagman.errors import DagmanError, ExitCode

GroupBy = Literal["patient", "case"]
HELD_OUT_RATIO = 0.2
"""Of the patients of a training part, to choose the best step on."""
_SIDES = ("train", "validation", "test")
_FOLD = re.compile(r"fold-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One fold, as row numbers."""

    number: int
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    """Of the training part, to choose the best step on; empty where a class has too few patients."""
    test: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a labelled study is cut into parts to learn from and to be tested on."""

    folds: int = 3
    """The paper's."""
    split: bool = False
    """Take the column `split` (train, validation, test; or fold-0, fold-1, ...) in place of folds drawn here."""
    fraction: float = 1.0
    """Of the patients to learn from and to choose on; a smaller part of a draw lies inside a larger one."""
    draw: int = 0
    """Which draw of the fraction."""
    group_by: GroupBy = "patient"
    """`case` where patients are unknown; it is then written into the result."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise DagmanError("CONFIG", "fraction", f"cannot be {self.fraction}", "give a share above 0, up to 1")
        if self.folds < 2:
            raise DagmanError("CONFIG", "folds", f"cannot be {self.folds}", "give at least 2, or use the split column")
        if self.split and self.folds != Protocol.folds:
            raise DagmanError(
                "CONFIG", "folds", f"{self.folds} are to be drawn, but the split says its own", "give one of both"
            )

    @property
    def words(self) -> str:
        """For a person."""
        how = "split column" if self.split else f"{self.folds} folds by {self.group_by}"
        return how if self.fraction == 1 else f"{how}, {self.fraction:.0%} of the training patients, draw {self.draw}"

    def kept(self, order: Sequence[str]) -> list[str]:
        """The first of some patients in a drawn order, as many as the fraction says, rounded up."""
        return list(order[: math.ceil(self.fraction * len(order) - 1e-9)])


BY_PATIENT = Protocol()
"""Three folds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sides:
    """Positions of the cases of one part."""

    number: int
    train: Shaped[np.ndarray, " learnt"]
    chosen: Shaped[np.ndarray, " chosen"]
    """To choose the best step on; empty where that is left to a draw from `train`."""
    test: Shaped[np.ndarray, " tested"]


def groups(
    case_ids: Sequence[str], patients: Sequence[str | None], group_by: GroupBy, subject: object
) -> Shaped[np.ndarray, " cases"]:
    """What keeps cases together: each one's patient, or the case itself.

    Raises:
        DagmanError: `E-PATIENT`, exit code 4, for cases without patient.
    """
    if group_by == "case":
        return np.array(case_ids)
    without = [case for case, patient in zip(case_ids, patients, strict=True) if not patient]
    if without:
        raise DagmanError(
            "PATIENT",
            subject,
            f"{len(without)} of {len(case_ids)} cases have no patient ({', '.join(without[:5])}): "
            "one patient's scans could stand in training and test",
            "add a patient column, or say --group-by case, which is then written into the result",
            exit_code=ExitCode.REFUSED,
        )
    return np.array([str(patient) for patient in patients])


def from_folds(fold: Shaped[np.ndarray, " cases"]) -> list[Sides]:
    """One part for each fold, numbered from 0, which tests it; training parts choose on what is drawn from them."""
    nothing = np.array([], dtype=np.int64)
    return [
        Sides(
            number=number,
            train=np.flatnonzero(fold != name),
            chosen=nothing,
            test=np.flatnonzero(fold == name),
        )
        for number, name in enumerate(np.unique(fold))
    ]


def from_column(splits: Sequence[str | None], groups: Shaped[np.ndarray, " cases"], subject: object) -> list[Sides]:
    """What the column `split` says: one part for train, validation and test, or one for each of its own folds.

    Args:
        splits: Of each case; what says nothing is for training.
        groups: From `groups`.
        subject: For messages.

    Raises:
        DagmanError: `E-FOLDS` for other words, or where nothing is left to learn from or to test; `E-LEAK`, exit code
            4, for a patient on two sides.
    """
    column = np.array([split or "train" for split in splits])
    torn = [str(name) for name in np.unique(groups) if len(set(column[groups == name])) > 1]
    if torn:
        raise DagmanError(
            "LEAK",
            subject,
            f"{len(torn)} patients stand on two sides of the column split ({', '.join(torn[:5])})",
            "put every patient on one side",
            exit_code=ExitCode.REFUSED,
        )
    folds = [_FOLD.fullmatch(word) for word in column]
    if folds and all(folds):
        found = from_folds(np.array([int(fold[1]) for fold in folds if fold]))
    else:
        train, chosen, test = (np.flatnonzero(column == side) for side in _SIDES)
        found = [Sides(number=0, train=train, chosen=chosen, test=test)]
    unknown = sorted(set(column) - set(_SIDES)) if not all(folds) else []
    if unknown or not all(len(part.train) and len(part.test) for part in found):
        counts = " and ".join(f"{(column == side).sum()} {side}" for side in ("train", "test"))
        problem = f"has {counts} cases" + (f", and {', '.join(unknown[:5])}" if unknown else "")
        advice = "write train, validation and test for all cases, or fold-0, fold-1 and so on for all"
        raise DagmanError("FOLDS", subject, f"column split {problem}", advice)
    return found


def together(
    names: Sequence[str], group_of: Mapping[int, str], parts: Sequence[Part], protocol: Protocol
) -> dict[str, str]:
    """What keeps cases on one side, by their names: the patient, or the side itself where a table says it.

    Args:
        names: Of the cases that rows count.
        group_of: Row to patient, of the study's cases.
        parts: Of the study.
        protocol: That gave the parts.
    """
    if not protocol.split or len(parts) > 1:
        return {names[row]: group for row, group in group_of.items()}
    sides = {"training": (*parts[0].train, *parts[0].held_out), "test": parts[0].test}
    return {names[row]: side for side, rows in sides.items() for row in rows}
