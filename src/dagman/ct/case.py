"""One scan to one case of a store: what `prepare` does in its worker processes, and tasks do with one CT in memory."""

import hashlib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int16, Integer

from dagman.ct import crops, read, resample, store
from dagman.ct.grid import check_ras
from dagman.ct.index import patient_key_id
from dagman.ct.sources import medmnist, medmnist_files
from dagman.ct.survey import Problem, clean_name, without_ending
from dagman.errors import DagmanError, ExitCode, printable
from dagman.files import fault_point, sha256_file
from dagman.types import Scan, Volume

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How scans become stored volumes; a store holds one such setting."""

    spacing_mm: float = 2.0
    """Side of the cubic voxels; the paper's 2 mm."""
    resampling: Literal["antialiased", "linear"] = "antialiased"
    """`linear` is the paper's; it keeps three times the noise of sub-millimetre slices."""
    storage: store.Storage = "blosc2"
    """`npy` for machines without blosc2: larger, faster to read."""

    def __post_init__(self) -> None:
        if not 0.25 <= self.spacing_mm <= 10:
            raise DagmanError("CONFIG", "spacing_mm", f"cannot be {self.spacing_mm}", "give 0.25 to 10 mm")


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """One volume as the store holds it."""

    hu: Int16[np.ndarray, "x y z"]
    affine: Float[np.ndarray, "4 4"]
    """Voxel index to RAS+ world in mm."""
    mask: Integer[np.ndarray, "x y z"] | None
    clipped_ratio: float
    """Share of the source's voxels below -1024 or above 32767 HU."""
    tiny_labels: tuple[int, ...] = ()
    """Labels that fell between the new voxels; the voxel at their centre stands for them."""
    centroid: Float[np.ndarray, "3"] | None = None
    """Voxel index here of the centroid that the mask has on the scan's own voxels; None without one, or empty."""


def prepare_volume(volume: Volume, config: PrepareConfig, mask: Integer[np.ndarray, "x y z"] | None = None) -> Prepared:
    """A volume in memory as `prepare` would store it.

    Args:
        volume: Oriented to RAS+, any spacing.
        config: The store's settings.
        mask: Labels on the volume's own grid; comes along by nearest neighbour, and the crop holds all of it.

    Raises:
        DagmanError: `E-MASKLOST` when two labels would share one voxel, `E-ORIENT` when the volume is not RAS+,
            `E-NONFINITE` when it holds NaN or infinity.
    """
    check_ras(volume.affine)
    lowest, highest = volume.hu.min(), volume.hu.max()
    if not np.isfinite([lowest, highest]).all():
        raise DagmanError("NONFINITE", "volume", "holds NaN or infinity", "give Hounsfield units")
    low, high = store.AIR_HU, np.iinfo(np.int16).max
    within = low <= lowest and highest <= high
    outside = 0 if within else np.count_nonzero(volume.hu < low) + np.count_nonzero(volume.hu > high)
    hu = resample.resample(
        np.clip(volume.hu, low, high) if outside else volume.hu,
        volume.spacing_mm,
        config.spacing_mm,
        antialias=config.resampling == "antialiased",
    )
    hu = np.rint(hu).astype(np.int16)
    affine = resample.resampled_affine(volume.affine, volume.hu.shape, config.spacing_mm)
    labels, tiny = (None, ()) if mask is None else _resampled_mask(mask, volume.spacing_mm, config.spacing_mm)
    box = resample.body_box(hu, config.spacing_mm, None if labels is None else labels > 0)
    affine[:3, 3] += affine[:3, :3] @ [edge.start for edge in box]
    return Prepared(
        hu=np.ascontiguousarray(hu[box]),
        affine=affine,
        mask=None if labels is None else np.ascontiguousarray(labels[box]),
        clipped_ratio=outside / volume.hu.size,
        tiny_labels=tiny,
        centroid=None if mask is None else _moved(crops.centroid(mask), volume.affine, affine),
    )


def _moved(place: np.ndarray | None, source: np.ndarray, target: np.ndarray) -> np.ndarray | None:
    """A voxel index of one grid as that of another."""
    return None if place is None else np.linalg.solve(target, source @ [*place, 1.0])[:3]


def _resampled_mask(
    mask: np.ndarray, spacing_mm: tuple[float, float, float], target_mm: float
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The mask on the new grid, and the labels so small that only the voxel at their centre stands for them."""
    labels = resample.nearest(mask, spacing_mm, target_mm)
    lost = np.setdiff1d(np.unique(mask), np.unique(labels))
    if lost.size:
        labels = labels.copy()
        for label in lost:
            centre = np.argwhere(mask == label).mean(axis=0) - (np.array(mask.shape) - 1) / 2
            where = centre * spacing_mm / target_mm + (np.array(labels.shape) - 1) / 2
            labels[tuple(np.clip(np.rint(where).astype(int), 0, np.array(labels.shape) - 1))] = label
    gone = np.setdiff1d(lost, np.unique(labels))
    if gone.size:
        raise DagmanError(
            "MASKLOST",
            f"label {gone[0]}",
            f"shares its only voxel of {target_mm:g} mm with another label",
            "prepare with a smaller spacing, or leave this label out",
        )
    return labels.astype(np.uint8) if labels.max() <= 255 else labels, tuple(int(label) for label in lost)


def prepare_case(scan: Scan, *, sources: tuple[Path, ...], output: Path, config: PrepareConfig) -> Row:
    """Read, prepare and store one scan: a journal entry, or a rejection."""
    source = source_name(scan, sources)
    try:
        return _stored_case(scan, source, output, config)
    except DagmanError as error:
        if error.exit_code == ExitCode.RESOURCES:
            raise
        return rejected_row(scan.case_id, source, error)
    except MemoryError:
        size = sum(path.stat().st_size for path in scan.files) / 2**20
        problem = f"does not fit into memory ({size:.0f} MiB on disk)"
        advice = "prepare with fewer workers, or free memory"
        return rejected_row(scan.case_id, source, DagmanError("MEMORY", scan.source, problem, advice))


def _stored_case(scan: Scan, source: str, output: Path, config: PrepareConfig) -> Row:
    started = time.monotonic()
    before = fingerprint(scan)
    brought = _as_it_is if scan.kind == "medmnist" else _brought_into_form
    volume, prepared, drawn, digest = brought(scan, config)
    if fingerprint(scan) != before:
        raise DagmanError(
            "CHANGED", scan.source, "changed while it was read", "wait for the copy to end, then run again"
        )
    fault_point("prepare.before_store")
    row: Row = {"case_id": scan.case_id, **table_values(scan), "source": source, "source_sha256": digest}
    row |= {
        "shape": list(prepared.hu.shape),
        "spacing_mm": [config.spacing_mm] * 3,
        "affine": _plain(prepared.affine),
        "source_shape": list(volume.hu.shape),
        "source_spacing_mm": _plain(np.array(volume.spacing_mm)),
        "source_affine": _plain(volume.affine),
        **_own(volume),
        "hu_percentiles": _percentiles(prepared.hu),
        **({"window_hu": list(medmnist_files.WINDOW_HU)} if scan.kind == "medmnist" else {}),
        "clipped_ratio": round(prepared.clipped_ratio, 9),
        "voxel_sha256": hashlib.sha256(repr(prepared.hu.shape).encode() + prepared.hu.tobytes()).hexdigest(),
        **_written(store.array_path(output, "volumes", scan.case_id, config.storage), prepared.hu),
        "mask": None,
    }
    if prepared.mask is not None and drawn is not None:
        fault_point("prepare.before_mask")
        row["mask"] = {
            "source_sha256": source_sha256([scan.mask] if scan.mask else []),
            "tiny_labels": list(prepared.tiny_labels),
            **({"rois": list(scan.rois)} if scan.rois else {}),
            **({"names": names_of(scan)} if scan.called else {}),
            "voxels": read.labels_of(prepared.mask),
            **({} if prepared.centroid is None else {"centroid": _plain(prepared.centroid)}),
            **_written(store.array_path(output, "masks", scan.case_id, config.storage), prepared.mask),
            "drawn": _drawn(store.array_path(output, "drawn", scan.case_id, config.storage), drawn),
        }
    row["seconds"] = round(time.monotonic() - started, 3)
    return {"case_id": scan.case_id, **before, "row": row}


def _drawn(path: Path, mask: np.ndarray) -> Row:
    """Write the box of a mask that holds its labels, on the scan's own voxels: what segmentations are judged by."""
    lines = [np.flatnonzero((mask != 0).any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = [(int(line[0]), int(line[-1]) + 1) if len(line) else (0, 1) for line in lines]
    labels = mask[tuple(slice(*edges) for edges in box)]
    return {
        "corner": [low for low, _ in box],
        **_written(path, labels.astype(np.uint8) if labels.max() <= 255 else labels),
    }


def _brought_into_form(scan: Scan, config: PrepareConfig) -> tuple[Volume, Prepared, np.ndarray | None, str]:
    """A scan as read and as stored, its mask as drawn, and the checksum of its files."""
    volume = read.read(scan)
    mask = read.read_mask_of(scan, volume)
    digest = source_sha256(scan.files)
    labels = mask.hu if mask else None
    return volume, prepare_volume(volume, config, labels), labels, digest


def _as_it_is(scan: Scan, config: PrepareConfig) -> tuple[Volume, Prepared, None, str]:
    """A cube without a size of its own: its voxels are the store's."""
    volume = medmnist.volume(scan, config.spacing_mm)
    prepared = Prepared(hu=volume.hu, affine=volume.affine, mask=None, clipped_ratio=0.0)
    return volume, prepared, None, medmnist.sha256(scan.files[0])


def _written(path: Path, array: np.ndarray) -> Row:
    """Write an array; its size and checksum."""
    store.write_array(path, array)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _own(volume: Volume) -> Row:
    """The grid of the file, before it was turned to RAS+."""
    grid = volume.own_grid
    return {} if grid is None else {"own_shape": list(map(int, grid.shape)), "own_affine": _plain(grid.affine)}


def _percentiles(hu: Int16[np.ndarray, "x y z"]) -> dict[str, int]:
    """1st, 50th and 99th percentile, from a histogram."""
    below = np.cumsum(np.bincount(hu.ravel().astype(np.int32) - store.AIR_HU))
    return {str(share): int(np.searchsorted(below, share / 100 * hu.size)) + store.AIR_HU for share in (1, 50, 99)}


def _plain(array: np.ndarray) -> Any:
    """Nested lists of numbers rounded to a nanometre, so that equal geometry is equal text."""
    return (np.round(np.asarray(array, dtype=np.float64), 6) + 0.0).tolist()


def table_values(scan: Scan) -> Row:
    """What a CSV says of a case, which may change without the scan; of DICOM, the key that hashes its patient."""
    hashed = {"patient_key": patient_key_id()} if scan.kind == "dicom" and scan.patient else {}
    return {"patient": scan.patient, "label": scan.label, "split": scan.split} | hashed


def source_name(scan: Scan, sources: Iterable[Path]) -> str:
    """The scan's file or folder, relative to the source it was found in (to the folder of a CSV or single file)."""
    return relative(scan.source, sources)


def relative(path: Path, sources: Iterable[Path]) -> str:
    """A path counted from the source that holds it."""
    place = path.absolute()
    for root in (Path(source).absolute() for source in sources):
        folder = root if root.is_dir() else root.parent
        if place.is_relative_to(folder):
            return printable(place.relative_to(folder)) if place != folder else printable(place.name)
    return printable(place.name)


def fingerprint(scan: Scan) -> Row:
    """What tells that a source has changed: names, sizes and times; and where it lies, as a hash."""
    files = [*scan.files, *([scan.mask] if scan.mask else [])]
    try:
        states = [(path.name, path.stat()) for path in files]
    except OSError as error:
        problem = f"is no longer there ({error.strerror})"
        raise DagmanError("GONE", scan.source, problem, "put it back and run the command again") from None
    return {
        "place": _place(scan.source),
        "mask_place": _place(scan.mask) if scan.mask else None,
        "files": [[printable(name), state.st_size, state.st_mtime_ns] for name, state in states]
        + [[roi, 0, 0] for roi in scan.rois],
    }


def origin_of(entry: Row) -> str | None:
    """What journal entries share that are of one scan and mask and were named by `index`; None for items of a file.

    `index` puts the folder's name in front of a name, or adds a hash to it, where it is not the only one.
    """
    if entry["row"].get("window_hu"):
        return None
    plain = re.sub(r"(-[0-9a-f]{8})+$", "", entry["case_id"])
    names = [name for name, *_ in entry["files"]]
    stem = clean_name(without_ending(names[0])) if names else plain
    plain = stem if plain.endswith(f"_{stem}") else plain
    return repr([plain, entry["place"], entry.get("mask_place"), names])


def _place(path: Path) -> str:
    return hashlib.sha256(bytes(path.absolute())).hexdigest()[:16]


def is_of(scan: Scan, row: Row) -> bool:
    """Whether a stored mask is the scan's, by content: a scan that was moved, or its mask, is not made anew."""
    stored = row["mask"]
    if scan.mask is None or stored is None:
        return scan.mask is None and stored is None
    return bool(stored["source_sha256"] == source_sha256([scan.mask]) and stored.get("rois", []) == list(scan.rois))


def named_anew(row: Row, scan: Scan) -> Row:
    """What a table or data set says of a stored case now: patient, label, split, and what labels are called."""
    values = table_values(scan)
    said = {"case_id": row["case_id"], **values, **{name: row[name] for name in row if name not in values}}
    if row["mask"]:
        mask = {key: value for key, value in row["mask"].items() if key != "names"}
        said["mask"] = mask | ({"names": names_of(scan)} if scan.called else {})
    return said


def names_of(scan: Scan) -> dict[str, str]:
    """What the labels of its mask are called, as a manifest writes it."""
    return {str(label): name for label, name in scan.called.items()}


def source_sha256(files: Iterable[Path]) -> str:
    """SHA-256 of one file, or of the sorted SHA-256s of several (a series in any order)."""
    return of_several(sha256_file(path) for path in files)


def of_several(checksums: Iterable[str]) -> str:
    """One checksum for those of several files, in any order; that of one file is its own."""
    digests = sorted(checksums)
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def refuse_other_case(scan: Scan, row: Row) -> None:
    """The store has a case of this name from another place: the same bytes are the same case, others are not."""
    digest = medmnist.sha256(scan.files[0]) if scan.kind == "medmnist" else source_sha256(scan.files)
    if digest != row["source_sha256"]:
        raise DagmanError(
            "DUPCASE",
            scan.source,
            f"the store holds another scan as {scan.case_id}, from {row['source']}",
            "give both scans in one command, rename the file, or choose another output",
        )


def is_stored(output: Path, row: Row, storage: store.Storage) -> bool:
    """Whether the files of a row are there with their sizes."""
    return all(
        (path := store.array_path(output, kind, row["case_id"], storage)).is_file()
        and path.stat().st_size == kept["bytes"]
        for kind, kept in store.recorded(row).items()
    )


def rejected_row(case_id: str | None, source: str, error: DagmanError | Problem) -> Row:
    """Why something is not in the store."""
    return {
        "case_id": case_id,
        "source": source,
        "code": error.code,
        "problem": error.problem,
        "advice": error.advice,
    }
