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
    "Intervals draw patients again, the same for all; DeLong's p takes cases as independent, so there is none where a "
    "patient has several. Models are not fitted again."
)


class Row(NamedTuple):
    """One classification beside the first."""

    name: str
    auc: Estimate
    difference: Estimate | None
    """AUC of the first less this one's; None for the first itself."""
    p: float | None
    """DeLong's, of two classes; None where a patient has several cases, which it takes as independent."""


def rows(found: Mapping[str, Predictions]) -> list[Row]:
    """One row each.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, when they do not share cases, labels and folds.
    """
    first = next(iter(found.values()))
    made = []
    for name, one in found.items():
        predictions.check_comparable(first, one, name)
        if one is first:
            made.append(Row(name, one.auc(), None, None))
            continue
        test = None
        if len(one.names) == 2 and len(np.unique(one.groups)) == len(one.groups):
            test = delong.compare(first.probability, one.probability, one.positive, one.fold)
        made.append(Row(name, one.auc(), predictions.difference(first, one), test.p if test else None))
    return made


def lines(made: Sequence[Row]) -> list[str]:
    """For a person."""
    width = max(len(row.name) for row in made)
    return [f"{'':{width}s}  {'AUC':24s} {'first minus this':26s} DeLong's p"] + [
        f"{row.name:{width}s}  {row.auc!s:24s} {'' if row.difference is None else str(row.difference):26s} "
        f"{'' if row.p is None else f'{row.p:.3g}'}"
        for row in made
    ]


def write(made: Sequence[Row], folder: Path) -> Path:
    """Write `comparison.csv`."""

    def cells(estimate: Estimate | None) -> list[object]:
        values = [None] * 3 if estimate is None else [estimate.value, estimate.low, estimate.high]
        return ["" if value is None else value for value in values]

    header = ("result", "auc", "auc_low", "auc_high", "difference", "difference_low", "difference_high", "delong_p")
    path = folder / "comparison.csv"
    write_rows(
        path,
        header,
        ([row.name, *cells(row.auc), *cells(row.difference), "" if row.p is None else row.p] for row in made),
    )
    return path
