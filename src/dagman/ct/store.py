"""Prepared volumes on disk, from which a crop is read in milliseconds.

A store is a folder: `prepare.json` (settings and format), `manifest.jsonl` (one row a case, sorted by case),
`rejected.jsonl`, and one array a case in `volumes/` (int16 HU) and, where there is one, in `masks/`, and the box of
labels as they were drawn, on the scan's own voxels, in `drawn/`. Arrays are blosc2
`.b2nd`, or `.npy` for machines without blosc2. Nothing is trusted that the manifest does not list with its size and
SHA-256. The HU window is applied when a crop is read, so that one store serves every window.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Int16, Integer

from dagman.errors import DagmanError, ExitCode
from dagman.files import read_lines, refuse_no_utf8, sha256_file, write_atomic

FORMAT = 1
AIR_HU = -1024
MANIFEST = "manifest.jsonl"
SETTINGS = "prepare.json"
SUFFIXES = {"blosc2": ".b2nd", "npy": ".npy"}
Storage = Literal["blosc2", "npy"]
Kind = Literal["volumes", "masks", "drawn"]
Triple = tuple[int, int, int]


def write_array(path: Path, array: Integer[np.ndarray, "x y z"]) -> None:
    """Write an array atomically, stored as the suffix of `path` says; a version gives equal arrays equal bytes.

    Raises:
        DagmanError: `E-DISK`; `E-BLOSC2` where blosc2 is not installed.
    """
    if path.suffix == ".npy":
        write_atomic(path, lambda temporary: np.save(temporary, array))
        return
    blosc2 = _blosc2(path)
    shuffle = blosc2.Filter.SHUFFLE if array.dtype.itemsize > 1 else blosc2.Filter.NOFILTER
    settings = {
        "chunks": tuple(min(72, side) for side in array.shape),
        "blocks": tuple(min(24, side) for side in array.shape),
        # Packed once, read for every crop: slow to write, quick to read; `benchmarks/store.py` compares.
        "cparams": {"codec": blosc2.Codec.LZ4HC, "clevel": 3, "filters": [shuffle], "nthreads": 1},
    }

    def write(temporary: Path) -> None:
        blosc2.asarray(np.ascontiguousarray(array), urlpath=str(temporary), mode="w", **settings)

    write_atomic(path, write)


def require_storage(storage: Storage, folder: Path) -> None:
    """Fail early where arrays of this kind cannot be written.

    Raises:
        DagmanError: `E-BLOSC2`.
    """
    if storage == "blosc2":
        _blosc2(folder)


def _open_array(path: Path) -> Any:
    """An array on disk that reads what is sliced from it; mapped, so whoever cuts it meanwhile ends this process."""
    if path.suffix == ".npy":
        return np.load(path, mmap_mode="c")  # what is written stays in memory, and torch takes it as it is
    return _blosc2(path).open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})


def _blosc2(path: Path) -> Any:
    try:
        import blosc2
    except ImportError:
        raise DagmanError(
            "BLOSC2", path, "needs the package blosc2", "install blosc2, or prepare with storage npy"
        ) from None
    return blosc2


def refuse_inside(output: Path) -> None:
    """Nothing but `prepare` writes into a prepared store.

    Raises:
        DagmanError: `E-OUTPUT`, exit code 4, for an output that is a store, or lies inside one, or whose path is no
            UTF-8.
    """
    refuse_no_utf8(output, "OUTPUT", "choose another output folder, or rename the one it lies in")
    place = output.resolve()
    for folder in (place, *place.parents):
        if (folder / SETTINGS).is_file() and (folder / MANIFEST).is_file():
            where = "is a prepared store" if folder == place else f"lies inside the prepared store {folder}"
            advice = "choose an output folder beside the store"
            raise DagmanError("OUTPUT", output, where, advice, exit_code=ExitCode.REFUSED)


Voxel = Triple | Integer[np.ndarray, "3"]
"""Three numbers (x, y, z)."""


class PreparedStore:
    """A folder written by `prepare`, read by row number. Cheap to open and to send to worker processes.

    Args:
        folder: The output folder of `prepare`.

    Raises:
        DagmanError: `E-STORE` when the folder is no finished store; `E-MANIFEST` with the line that is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder).absolute()  # whoever changes the working directory reads on
        refuse_no_utf8(self.folder, "STORE", "rename the folder, or move the store elsewhere")
        if not (self.folder / MANIFEST).is_file():
            begun = (self.folder / SETTINGS).is_file()
            scans = folder if self.folder.is_file() else "SCANS"
            raise DagmanError(
                "STORE",
                folder,
                f"is no finished store: it holds no {MANIFEST}" if self.folder.exists() else "does not exist",
                "run the same `dagman prepare` again until it ends"
                if begun
                else f"run `dagman prepare -i {scans} -o prepared` and give that folder",
            )
        self.settings = _read_settings(self.folder / SETTINGS)
        self.rows: list[dict[str, Any]] = read_lines(
            self.folder / MANIFEST, required=("case_id", "shape", "affine", "bytes", "sha256", "mask")
        )
        _refuse_twice(self.folder / MANIFEST, self.rows)
        self._checked: dict[Path, tuple[int, int]] = {}
        """Files that were compared with the manifest, and what told them from others then."""
        self._last: tuple[Path, Any] | None = None
        """What was read last, open: the next crop is often of the same volume."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_last": None}

    @cached_property
    def store_id(self) -> str:
        """16 hexadecimal digits that change with the settings, the cases, any stored voxel, or how it is packed."""
        content = [self.settings] + [
            [row["case_id"], row["sha256"], row["mask"] and row["mask"]["sha256"], *_drawn_sha256(row)]
            for row in self.rows
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def window_hu(self) -> tuple[float, float] | None:
        """The window that gives grey cubes without Hounsfield units back (MedMNIST); None for CTs, which take any.

        Raises:
            DagmanError: `E-CONFIG` for a store of CTs and grey cubes, or of cubes of several windows.
        """
        windows = Counter(tuple(row.get("window_hu") or ()) for row in self.rows)
        if len(windows) > 1:
            told = (
                f"{number} grey cubes of {window[0]:g} to {window[1]:g} HU" if window else f"{number} CTs"
                for window, number in windows.most_common()
            )
            problem = f"holds {' and '.join(told)}, which cannot be shown in one window"
            raise DagmanError("CONFIG", self.folder, problem, "prepare each kind into a store of its own")
        if not any(windows):
            return None
        low, high = next(iter(windows))
        return float(low), float(high)

    def shape(self, row: int) -> Triple:
        """Voxels (x, y, z) of a stored volume."""
        x, y, z = self.rows[row]["shape"]
        return int(x), int(y), int(z)

    def path(self, row: int, kind: Kind = "volumes") -> Path:
        """Where an array of a row lies."""
        return array_path(self.folder, kind, str(self.rows[row]["case_id"]), self.settings["storage"])

    def hu(self, row: int, corner: Voxel | None = None, size: Voxel | None = None) -> Int16[np.ndarray, "x y z"]:
        """A crop in Hounsfield units, padded with air (-1024) where it leaves the volume; the whole without `corner`.

        Args:
            row: Row of the manifest.
            corner: First voxel (x, y, z); any integers.
            size: Voxels (x, y, z).

        Raises:
            DagmanError: `E-CHECKSUM` naming the case, when the file is missing or damaged.
        """
        return self._crop(row, "volumes", corner, size, AIR_HU)

    def mask(self, row: int, corner: Voxel | None = None, size: Voxel | None = None) -> np.ndarray | None:
        """The same crop of the case's label map, padded with 0; None for a case without one."""
        if self.rows[row]["mask"] is None:
            return None
        return self._crop(row, "masks", corner, size, 0)

    def drawn(self, row: int) -> Integer[np.ndarray, "own_x own_y own_z"] | None:
        """The case's label map as it was drawn, on the scan's own voxels (`source_shape`, `source_affine`), RAS+.

        None for a case without a mask, and in stores of earlier versions, which do not keep it.

        Raises:
            DagmanError: `E-CHECKSUM` naming the case, when the file is missing or damaged.
        """
        kept = recorded(self.rows[row]).get("drawn")
        if kept is None:
            return None
        x, y, z = (-int(edge) for edge in kept["corner"])
        width, height, depth = self.rows[row]["source_shape"]
        return self._crop(row, "drawn", (x, y, z), (width, height, depth), 0)

    def _crop(self, row: int, kind: Kind, corner: Voxel | None, size: Voxel | None, outside: int) -> np.ndarray:
        path = self.path(row, kind)
        try:
            if self._last is None or self._last[0] != path:
                if self._checked.get(path) != _told_apart(path):
                    self._check(path, recorded(self.rows[row])[kind])
                self._last = path, _open_array(path)
            low = (0, 0, 0) if corner is None else tuple(map(int, corner))
            sides = self.shape(row) if size is None else tuple(map(int, size))
            return padded_crop(self._last[1], low, sides, outside)
        except FileNotFoundError as error:
            raise _damaged(
                path, "is missing", "run the same `dagman prepare` again: it makes this case anew"
            ) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise _damaged(path, f"cannot be read ({type(error).__name__})") from error

    def _check(self, path: Path, kept: Mapping[str, Any]) -> None:
        """Compare a file with the manifest, once in each process, and again where another has taken its place."""
        now = _told_apart(path)
        if path.stat().st_size != kept["bytes"]:
            raise _damaged(path, f"holds {path.stat().st_size} bytes, not {kept['bytes']}")
        if sha256_file(path) != kept["sha256"]:
            raise _damaged(path, "has not the checksum of the manifest")
        self._checked[path] = now

    def verify(self, rows: Iterable[int] | None = None) -> None:
        """Compare every stored file with the size and SHA-256 in the manifest.

        Raises:
            DagmanError: `E-CHECKSUM` naming the first damaged case and the number of damaged files.
        """
        damaged = [
            path
            for row in (range(len(self)) if rows is None else rows)
            for path, kept in self._files(row)
            if not path.is_file() or path.stat().st_size != kept["bytes"] or sha256_file(path) != kept["sha256"]
        ]
        if damaged:
            raise _damaged(damaged[0], f"is not what was written (so are {len(damaged) - 1} others)")

    def _files(self, row: int) -> list[tuple[Path, Mapping[str, Any]]]:
        return [(self.path(row, kind), kept) for kind, kept in recorded(self.rows[row]).items()]


def _told_apart(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def recorded(row: Mapping[str, Any]) -> dict[Kind, Mapping[str, Any]]:
    """What a manifest's row says of each of its arrays: `bytes`, `sha256`."""
    mask = row["mask"] or {}
    kept: dict[Kind, Mapping[str, Any]] = {"volumes": row}
    return kept | ({"masks": mask} if mask else {}) | ({"drawn": mask["drawn"]} if "drawn" in mask else {})


def _drawn_sha256(row: Mapping[str, Any]) -> list[str]:
    return [kept["sha256"] for kind, kept in recorded(row).items() if kind == "drawn"]


def array_path(folder: Path, kind: Kind, case_id: str, storage: Storage) -> Path:
    """Where the array of a case lies in a store."""
    return folder / kind / f"{case_id}{SUFFIXES[storage]}"


def padded_crop(array: Any, corner: Sequence[int], size: Sequence[int], outside: int) -> np.ndarray:
    """`array[corner : corner + size]`, with `outside` where that leaves the array.

    Args:
        array: Anything of three axes with `shape`, `dtype` and NumPy slicing.
        corner: First voxel (x, y, z); may be negative or beyond the end.
        size: Voxels (x, y, z).
        outside: The value of voxels outside.
    """
    inside = [
        (min(max(start, 0), num), min(max(start + side, 0), num))
        for start, side, num in zip(corner, size, array.shape, strict=True)
    ]
    source = tuple(slice(low, high) for low, high in inside)
    if all(high - low == side for (low, high), side in zip(inside, size, strict=True)):
        return np.asarray(array[source])
    result = np.full(tuple(size), outside, array.dtype)
    if all(high > low for low, high in inside):
        target = tuple(slice(low - start, high - start) for (low, high), start in zip(inside, corner, strict=True))
        result[target] = array[source]
    return result


def _damaged(
    path: Path,
    problem: str,
    advice: str = "delete this file and run the same `dagman prepare` again: it makes this case anew",
) -> DagmanError:
    return DagmanError("CHECKSUM", path, problem, advice, exit_code=ExitCode.REFUSED)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
        number, storage = settings["format"], settings["storage"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DagmanError("STORE", path, "cannot be read", "prepare the scans into a new folder") from None
    if number != FORMAT or storage not in SUFFIXES:
        raise DagmanError(
            "STORE",
            path,
            f"has format {number}, this version reads {FORMAT}",
            "prepare the scans into a new folder, or use the version that wrote it",
        )
    return dict(settings)


def _refuse_twice(path: Path, rows: list[dict[str, Any]]) -> None:
    """A case twice, or a case whose name leads out of the folder."""
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        case_id = str(row["case_id"])
        if case_id in seen or "/" in case_id or case_id in {"", ".", ".."}:
            why = "is listed twice" if case_id in seen else "is no case name"
            raise DagmanError("MANIFEST", f"{path}:{number}", f"{case_id} {why}", "run the same `dagman prepare` again")
        seen.add(case_id)
