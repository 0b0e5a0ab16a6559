"""Scores of many segmented cases: a row for each case and class, and means with intervals over patients.

Each mean stands for all cases, and again for those whose reference holds the class, those with a lesion above 3 cc
and those with smaller ones alone: small targets score lower for reasons of their own.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from dagman import files
from dagman.tasks import statistics
from dagman.tasks.classes import Classes
from dagman.tasks.overlap import Overlap, overlap
from dagman.tasks.table import write_rows

RULES = {
    "empty": "both empty: Dice and surface Dice 1, distance 0; one empty: Dice and surface Dice 0, distance the "
    "field's diagonal; counted under `states`, never dropped",
    "lesions": "connected parts of the reference (26 neighbours), found where one voxel is predicted; false positives "
    "are parts of the prediction without a voxel of the reference",
    "distances": "hd95_mm: the larger of the two directed 95th percentiles between surfaces (as MONAI); nsd_2mm "
    "counts surface voxels within 2 mm, not their area (as MONAI; DeepMind's weighs areas)",
    "grid": "native: the scan's (of `segment score` the reference's) own voxels and label file as drawn; store: the "
    "prepared store's voxels, to which the label file was resampled",
}
TOLD = ("dice", "hd95_mm", "nsd_2mm", "absolute_volume_error_percent", "lesion_sensitivity")
"""Scores that a person is told first."""
On = Literal["native", "store"]
_COLUMNS = tuple(field.name for field in fields(Overlap))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One class in one case."""

    case_id: str
    patient: str
    name: str
    """Of the class."""
    scores: Overlap
    grid: On = "native"
    """Whose voxels were compared: the scan's own, or the store's."""
    note: str = ""
    """What a person should look at."""


def compare(
    predicted: UInt8[np.ndarray, "x y z"],
    reference: UInt8[np.ndarray, "x y z"],
    classes: Classes,
    spacing_mm: tuple[float, float, float],
    *,
    case_id: str,
    patient: str | None,
    on: On = "native",
) -> list[Row]:
    """Rows of one case.

    Args:
        predicted: Class numbers.
        reference: Class numbers on the same grid.
        classes: Their names.
        spacing_mm: Voxel size.
        case_id: Name of the case.
        patient: Whose it is; the case stands for one where that is unknown.
        on: Which grid that is.
    """
    rows = []
    for number, name in enumerate(classes.names, 1):
        ours, theirs = predicted == number, reference == number
        scores = overlap(ours, theirs, spacing_mm)
        note = _mirrored(ours, theirs, scores.dice) if scores.state == "both" else ""
        rows.append(Row(case_id=case_id, patient=patient or case_id, name=name, scores=scores, grid=on, note=note))
    return rows


def _mirrored(ours: np.ndarray, theirs: np.ndarray, dice: float) -> str:
    """A hint where the mirror image of a bad prediction would be a good one."""
    if dice > 0.1:
        return ""
    for axis, word in enumerate(("left and right", "front and back", "head and feet")):
        turned = np.flip(ours, axis)
        better = 2 * np.count_nonzero(turned & theirs) / (np.count_nonzero(ours) + np.count_nonzero(theirs))
        if better > 0.5:
            return f"with {word} exchanged its Dice would be {better:.2f}: was it mirrored?"
    return ""


def summary(rows: Sequence[Row], *, group_by: Literal["patient", "case"] = "patient", seed: int = 0) -> dict[str, Any]:
    """All scores as plain values for JSON, by class and stratum.

    Args:
        rows: Of all cases.
        group_by: `case` where patients are unknown; it is then written into the result.
        seed: Of the bootstrap.
    """
    names = list(dict.fromkeys(row.name for row in rows))
    if group_by == "case":
        rows = [replace(row, patient=row.case_id) for row in rows]
    return {
        "cases": len({row.case_id for row in rows}),
        "patients": len({row.patient for row in rows}) if group_by == "patient" else None,
        "group_by": group_by,
        "warning": None
        if group_by == "patient"
        else "patients unknown or set aside: intervals count every case as its own patient",
        "grid": " and ".join(sorted({row.grid for row in rows})),
        "rules": {**RULES, "interval": f"95 %, bias-corrected and accelerated bootstrap over {group_by}s"},
        "seed": seed,
        "classes": {name: _class_summary([row for row in rows if row.name == name], seed) for name in names},
        "notes": {f"{row.case_id}, {row.name}": row.note for row in rows if row.note},
    }


def _class_summary(rows: list[Row], seed: int) -> dict[str, Any]:
    states = Counter(row.scores.state for row in rows)
    strata = {
        "all": rows,
        "with_reference": [row for row in rows if row.scores.lesions],
        "above_3cc": [row for row in rows if row.scores.large_lesions],
        "up_to_3cc": [row for row in rows if row.scores.lesions and not row.scores.large_lesions],
    }
    return {
        "states": {state: states.get(state, 0) for state in ("both", "neither", "missed", "invented")},
        "lesions": sum(row.scores.lesions for row in rows),
        "large_lesions": sum(row.scores.large_lesions for row in rows),
        **{name: {"cases": len(part), **_estimates(part, seed)} for name, part in strata.items()},
    }


def statistics_of(rows: Sequence[Row]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name of a score to what computes it from case weights (resamples, cases), as `statistics.estimate` asks."""

    def column(name: str) -> np.ndarray:
        values = [getattr(row.scores, name) for row in rows]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    means = {name: column(name) for name in ("dice", "hd95_mm", "nsd_2mm", "volume_error_cc")}
    means["absolute_volume_error_percent"] = np.abs(column("volume_error_percent"))
    means["false_positives_per_case"] = column("false_positives")
    scores: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        name: functools.partial(statistics.mean, values) for name, values in means.items()
    }
    for name, found, there in (
        ("lesion_sensitivity", "lesions_found", "lesions"),
        ("large_lesion_sensitivity", "large_lesions_found", "large_lesions"),
    ):
        scores[name] = functools.partial(statistics.ratio, column(found), column(there))
    return scores


def _estimates(rows: list[Row], seed: int) -> dict[str, Any]:
    scores = statistics_of(rows)
    patients = np.array([row.patient for row in rows])
    return {name: vars(statistics.estimate(score, patients, seed=seed)) for name, score in scores.items()}


def write(rows: Sequence[Row], result: dict[str, Any], folder: Path) -> list[Path]:
    """Write `cases.csv` and `result.json`; returns their paths."""
    paths = [folder / "cases.csv", folder / "result.json"]
    write_rows(
        paths[0],
        ("case_id", "patient", "class", *_COLUMNS, "grid", "note"),
        ((row.case_id, row.patient, row.name, *_cells(row.scores), row.grid, row.note) for row in rows),
    )
    files.write_json(paths[1], result)
    return paths


def _cells(scores: Overlap) -> list[object]:
    return ["" if value is None else value for value in asdict(scores).values()]


def lines(result: dict[str, Any]) -> list[str]:
    """The main scores for people, a line for each class and score: first over the cases whose reference holds it."""
    told = []
    for name, found in result["classes"].items():
        states = found["states"]
        told.append(
            f"{name}: {found['with_reference']['cases']} cases that hold it, of {found['all']['cases']}, "
            f"{states['neither']} empty in both, {states['missed']} missed, {states['invented']} where there is none, "
            f"{found['above_3cc']['cases']} with a lesion above 3 cc"
        )
        told += [_line(score, found["with_reference"][score]) for score in TOLD]
        told.append(_line("dice, empty references too", found["all"]["dice"]))
    return told


def _line(score: str, estimate: dict[str, Any]) -> str:
    return f"  {score.replace('_', ' '):30s} {statistics.Estimate(**estimate)}"


def mean_dice(rows: Sequence[Row]) -> float | None:
    """Over the rows whose reference holds the class; None without."""
    dice = [row.scores.dice for row in rows if row.scores.lesions]
    return float(np.mean(dice)) if dice else None


def ranked(rows: Sequence[Row]) -> list[str]:
    """Cases from the worst to the best mean Dice, of those whose reference holds something."""
    dice: dict[str, list[float]] = {}
    for row in rows:
        if row.scores.lesions:
            dice.setdefault(row.case_id, []).append(row.scores.dice)
    return sorted(dice, key=lambda case: (float(np.mean(dice[case])), case))


def shown(rows: Sequence[Row]) -> list[str]:
    """Worst, median and best case, once each."""
    order = ranked(rows)
    return list(dict.fromkeys([order[0], order[len(order) // 2], order[-1]])) if order else []
