"""The `.npz` files of MedMNIST's 3D sets: checked against what their headers declare before anything is unpacked."""

import ast
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Int16, UInt8

from dagman.errors import DagmanError

WINDOW_HU = (-175.0, 250.0)
"""What grey 0 and 255 stand for; a store's other windows show the same cubes with less contrast."""
SPLITS = {"train": "train", "val": "validation", "test": "test"}
"""The file's word for each part, and the store's."""
MAX_LABELS = 1000
ADVICE = "download the file again from medmnist.com"
_MOST_HEADER_BYTES = 4096


def hounsfield(grey: UInt8[np.ndarray, "..."]) -> Int16[np.ndarray, "..."]:
    """Grey values 0 to 255 as HU between the ends of `WINDOW_HU`."""
    low, high = WINDOW_HU
    table: np.ndarray = np.rint(low + np.arange(256) / 255 * (high - low)).astype(np.int16)
    return np.take(table, grey)


def refused(path: Path, problem: str, advice: str = ADVICE) -> DagmanError:
    """A file that is none of theirs, or not as it was published."""
    return DagmanError("MEDMNIST", path, problem, advice)


def read_file(path: str, max_voxels: int, *, voxels: bool = False) -> tuple[dict[str, Any], np.ndarray | None]:
    """In the guarded process: labels of each part and side of the cubes, and with `voxels` all cubes in one array."""
    file = Path(path)
    try:
        with zipfile.ZipFile(file) as archive:
            sides = {side for part in SPLITS for side in _check_images(file, archive, f"{part}_images", max_voxels)}
            if len(sides) != 1:
                raise refused(file, f"holds images of sides {sorted(sides)}, not cubes of one size")
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
        raise refused(file, f"is no whole .npz file ({type(error).__name__})") from None
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
        raise refused(path, f"{name} is {listed} of {dtype}, not items x side x side x side of uint8")
    if not 0 < math.prod(shape) <= max_voxels:
        raise DagmanError("DIMS", path, f"{name} declares {math.prod(shape)} voxels, the most is {max_voxels}", ADVICE)
    return shape[1:]


def _check_labels(path: Path, archive: zipfile.ZipFile, part: str) -> None:
    shape, dtype = _header(path, archive, f"{part}_labels")
    items = _header(path, archive, f"{part}_images")[0][0]
    if shape not in ((items,), (items, 1)) or dtype.kind not in "ui":
        raise refused(path, f"{part}_labels is {shape} of {dtype}, not one class for each of {items} images")


def _labels(path: Path, values: np.ndarray, part: str) -> list[int]:
    labels: list[int] = values.ravel().tolist()
    if not 0 <= min(labels) <= max(labels) < MAX_LABELS:
        raise refused(path, f"{part}_labels holds classes {min(labels)} to {max(labels)}")
    return labels


def _header(path: Path, archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of a member, which holds just that many bytes."""
    try:
        member = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise refused(path, f"holds no {name}", "give an .npz of MedMNIST3D") from None
    with archive.open(member) as stream:
        shape, dtype, length = _npy_header(stream)
    if member.file_size != length + math.prod(shape) * dtype.itemsize:
        raise refused(path, f"{name} is {member.file_size} bytes, not what its header says")
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
