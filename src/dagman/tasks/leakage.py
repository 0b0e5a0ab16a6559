"""Whether weights have seen what a study tests on: by voxels, by patient, or with labels. It is said in every result.

A CT that pretraining saw without its label is counted and named. Refused are weights that were trained on labels of the
study's cases for the same task, and a CT that stands on two sides of the study under different names.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dagman import files
from dagman.ct.case import source_sha256
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.types import Scan

CASES = "cases.jsonl"
"""Beside weights: each case that they were trained on, its patient, hash of its voxels and, for labels, the task."""
VOXELS, PATIENT = "voxels", "patient"
_HASH = re.compile(r"[0-9a-f]{12}")
"""Of a DICOM PatientID, as `ct.index` gives it."""
_NAMED, _UNSAID = "by name", "by a key that an earlier version did not note"


class Seen(NamedTuple):
    """What weights have seen of a store."""

    known: bool
    """False where some of their training has no list of cases."""
    how: dict[str, str]
    """Case to `voxels` (the same CT) or `patient` (another CT of the same patient)."""
    learnt: dict[str, list[str]]
    """Case to the tasks whose labels, of it or of another CT of its patient, the weights were trained on."""
    patients_known: bool = True
    """False where patients cannot tell: some case has none, or the two sides have names and DICOM's hashes, or hashes
    by different keys."""


UNKNOWN = Seen(False, {}, {}, patients_known=False)
"""Of features without a word on where they come from."""


def record(
    rows: Iterable[Mapping[str, Any]],
    folder: Path,
    *,
    task: str | None = None,
    start: Path | None = None,
    head: bool = False,
) -> None:
    """Write the cases that weights are trained on into their folder.

    Args:
        rows: Of the store's manifest.
        folder: Of the run or classifier.
        task: Whose labels are learnt, such as `classification`; None for pretraining.
        start: Weights that this training starts from: their list comes first.
        head: Only what stands on the encoder learns: whoever takes the encoder alone has seen none of it.
    """
    said = [] if start is None else [row for row in _listed(start) if not row.get("head")]
    more = ({"task": task} if task else {}) | ({"head": True} if head else {})
    said += [told(row) | more for row in rows]
    files.write_text(folder / CASES, "".join(map(files.json_line, said)))


def told(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a list of cases keeps of a manifest's row."""
    names = ("case_id", "patient", "voxel_sha256", *(["patient_key"] if row.get("patient_key") else []))
    return {name: row.get(name) for name in names} | {"source_sha256": _source(row)}


def _source(row: Mapping[str, Any]) -> str | None:
    """Hash of a case's files, which tells it in another preparation; None where many cases share a file."""
    return None if row.get("window_hu") else row.get("source_sha256")


def _listed(weights: Path) -> list[dict[str, Any]]:
    """What weights were trained on; a row without a case where there is no list."""
    place = weights.absolute()
    whole = place.is_dir() and not (place / "model.safetensors").is_file()
    folder = place if place.is_dir() else place.parent
    near = [folder] if whole else [folder, folder.parent]
    file = next((folder / CASES for folder in near if (folder / CASES).is_file()), None)
    if file is None:
        return [{"case_id": None, "patient": None, "voxel_sha256": None}]
    return files.read_lines(file, required=("case_id", "patient", "voxel_sha256"))


def seen(rows: Sequence[Mapping[str, Any]], weights: Path | None, *, head: bool = False) -> Seen:
    """Which cases weights have seen.

    Args:
        rows: Of the manifest of a store, or such as `scan_rows`.
        weights: A folder or file of weights; None for new random ones.
        head: Of the classifier or segmenter that lies there as a whole, not of its encoder alone.

    Raises:
        DagmanError: `E-MANIFEST` for a damaged list.
    """
    if weights is None:
        return Seen(True, {}, {})
    listed = [row for row in _listed(weights) if head or not row.get("head")]
    names = ("voxel_sha256", "source_sha256", "patient")
    voxels, sources, patients = ({row.get(name) for row in listed} - {None} for name in names)
    tasks: dict[tuple[str, str], set[str]] = {}
    for learnt_row in listed:
        for name in names:
            if learnt_row.get("task") and learnt_row.get(name):
                tasks.setdefault((name, learnt_row[name]), set()).add(learnt_row["task"])
    how: dict[str, str] = {}
    learnt: dict[str, list[str]] = {}
    for row in rows:
        case = str(row["case_id"])
        keys = {name: row.get(name) for name in names} | {"source_sha256": _source(row)}
        if keys["voxel_sha256"] in voxels or keys["source_sha256"] in sources:
            how[case] = VOXELS
        elif keys["patient"] in patients:
            how[case] = PATIENT
        if found := set[str]().union(*(tasks.get((name, str(key)), ()) for name, key in keys.items())):
            learnt[case] = sorted(found)
    known = all(row["case_id"] is not None for row in listed)
    return Seen(known, how, learnt, known and _share_patients(listed, rows))


def scan_rows(scans: Iterable[Scan]) -> list[dict[str, Any]]:
    """What `seen` asks of scans that no store holds: their voxels are known by the hash of their files.

    A file that cannot be read has none: whoever reads the scan tells of it.
    """

    def digest(scan: Scan) -> str | None:
        try:
            return source_sha256(scan.files)
        except OSError:
            return None

    return [{"case_id": scan.case_id, "patient": scan.patient, "source_sha256": digest(scan)} for scan in scans]


def _share_patients(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every case has a patient, and those of both sides are named in one way."""
    ways = {_way(row) for rows in (one, other) for row in rows}
    return None not in ways and (ways <= {_NAMED} or (_NAMED not in ways and len(ways - {_UNSAID}) <= 1))


def _way(row: Mapping[str, Any]) -> str | None:
    """How a row names its patient: the id of the key that hashed it, or by a name; None where it names none."""
    patient = str(row.get("patient") or "")
    if not patient:
        return None
    return str(row.get("patient_key") or _UNSAID) if _HASH.fullmatch(patient) else _NAMED


def twins(store: PreparedStore) -> list[list[str]]:
    """Cases with the same voxels."""
    same: dict[str, list[str]] = {}
    for row in store.rows:
        if row.get("voxel_sha256"):
            same.setdefault(row["voxel_sha256"], []).append(str(row["case_id"]))
    return [cases for cases in same.values() if len(cases) > 1]


def refuse(what: Seen, same: Sequence[Sequence[str]], group_of: Mapping[str, str], task: str) -> None:
    """Refuse a study that would test on what was learnt.

    Args:
        what: What the weights it starts from have seen.
        same: Cases with the same voxels.
        group_of: Case to what stays together, a patient or a side of a fixed split, of all cases of the study.
        task: Of the study, such as `classification`.

    Raises:
        DagmanError: `E-LEAK`, exit code 4.
    """
    learnt = [case for case in group_of if task in what.learnt.get(case, ())]
    if learnt:
        by_name = sum(what.how.get(case) == PATIENT for case in learnt)
        of_patients = f" ({by_name} by the name of the patient)" if by_name else ""
        renamed = "; rename patients who are other people" if by_name else ""
        raise _leak(
            f"the weights were trained on labels of {len(learnt)} of its cases, or of their patients{of_patients}",
            learnt,
            f"start from pretrained weights, or test on other patients{renamed}",
        )
    torn = [cases for cases in same if len({group_of[case] for case in cases if case in group_of}) > 1]
    if torn:
        raise _leak(
            f"{len(torn)} CTs stand in it under several names, which may come to training and test",
            torn[0],
            "give the same CT the same patient and split, or keep one of them",
        )


def _leak(problem: str, cases: Sequence[str], advice: str) -> DagmanError:
    named = ", ".join(cases[:5]) + (", ..." if len(cases) > 5 else "")
    return DagmanError("LEAK", "study", f"{problem} ({named})", advice, exit_code=ExitCode.REFUSED)


def report(what: Seen, tested: Iterable[str]) -> dict[str, Any]:
    """Plain values for a result: how many of the tested cases the weights have seen, and which."""
    tested = list(tested)
    found: dict[str, Any] = {"known": what.known, "patients_known": what.patients_known, "tested": len(tested)}
    by_word = {word: [case for case in tested if what.how.get(case) == word] for word in (VOXELS, PATIENT)}
    for name, cases in {**by_word, "labels": [case for case in tested if case in what.learnt]}.items():
        found[f"same_{name}"] = {"count": len(cases), "cases": sorted(cases)}
    return found


def check_report(found: Any, path: Path) -> None:
    """Refuse what a file gives as a `report` and is none; None stands for a result without.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4.
    """
    try:
        together([found], ())
    except (KeyError, TypeError, AttributeError) as error:
        raise DagmanError(
            "COMPARE",
            path,
            f"its `pretraining_overlap` does not say what pretraining saw ({type(error).__name__})",
            "make the result again, or take that entry out: what pretraining saw is then unknown",
            exit_code=ExitCode.REFUSED,
        ) from None


def together(reports: Sequence[Mapping[str, Any] | None], tested: Iterable[str]) -> dict[str, Any]:
    """What any of several results' weights have seen of the cases that all of them tested.

    Args:
        reports: From `report`, one a result; None of a result that has none: what its weights saw is unknown.
        tested: The cases.
    """
    given = [one for one in reports if one is not None]
    names = (f"same_{VOXELS}", f"same_{PATIENT}", "same_labels")
    cases = {name: {case for one in given for case in one[name]["cases"]} for name in names}
    cases[names[1]] -= cases[names[0]]
    whole = len(given) == len(reports)
    short = {  # lists of earlier versions name some of the cases alone
        name: max((one[name]["count"] for one in given if len(one[name]["cases"]) < one[name]["count"]), default=0)
        for name in names
    }
    return {
        "known": whole and all(one["known"] for one in given),
        "patients_known": whole and all(one.get("patients_known", False) for one in given),
        "tested": len(set(tested)),
        **{name: {"count": max(len(found), short[name]), "cases": sorted(found)} for name, found in cases.items()},
    }


def line(found: dict[str, Any]) -> str:
    """The same for a person."""
    voxels, patient, labels = (found[f"same_{word}"] for word in (VOXELS, PATIENT, "labels"))
    said = ""
    if not found["known"]:
        said = "whether pretraining saw the tested cases is unknown: no list of its cases is there"
    elif not found["patients_known"]:
        said = (
            "whether it saw other CTs of their patients is unknown: cases lack a patient, or names differ in kind or "
            "in DAGMAN_PATIENT_KEY (prepare them from tables with a column `patient`, or with the same key)"
        )
    if voxels["count"] or patient["count"]:
        names = ", ".join((voxels["cases"] + patient["cases"])[:5])
        how = f"with labels of {labels['count']} of them" if labels["count"] else "without their labels"
        others = f", and other CTs of the patients of {patient['count']} more" if patient["count"] else ""
        counted = f"pretraining saw {voxels['count']} of the {found['tested']} tested cases{others} ({names}), {how}"
        return f"{counted}; {said}" if said else counted
    none = f"pretraining saw none of the {found['tested']} tested cases"
    return none if not said else f"{none}; {said}" if found["known"] else said
