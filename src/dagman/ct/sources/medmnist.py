"""MedMNIST's 3D sets: one `.npz` of small grey cubes with classes and an official split.

The files hold grey values 0 to 255 without Hounsfield units, voxel size or patients. In a store, grey 0 to 255 stand
for `WINDOW_HU`, the window encoders see by default, so that windowing gives back grey / 255 to the rounding of int16;
voxels are of the store's own size, and nothing is resampled or cropped. Whose an item is stays unknown.
"""

import ast
import hashlib
import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int16, UInt8

from dagman.ct import guard
from dagman.ct.survey import Survey, clean_name
from dagman.errors import DagmanError
from dagman.types import Scan, Volume

WINDOW_HU = (-175.0, 250.0)
"""What grey 0 and 255 stand for; a store's other windows show the same cubes with less contrast."""
SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""The file's word for each part, and the store's."""
MAX_LABELS = 1000
_ADVICE = "download the file again from medmnist.com"
_MOST_HEADER_BYTES = 4096


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
        facts = guard.run("medmnist", path, {"path": str(path), "max_voxels": survey.limits.max_voxels}, survey.limits)[
            0
        ]
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


def hounsfield(grey: UInt8[np.ndarray, "..."]) -> Int16[np.ndarray, "..."]:
    """Grey values 0 to 255 as HU between the ends of `WINDOW_HU`."""
    low, high = WINDOW_HU
    table: np.ndarray = np.rint(low + np.arange(256) / 255 * (high - low)).astype(np.int16)
    return np.take(table, grey)


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
        advice = f"{_ADVICE}, or rename it if it is your own"
        raise _refused(path, f"holds {listed} items for training/validation/test, where the set has {known}", advice)
    most = max(max(facts["labels"][part]) for part in SPLITS)
    if most >= len(info.classes):
        raise _refused(path, f"holds class {most}, where the set has {len(info.classes)}")
    return info


def _refused(path: Path, problem: str, advice: str = _ADVICE) -> DagmanError:
    return DagmanError("MEDMNIST", path, problem, advice)


def read_file(path: str, max_voxels: int, *, voxels: bool = False) -> tuple[dict[str, Any], np.ndarray | None]:
    """In the guarded process: labels of each part and side of the cubes, and with `voxels` all cubes in one array."""
    file = Path(path)
    try:
        with zipfile.ZipFile(file) as archive:
            sides = {side for part in SPLITS for side in _check_images(file, archive, f"{part}_images", max_voxels)}
            if len(sides) != 1:
                raise _refused(file, f"holds images of sides {sorted(sides)}, not cubes of one size")
            for part in SPLITS:
                _check_labels(file, archive, part)
        with np.load(file, allow_pickle=False) as arrays:
            labels = {part: _labels(file, arrays[f"{part}_labels"], part) for part in SPLITS}
            side = sides.pop()
            facts = {"labels": labels, "side": side}
            if not voxels:
                return facts, None
            cubes = np.empty((sum(map(len, labels.values())), side, side, side), np.uint8)
            for part, rows in _rows(labels):
                cubes[rows] = arrays[f"{part}_images"].reshape(-1, side, side, side)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError) as error:
        raise _refused(file, f"is no whole .npz file ({type(error).__name__})") from None
    return facts, cubes


def _rows(labels: dict[str, list[int]]) -> Iterator[tuple[str, slice]]:
    start = 0
    for part, values in labels.items():
        yield part, slice(start, start + len(values))
        start += len(values)


def _check_images(path: Path, archive: zipfile.ZipFile, name: str, max_voxels: int) -> tuple[int, ...]:
    """The sides of the images of one part, whose declared size fits the file and the limit."""
    shape, dtype = _header(path, archive, name)
    if len(shape) == 5 and 1 in (shape[1], shape[4]):
        shape = (shape[0], *(shape[1:4] if shape[4] == 1 else shape[2:5]))
    if len(shape) != 4 or dtype != np.uint8:
        listed = " x ".join(map(str, shape))
        raise _refused(path, f"{name} is {listed} of {dtype}, not items x side x side x side of uint8")
    if not 0 < math.prod(shape) <= max_voxels:
        raise DagmanError("DIMS", path, f"{name} declares {math.prod(shape)} voxels, the most is {max_voxels}", _ADVICE)
    return shape[1:]


def _check_labels(path: Path, archive: zipfile.ZipFile, part: str) -> None:
    shape, dtype = _header(path, archive, f"{part}_labels")
    items = _header(path, archive, f"{part}_images")[0][0]
    if shape not in ((items,), (items, 1)) or dtype.kind not in "ui":
        raise _refused(path, f"{part}_labels is {shape} of {dtype}, not one class for each of {items} images")


def _labels(path: Path, values: np.ndarray, part: str) -> list[int]:
    labels: list[int] = values.ravel().tolist()
    if not 0 <= min(labels) <= max(labels) < MAX_LABELS:
        raise _refused(path, f"{part}_labels holds classes {min(labels)} to {max(labels)}")
    return labels


def _header(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a member, which holds just that many bytes."""
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise _refused(path, f"holds no {name}", "give an .npz of MedMNIST3D") from None
    with archive.open(member) as stream:
        shape, dtype, length = _npy_header(stream)
    if member.file_size != length + math.prod(shape) * dtype.itemsize:
        raise _refused(path, f"{name} is {member.file_size} bytes, not what its header says")
    return shape, dtype


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    version = np.lib.format.read_magic(stream)
    width = 2 if version == (1, 0) else 4
    size = int.from_bytes(stream.read(width), "little")
    if size > _MOST_HEADER_BYTES:
        raise ValueError("header too long")
    try:
        header = ast.literal_eval(stream.read(size).decode("latin1"))
        shape, dtype = tuple(int(side) for side in header["shape"]), np.dtype(str(header["descr"]))
    except (SyntaxError, TypeError, KeyError, RecursionError):
        raise ValueError("no header") from None
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError("no numbers")
    return shape, dtype, np.lib.format.MAGIC_LEN + width + size
