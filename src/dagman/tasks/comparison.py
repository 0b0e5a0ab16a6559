"""Classifications of the same cases side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dagman.tasks import delong, predictions
from dagman.tasks.predictions import Predictions
from dagman.tasks.statistics import Estimate
from dagman.tasks.table import write_rows

NOTE = (
    "Intervals draw patients again, the same for all; DeLong's p takes the cases of a patient together. Models are not "
    "fitted again; in cross-validation both have their standard error times 1.41, as each fold's cases taught the "
    "models that test the others: careful where the classes are told well."
)


ONE_DRAW = (
    "Note: one untrained encoder is one draw of random weights, and by such intervals every third pair of untrained "
    "encoders is apart: compare with several (dagman embed --untrained --seed 1, 2, ...)"
)


class Row(NamedTuple):
    """One classification beside the first."""

    name: str
    auc: Estimate
    """Without an interval where it is the mean of several."""
    difference: Estimate | None
    """AUC of the first less this one's; None for the first itself."""
    p: float | None
    """DeLong's, of two classes, with the cases of a patient taken together; None where it cannot be told."""
    cases: int
    """Tested, the same of all."""
    patients: int | None
    """None where they are unknown."""
    positive: int | None
    """Cases of the positive class; None of more than two."""


def rows(found: Mapping[str, Predictions], untrained: Sequence[Sequence[str]] = ()) -> list[Row]:
    """One row each; at the end one for those that are alike.

    Args:
        found: Classifications by name; the first is held against all others.
        untrained: Names of those others that differ by their random weights alone, in groups; of each group of two or
            more a row at the end says how much the first lies above one of them.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, when they do not share cases, labels and folds.
    """
    first = next(iter(found.values()))
    counts = (
        len(first.case_ids),
        None if first.group_by == "case" else len(np.unique(first.groups)),
        int(first.positive.sum()) if len(first.names) == 2 else None,
    )
    made = []
    for name, one in found.items():
        predictions.check_comparable(first, one, name)
        if one is first:
            made.append(Row(name, one.auc(), None, None, *counts))
            continue
        test = None
        if len(one.names) == 2:
            scores = first.probability, one.probability
            test = delong.compare(*scores, one.positive, one.fold, len(one.thresholds), patients=one.groups)
        made.append(Row(name, one.auc(), predictions.difference(first, one), test.p if test else None, *counts))
    groups = [[found[name] for name in names] for names in untrained if len(names) > 1]
    for number, alike in enumerate(groups, 1):
        values = [one.auc().value for one in alike]
        mean = sum(value for value in values if value is not None) / len(alike) if None not in values else None
        auc = Estimate(value=mean, why=f"mean of {len(alike)}")
        more = predictions.difference_from_one_of(first, alike)
        which = f" of kind {number}" if len(groups) > 1 else ""
        made.append(Row(f"any of {len(alike)} untrained{which}", auc, more, None, *counts))
    return made


def lines(made: Sequence[Row]) -> list[str]:
    """For a person: how many were tested, then a table."""
    width, one = max(len(row.name) for row in made), made[0]
    positive = "" if one.positive is None else f" ({one.positive} positive)"
    patients = "patients unknown" if one.patients is None else f"{one.patients} patients"
    return [
        f"{one.cases} cases{positive}, {patients}",
        f"{'':{width}s}  {'AUC':24s} {'first minus this':26s} DeLong's p",
    ] + [
        f"{row.name:{width}s}  {row.auc!s:24s} {'' if row.difference is None else str(row.difference):26s} "
        f"{'' if row.p is None else f'{row.p:.3g}'}"
        for row in made
    ]


def write(made: Sequence[Row], folder: Path) -> Path:
    """Write `comparison.csv`."""

    def cells(estimate: Estimate | None) -> list[object]:
        values = [None] * 3 if estimate is None else [estimate.value, estimate.low, estimate.high]
        return ["" if value is None else value for value in values]

    header = (
        *("result", "cases", "patients", "positive"),
        *("auc", "auc_low", "auc_high", "difference", "difference_low", "difference_high", "delong_p"),
    )
    path = folder / "comparison.csv"
    write_rows(
        path,
        header,
        (
            [
                row.name,
                *("" if count is None else count for count in (row.cases, row.patients, row.positive)),
                *(*cells(row.auc), *cells(row.difference)),
                "" if row.p is None else row.p,
            ]
            for row in made
        ),
    )
    return path
