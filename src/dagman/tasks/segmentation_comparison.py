"""Segmentations of the same cases side by side: each score of the first less that of each other, case by case."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args

import numpy as np

from dagman.errors import DagmanError, ExitCode
from dagman.tasks import segmentation_scores, statistics
from dagman.tasks.overlap import Overlap
from dagman.tasks.segmentation_scores import TOLD, Row
from dagman.tasks.statistics import Estimate
from dagman.tasks.table import write_rows

NOTE = "Over the cases whose reference holds the class; intervals draw patients again, the same for all."


class Difference(NamedTuple):
    """One score of one class."""

    name: str
    """Of the result."""
    label: str
    """Of the class."""
    score: str
    value: Estimate
    difference: Estimate | None
    """The first's less this one's; None for the first itself."""
    cases: int
    """That count: their reference holds the class, and the score has a value."""
    patients: int
    """Of those cases; a case without patient is its own."""
    lesions: int | None
    """Of those cases, where the score is a share of lesions."""


def read(folder: Path) -> list[Row]:
    """The rows that `segment train` or `segment score` wrote.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, for a folder without them, or of no case.
    """
    path = folder / "cases.csv"
    problem = "holds no case"
    try:
        with path.open(newline="") as stream:
            rows = [
                Row(case_id=row["case_id"], patient=row["patient"], name=row["class"], scores=_overlap(row))
                for row in csv.DictReader(stream)
            ]
    except (OSError, KeyError, ValueError) as error:
        rows, problem = [], f"cannot be read ({type(error).__name__})"
    if rows:
        return rows
    raise DagmanError(
        "COMPARE",
        path,
        problem,
        "give the output folder of `dagman segment train` or `dagman segment score`",
        exit_code=ExitCode.REFUSED,
    )


def _overlap(row: Mapping[str, str]) -> Overlap:
    values: dict[str, Any] = {}
    for field in fields(Overlap):
        kinds = get_args(field.type) if isinstance(field.type, UnionType) else (field.type,)
        kind = next((one for one in kinds if one in (int, float)), None)
        text = row[field.name]
        values[field.name] = None if kind and not text else kind(text) if kind else text
    return Overlap(**values)


def differences(found: Mapping[str, Sequence[Row]], *, seed: int = 0) -> list[Difference]:
    """Every score of `TOLD`, class by class, over the cases whose reference holds the class.

    Args:
        found: Name to rows; the first is compared with the others.
        seed: Of the bootstrap.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, when they do not share cases, patients, classes and references.
    """
    held = {name: [row for row in rows if row.scores.lesions] for name, rows in found.items()}
    ordered = {name: sorted(rows, key=lambda row: (row.name, row.case_id)) for name, rows in held.items()}
    first = next(iter(ordered.values()))
    if not first:
        advice = "score cases that have something to find"
        raise DagmanError(
            "COMPARE", next(iter(found)), "no reference holds any class", advice, exit_code=ExitCode.REFUSED
        )
    made = []
    for name, rows in ordered.items():
        if apart := {_same(row) for row in rows} ^ {_same(row) for row in first}:
            case, _, label, *_ = min(apart)
            raise DagmanError(
                "COMPARE",
                name,
                f"its cases, patients, classes or references differ from the first one's, such as {label} of {case}",
                "score the same references of the same cases, on the same voxels",
                exit_code=ExitCode.REFUSED,
            )
        for label in dict.fromkeys(row.name for row in rows):
            mine, others = ([row for row in some if row.name == label] for some in (rows, first))
            patients = np.array([row.patient for row in mine])
            for score in TOLD:
                here, there = (segmentation_scores.statistics_of(some)[score] for some in (mine, others))
                value = statistics.estimate(here, patients, seed=seed)

                def above(weights: np.ndarray, here: Any = here, there: Any = there) -> np.ndarray:
                    gained: np.ndarray = there(weights) - here(weights)
                    return gained

                more = None if rows is first else statistics.estimate(above, patients, seed=seed)
                counted = np.isfinite(here(np.eye(len(mine))))
                lesions = sum(row.scores.lesions for row in mine) if score == "lesion_sensitivity" else None
                counts = int(counted.sum()), len(set(patients[counted])), lesions
                made.append(Difference(name, label, score, value, more, *counts))
    return made


def _same(row: Row) -> tuple[Any, ...]:
    return row.case_id, row.patient, row.name, row.scores.lesions, round(row.scores.reference_cc, 3)


def lines(made: Sequence[Difference]) -> list[str]:
    """For a person."""
    what = [f"{row.label}, {row.score.replace('_', ' ')}" for row in made]
    what = [f"{text} of {row.lesions}" if row.lesions else text for text, row in zip(what, made, strict=True)]
    names, words = max(len(row.name) for row in made), max(map(len, what))
    told = [f"{'':{names + words + 2}s}  cases  patients  {'score':26s}  first minus this"]
    for row, text in zip(made, what, strict=True):
        more = "" if row.difference is None else str(row.difference)
        counts = f"{row.cases:5d}  {row.patients:8d}"
        told.append(f"{row.name:{names}s}  {text:{words}s}  {counts}  {row.value!s:26s}  {more}".rstrip())
    return told


def write(made: Sequence[Difference], folder: Path) -> Path:
    """Write `comparison.csv`."""

    def cells(estimate: Estimate | None) -> list[object]:
        values = [None] * 3 if estimate is None else [estimate.value, estimate.low, estimate.high]
        return ["" if value is None else value for value in values]

    path = folder / "comparison.csv"
    header = (
        *("result", "class", "score", "cases", "patients", "lesions"),
        *("value", "low", "high", "difference", "difference_low", "difference_high"),
    )
    write_rows(
        path,
        header,
        (
            [
                *(row.name, row.label, row.score, row.cases, row.patients, "" if row.lesions is None else row.lesions),
                *(*cells(row.value), *cells(row.difference)),
            ]
            for row in made
        ),
    )
    return path
