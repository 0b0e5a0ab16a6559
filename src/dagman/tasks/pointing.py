"""Does attention point at what a mask outlines? Shares of one case, means over cases, intervals over patients."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32

from dagman import files
from dagman.tasks import statistics
from dagman.tasks.protocol import GroupBy
from dagman.tasks.table import write_rows


class Shares(NamedTuple):
    """The mask's part of the body, and of the body's attention."""

    of_attention: float
    of_body: float

    @property
    def gain(self) -> float:
        """1 is what uniform attention gets."""
        return self.of_attention / self.of_body


def shares(
    values: Float32[np.ndarray, "x y z"],
    mask: Bool[np.ndarray, "x y z"] | None,
    body: Bool[np.ndarray, "x y z"],
) -> tuple[Shares | None, str]:
    """The shares, or why there are none."""
    if mask is None:
        return None, "no mask"
    if not mask.any():
        return None, "the mask is empty"
    inside = mask & body
    if not inside.any():
        return None, "the mask lies outside the body"
    whole = values[body].sum(dtype=np.float64)
    if not whole > 0:
        return None, "no attention in the body"
    return Shares(float(values[inside].sum(dtype=np.float64) / whole), float(inside.sum() / body.sum())), ""


class Pointing(NamedTuple):
    """How an encoder looked at one case."""

    case_id: str
    patient: str | None
    weights: str
    lowest: float
    highest: float
    """Range of the map over the body, times uniform."""
    shares: Shares | None
    why: str = ""
    """Why there are no shares."""


def summary(rows: Sequence[Pointing], *, group_by: GroupBy = "patient", seed: int = 0) -> dict[str, Any]:
    """Mean gain of each set of weights with its interval, and how far it lies above the first one's, case by case.

    Args:
        rows: Of all cases and weights.
        group_by: What intervals draw again: `case` where patients are unknown.
        seed: Of the bootstrap.
    """
    names = list(dict.fromkeys(row.weights for row in rows))
    found: list[dict[str, Any]] = []
    gains: dict[str, dict[str, float]] = {}
    patient_of = {row.case_id: row.case_id if group_by == "case" else row.patient for row in rows}
    for name in names:
        mine = {row.case_id: row for row in rows if row.weights == name}
        gains[name] = {case: row.shares.gain for case, row in mine.items() if row.shares}
        row = {"weights": name, "cases": len(mine), "cases_with_gain": len(gains[name])}
        row["gain"] = _mean(gains[name], patient_of, seed)
        if name != names[0]:
            both = [case for case in gains[name] if case in gains[names[0]]]
            above = {case: gains[name][case] - gains[names[0]][case] for case in both}
            row["gain_above_first"] = _mean(above, patient_of, seed)
        found.append(row)
    return {
        "gain": "share of the body's attention inside the mask over the mask's share of the body; 1 is uniform",
        "interval": f"95 %, bias-corrected and accelerated bootstrap over {group_by}s",
        "group_by": group_by,
        "without_gain": {row.case_id: row.why for row in rows if not row.shares},
        "rows": found,
    }


def _mean(values: dict[str, float], patient_of: dict[str, str | None], seed: int) -> dict[str, Any]:
    found = statistics.mean_over_patients(
        np.array(list(values.values()), dtype=np.float64), [patient_of[case] for case in values], seed=seed
    )
    return vars(found)


def write(
    rows: Sequence[Pointing],
    folder: Path,
    *,
    group_by: GroupBy = "patient",
    seed: int = 0,
    found: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write `attention.csv`, a row for each case and weights, and `result.json`; returns their paths.

    Args:
        rows: Of all cases.
        folder: Where.
        group_by: As in `summary`.
        seed: Of the bootstrap.
        found: What else the result should say, as plain values.
    """
    paths = [folder / "attention.csv", folder / "result.json"]
    write_rows(
        paths[0],
        ("case_id", "patient", "weights", "lowest", "highest", "share_of_attention", "share_of_body", "gain", "why"),
        (
            (
                *(row.case_id, row.patient or "", row.weights, row.lowest, row.highest),
                *((*row.shares, row.shares.gain) if row.shares else ("", "", "")),
                row.why,
            )
            for row in rows
        ),
    )
    files.write_json(paths[1], {**summary(rows, group_by=group_by, seed=seed), **(found or {})})
    return paths
