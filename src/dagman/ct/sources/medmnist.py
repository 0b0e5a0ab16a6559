"""MedMNIST's 3D sets: one `.npz` of small grey cubes with classes and an official split.

The files hold grey values 0 to 255 without Hounsfield units, voxel size or patients. In a store, grey 0 to 255 stand
for `WINDOW_HU`, the window encoders see by default, so that windowing gives back grey / 255 to the rounding of int16;
voxels are of the store's own size, and nothing is resampled or cropped. Whose an item is stays unknown.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dagman.ct import guard
from dagman.ct.sources.medmnist_files import ADVICE, MAX_LABELS, SPLITS, WINDOW_HU, hounsfield, refused
from dagman.ct.survey import Survey, clean_name
from dagman.errors import DagmanError
from dagman.types import Scan, Volume


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What the authors say of one of their sets."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, int, int], ...]
    """Items for training, validation and test, of every version that was published."""

    @property
    def task(self) -> str:
        """`binary-class` or `multi-class`."""
        return "binary-class" if len(self.classes) == 2 else "multi-class"


INFO = {
    "organmnist3d": DataSet(
        classes=(
            *("liver", "kidney-right", "kidney-left", "femur-right", "femur-left", "bladder"),
            *("heart", "lung-right", "lung-left", "spleen", "pancreas"),
        ),
        counts=((971, 161, 610), (972, 161, 610)),
    ),
    "nodulemnist3d": DataSet(classes=("benign", "malignant"), counts=((1158, 165, 310),)),
    "adrenalmnist3d": DataSet(classes=("normal", "hyperplasia"), counts=((1188, 98, 298),)),
    "fracturemnist3d": DataSet(
        classes=("buckle rib fracture", "nondisplaced rib fracture", "displaced rib fracture"),
        counts=((1027, 103, 240),),
    ),
    "vesselmnist3d": DataSet(classes=("vessel", "aneurysm"), counts=((1335, 191, 382), (1335, 192, 382))),
    "synapsemnist3d": DataSet(classes=("inhibitory synapse", "excitatory synapse"), counts=((1230, 177, 352),)),
}
"""The six sets. Reference: Yang et al., MedMNIST v2, Scientific Data 2023, and the info table of its package."""


def scans(path: Path, survey: Survey) -> list[Scan]:
    """Every item of a file: its class as `label` (a word where there are more than two, else 0 or 1) and its split.

    Args:
        path: An `.npz` of MedMNIST3D, of any size of cubes.
        survey: Takes what is wrong with the file, and a note of what is assumed of it.
    """
    try:
        limits = survey.limits
        facts, _ = guard.run("medmnist", path, {"path": str(path), "max_voxels": limits.max_voxels}, limits)
        info = _known(path, facts)
    except DagmanError as error:
        survey.reject(error.code, error.subject, error.problem, error.advice)
        return []
    name = clean_name(path.stem)
    case_ids = [f"{name}-{part}-{number:04d}" for part in SPLITS for number in range(len(facts["labels"][part]))]
    labels = [label for part in SPLITS for label in facts["labels"][part]]
    parts = [split for part, split in SPLITS.items() for _ in facts["labels"][part]]
    words = info.classes if info and info.task == "multi-class" else [str(label) for label in range(MAX_LABELS)]
    low, high = WINDOW_HU
    survey.reject(
        "MEDMNIST",
        path,
        f"{len(labels)} cubes of side {facts['side']}: grey 0 to 255 stand for {low:g} to {high:g} HU, voxels are of "
        "the store's size, whose an item is stays unknown",
        "look at them with an encoder of that window, and say --group-by case where you train on them",
        ignored=True,
    )
    return [
        Scan(case_id=case, files=(path,), kind="medmnist", index=index, label=words[label], split=split)
        for index, (case, label, split) in enumerate(zip(case_ids, labels, parts, strict=True))
    ]


def volume(scan: Scan, spacing_mm: float = 2.0, limits: guard.Limits | None = None) -> Volume:
    """One item as a CT.

    Args:
        scan: Of `scans`.
        spacing_mm: The size its voxels are given.
        limits: What reading the file may cost.
    """
    if scan.index is None:
        raise AssertionError("an item has an index")
    return Volume(hu=hounsfield(_read(scan.files[0], limits)[scan.index]), affine=np.diag([*[spacing_mm] * 3, 1.0]))


def sha256(path: Path) -> str:
    """SHA-256 of a file, remembered while its size and time stay."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _sha256(path: Path, _size: int, _time: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read(path: Path, limits: guard.Limits | None) -> UInt8[np.ndarray, "items x y z"]:
    status = path.stat()
    return _cubes(path, status.st_size, status.st_mtime_ns, limits or guard.Limits())


@lru_cache(maxsize=1)
def _cubes(path: Path, _size: int, _time: int, limits: guard.Limits) -> np.ndarray:
    arguments = {"path": str(path), "max_voxels": limits.max_voxels, "voxels": True}
    cubes: np.ndarray | None = guard.run("medmnist", path, arguments, limits)[1]
    if cubes is None:
        raise AssertionError("the task returns an array")
    return cubes


def _known(path: Path, facts: dict[str, Any]) -> DataSet | None:
    """The set that the file's name tells; refused where it is another."""
    match = re.match(r"[a-z]+mnist3d", path.stem.lower())
    info = INFO.get(match[0]) if match else None
    if info is None:
        return None
    counts = tuple(len(facts["labels"][part]) for part in SPLITS)
    if counts not in info.counts:
        listed, known = ("/".join(map(str, each)) for each in (counts, info.counts[0]))
        advice = f"{ADVICE}, or rename it if it is your own"
        raise refused(path, f"holds {listed} items for training/validation/test, where the set has {known}", advice)
    most = max(max(facts["labels"][part]) for part in SPLITS)
    if most >= len(info.classes):
        raise refused(path, f"holds class {most}, where the set has {len(info.classes)}")
    return info
