"""Whether pretraining has seen what a study tests on: by voxels, or by patient. It is said in every result."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dagman import files
from dagman.ct.store import PreparedStore

CASES = "cases.jsonl"
"""In a run folder: each case that was trained on, its patient and the hash of its voxels."""
VOXELS, PATIENT = "voxels", "patient"
LISTED = 20


class Seen(NamedTuple):
    """What pretraining saw of a store."""

    known: bool
    """False where the weights' file does not lie in a run folder with its list of cases."""
    how: dict[str, str]
    """Case to `voxels` (the same CT) or `patient` (another CT of the same patient)."""


def record(store: PreparedStore, rows: Sequence[int], folder: Path) -> None:
    """Write the cases that a run trains on into its folder."""
    said = [{name: store.rows[row].get(name) for name in ("case_id", "patient", "voxel_sha256")} for row in rows]
    files.write_text(folder / CASES, "".join(map(files.json_line, said)))


def cases_file(weights: Path) -> Path | None:
    """The list of cases that belongs to weights: beside them, or in the run folder around them."""
    near = [weights, weights.parent, weights.parent.parent]
    return next((folder / CASES for folder in near if (folder / CASES).is_file()), None)


def seen(store: PreparedStore, weights: Path | None) -> Seen:
    """Which cases of a store pretraining has seen.

    Args:
        store: The labelled cases.
        weights: Of the encoder; None for one without pretraining.

    Raises:
        DagmanError: `E-MANIFEST` for a damaged list.
    """
    if weights is None:
        return Seen(True, {})
    file = cases_file(weights)
    if file is None:
        return Seen(False, {})
    rows = files.read_lines(file, required=("case_id", "patient", "voxel_sha256"))
    voxels, patients = ({row[name] for row in rows} - {None} for name in ("voxel_sha256", "patient"))
    how = {}
    for row in store.rows:
        if row.get("voxel_sha256") in voxels:
            how[str(row["case_id"])] = VOXELS
        elif row.get("patient") in patients:
            how[str(row["case_id"])] = PATIENT
    return Seen(True, how)


def report(what: Seen, tested: Iterable[str]) -> dict[str, Any]:
    """Plain values for a result: how many of the tested cases pretraining has seen, and which."""
    tested = list(tested)
    found: dict[str, Any] = {"known": what.known, "tested": len(tested)}
    for word in (VOXELS, PATIENT):
        cases = sorted(case for case in tested if what.how.get(case) == word)
        found[f"same_{word}"] = {"count": len(cases), "cases": cases[:LISTED]}
    return found


def line(found: dict[str, Any]) -> str:
    """The same for a person."""
    if not found["known"]:
        return "whether pretraining saw the tested cases is unknown: the weights do not lie in their run folder"
    voxels, patient = found["same_voxels"]["count"], found["same_patient"]["count"]
    if not voxels and not patient:
        return f"pretraining saw none of the {found['tested']} tested cases"
    names = ", ".join((found["same_voxels"]["cases"] + found["same_patient"]["cases"])[:5])
    return (
        f"pretraining saw {voxels} of the {found['tested']} tested cases, and other CTs of the patients of {patient} "
        f"more ({names}), without their labels"
    )
