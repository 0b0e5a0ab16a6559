"""One DICOM CT series to one volume: slices sorted along their normal, every irregularity refused by name."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom

from dagman.ct import grid, pixels
from dagman.ct.store import AIR_HU
from dagman.errors import DagmanError

MAX_TILT_DEGREES = 0.1
_MOST_HU = 3071
"""Of twelve bits, where metal ends. What a file calls padding and would lie above is air around the image; below, the
tag is not trusted: in many files it names a value that the body has too."""
_EXPORT = "export the series again from the archive"
_CONVERT = "convert it with dcm2niix, which corrects it, and give the NIfTI file"


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """Header of one slice: a file, or one frame of a multi-frame file."""

    path: Path
    index: int
    """Frame in the file, from 0."""
    uid: str
    position: np.ndarray
    """Centre of the first voxel, (x, y, z) in LPS mm."""
    orientation: np.ndarray
    """(2, 3): direction of a row, direction of a column."""
    spacing: np.ndarray
    """Between columns, between rows, in mm."""
    shape: tuple[int, int]
    """Columns, rows."""
    slope: float
    intercept: float
    rescale_type: str
    tilt: float
    study: str
    reference: str
    """UIDs of the study and of the frame in which positions are told; empty where they are missing."""
    padding: float | None
    """The stored value of what lies outside the image."""
    file: pixels.File | None
    """The parsed file; None where only the header could be read."""


def read(paths: Sequence[Path], max_voxels: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """HU (x, y, z), RAS affine, slope 1 and intercept 0.

    Raises:
        DagmanError: `E-DICOM`, `E-MODALITY`, `E-RESCALE`, `E-NOTHU`, `E-BURNEDIN`, `E-MULTIFRAME`, `E-NOFORM`,
            `E-MIXED`, `E-AFFINE`, `E-SPACING`, `E-SMALL`, `E-DUPPOS`, `E-GAP`, `E-TILT`, `E-DIMS`, `E-SLICE`,
            `E-CODEC`.
    """
    frames: list[Frame] = []
    seen: dict[str, str] = {}
    for path in paths:
        with pixels.parsing("DICOM", path, "its header is broken", _EXPORT):
            frames += _frames(path, paths, seen)
    frames = _distinct(frames, seen)
    source = paths[0].parent if len(paths) > 1 else paths[0]
    check_alike(frames)
    ordered, affine = stack(source, frames)
    columns, rows = ordered[0].shape
    if columns * rows * len(ordered) > max_voxels or min(columns, rows) < 1:
        sides = f"{columns} x {rows} x {len(ordered)}"
        raise DagmanError("DIMS", source, f"declares {sides} voxels, the most is {max_voxels:.3g}", _EXPORT)
    return _voxels(ordered), affine, 1.0, 0.0


def _voxels(frames: list[Frame], *, whole: bool = True) -> np.ndarray:
    """HU (x, y, z): int16 where all are whole numbers in its range, else float32."""
    whole = whole and all(float(x).is_integer() and abs(x) < 2**15 for f in frames for x in (f.slope, f.intercept))
    columns, rows = frames[0].shape
    hu = np.empty((columns, rows, len(frames)), np.int16 if whole else np.float32, order="F")
    opened: tuple[Path, pixels.Decode] | None = None
    for k, frame in enumerate(frames):
        if opened is None or opened[0] != frame.path:
            opened = frame.path, pixels.open_file(frame.path, frame.file)
        stored = opened[1](frame.index)
        if stored.shape != (rows, columns):
            raise DagmanError("SLICE", frame.path, f"decodes to {stored.shape} pixels, not {rows} x {columns}", _EXPORT)
        if whole:
            slope, intercept = int(frame.slope), int(frame.intercept)
            ends = [int(end) * slope + intercept for end in (stored.min(), stored.max())]
            if min(ends) < -(2**15) or max(ends) >= 2**15:
                return _voxels(frames, whole=False)
            # Sixteen bits wrap on the way, to and fro: what comes out was just shown to fit.
            narrow, to = stored.T.astype(np.int16), hu[:, :, k]
            np.multiply(narrow, np.array(slope).astype(np.int16), out=to)
            to += np.array(intercept).astype(np.int16)
        else:
            hu[:, :, k] = (stored * np.float64(frame.slope) + frame.intercept).T
        if frame.padding is not None and frame.padding * frame.slope + frame.intercept > _MOST_HU:
            hu[:, :, k][(stored == frame.padding).T] = AIR_HU
    return hu


def _frames(path: Path, paths: Sequence[Path], seen: dict[str, str]) -> list[Frame]:
    """Of one file of a series: one slice, or those of a multi-frame file, of which there may be copies alone."""
    file, header = _parsed(path)
    if pixels.word(header, "Modality") != "CT":
        raise DagmanError("MODALITY", path, "is no CT image", "give CT images")
    if pixels.word(header, "BurnedInAnnotation") == "YES":
        raise DagmanError("BURNEDIN", path, "carries text burned into its pixels", "leave the series out")
    count = int(_number(path, header, "NumberOfFrames", 1))
    if "PerFrameFunctionalGroupsSequence" not in header:
        if count != 1:
            raise DagmanError("MULTIFRAME", path, f"holds {count} frames without their positions", _CONVERT)
        return [_frame(path, header, lambda _: header, 0, file)]
    per_frame = header.PerFrameFunctionalGroupsSequence
    if len(per_frame) != count:
        raise DagmanError("MULTIFRAME", path, f"says it holds {count} frames, and places {len(per_frame)}", _EXPORT)
    if len(paths) > 1 and len({_digest(seen, other) for other in paths}) > 1:
        raise DagmanError("MULTIFRAME", path, f"is one of {len(paths)} multi-frame files of a series", _CONVERT)
    shared = header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()]

    def group(frame: Any) -> Callable[[str], Any]:
        def find(name: str) -> Any:
            return (frame.get(name) or shared[0].get(name) or [pydicom.Dataset()])[0]

        return find

    return [_frame(path, header, group(frame), index, file) for index, frame in enumerate(per_frame)]


def _parsed(path: Path) -> tuple[pixels.File | None, Any]:
    """One file, None where its pixels are broken, and its header: parsing takes longer than reading."""
    try:
        file = pixels.parse(path, header_only=False)
    except (DagmanError, OSError, MemoryError):
        raise
    except Exception:  # whatever a parser throws; the header may be whole
        file = None
    if file and (file.place or "PixelData" in file.data):
        return file, file.data
    return None, open_header(path)


def open_header(path: Path) -> Any:
    """Header of one file, pixels left on disk.

    Raises:
        DagmanError: `E-DICOM` when it cannot be parsed.
    """
    with pixels.parsing("DICOM", path, "its header is broken", _EXPORT):
        return pixels.parse(path, header_only=True).data


def _frame(path: Path, header: Any, group: Callable[[str], Any], index: int, file: pixels.File | None) -> Frame:
    transformation = group("PixelValueTransformationSequence")
    if "RescaleSlope" not in transformation or "RescaleIntercept" not in transformation:
        raise DagmanError("RESCALE", path, "has no RescaleSlope and RescaleIntercept, so no HU", _EXPORT)
    slope = _number(path, transformation, "RescaleSlope")
    if slope == 0:
        raise DagmanError("RESCALE", path, "has RescaleSlope 0", _EXPORT)
    spacing = _vector(path, group("PixelMeasuresSequence"), "PixelSpacing", 2)
    orientation = _vector(path, group("PlaneOrientationSequence"), "ImageOrientationPatient", 6)
    if pixels.word(header, "PhotometricInterpretation") != "MONOCHROME2" or header.get("SamplesPerPixel", 1) != 1:
        raise DagmanError("DTYPE", path, "is not a MONOCHROME2 image of one sample per pixel", _EXPORT)
    return Frame(
        path=path,
        index=index,
        uid=f"{header.get('SOPInstanceUID') or path}:{index}",
        position=_vector(path, group("PlanePositionSequence"), "ImagePositionPatient", 3),
        orientation=orientation.reshape(2, 3),
        spacing=spacing[::-1],
        shape=(int(_number(path, header, "Columns")), int(_number(path, header, "Rows"))),
        slope=slope,
        intercept=_number(path, transformation, "RescaleIntercept"),
        rescale_type=_hounsfield(path, pixels.word(transformation, "RescaleType")),
        tilt=_number(path, header, "GantryDetectorTilt", 0),
        study=str(header.get("StudyInstanceUID") or ""),
        reference=str(header.get("FrameOfReferenceUID") or ""),
        padding=_padding(header),
        file=file,
    )


def _padding(header: Any) -> float | None:
    value = header.get("PixelPaddingValue")
    return float(value) if isinstance(value, int | float) else None


def _hounsfield(path: Path, rescale_type: str) -> str:
    if rescale_type not in ("", "HU", "HU_MOD"):
        raise DagmanError("NOTHU", path, "its RescaleType is not HU", "give the CT images, not maps derived from them")
    return "HU"


def _number(path: Path, header: Any, name: str, default: float | None = None) -> float:
    try:
        value = header.get(name)
        number = float(default if value is None and default is not None else value)
    except (TypeError, ValueError, OverflowError, AttributeError):
        raise DagmanError("DICOM", path, f"{name} is missing or no number", _EXPORT) from None
    if not math.isfinite(number):
        raise DagmanError("DICOM", path, f"{name} is not finite", _EXPORT)
    return number


def _vector(path: Path, header: Any, name: str, count: int) -> np.ndarray:
    try:
        values = np.array([float(value) for value in header.get(name) or ()])
    except (TypeError, ValueError, OverflowError):
        values = np.zeros(0)
    if values.size != count or not np.isfinite(values).all():
        raise DagmanError("NOFORM", path, f"{name} does not hold {count} numbers", _EXPORT)
    return values


def _distinct(frames: list[Frame], seen: dict[str, str]) -> list[Frame]:
    """Frames without byte-identical copies of one file; the same identity over different bytes stays, to be refused."""
    first: dict[str, Frame] = {}
    distinct = []
    for frame in frames:
        if frame.uid not in first:
            first[frame.uid] = frame
        elif _digest(seen, first[frame.uid].path) == _digest(seen, frame.path):
            continue
        distinct.append(frame)
    return distinct


def _digest(seen: dict[str, str], path: Path) -> str:
    if str(path) not in seen:
        with path.open("rb") as stream:
            seen[str(path)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return seen[str(path)]


def check_alike(frames: list[Frame]) -> None:
    """Refuse a series whose slices do not share one grid.

    Raises:
        DagmanError: `E-MIXED` naming the tag and two files.
    """
    first = frames[0]
    for frame in frames[1:]:
        differing = {
            "Rows and Columns": frame.shape != first.shape,
            "PixelSpacing": not np.allclose(frame.spacing, first.spacing, rtol=1e-4),
            "ImageOrientationPatient": np.abs(frame.orientation - first.orientation).max() > 1e-3,
            "GantryDetectorTilt": abs(frame.tilt - first.tilt) > MAX_TILT_DEGREES,
            "StudyInstanceUID": bool(frame.study and first.study) and frame.study != first.study,
            "FrameOfReferenceUID": bool(frame.reference and first.reference) and frame.reference != first.reference,
        }
        for tag, differs in differing.items():
            if differs:
                raise DagmanError(
                    "MIXED",
                    first.path.parent,
                    f"{tag} differs within one series, between {first.path.name} and {frame.path.name}",
                    "keep only the slices that belong together",
                )


def stack(source: Path, frames: list[Frame]) -> tuple[list[Frame], np.ndarray]:
    """Slices in order along their normal, and the affine of the stack to RAS mm.

    Raises:
        DagmanError: `E-AFFINE`, `E-SPACING`, `E-SMALL`, `E-DUPPOS`, `E-TILT`, `E-GAP`.
    """
    row, column = frames[0].orientation
    grid.check_spacing(source, frames[0].spacing)
    lengths = np.linalg.norm([row, column], axis=1)
    if np.abs(lengths - 1).max() > 1e-3 or abs(row @ column) > 1e-3:
        raise DagmanError(
            "AFFINE", source, "ImageOrientationPatient is no pair of unit vectors at right angles", _EXPORT
        )
    row, column = row / lengths[0], column / lengths[1]
    normal = np.cross(row, column)
    if len(frames) == 1:
        raise DagmanError("SMALL", source, "is a single slice", "give the whole series")
    ordered = sorted(frames, key=lambda frame: (float(frame.position @ normal), frame.path.name, frame.index))
    positions = np.array([frame.position for frame in ordered])
    _check_tilt(source, positions, normal, ordered[0].tilt)
    step = _check_steps(source, ordered, positions @ normal)
    affine = np.eye(4)
    affine[:3, 0] = row * frames[0].spacing[0]
    affine[:3, 1] = column * frames[0].spacing[1]
    affine[:3, 2] = normal * step
    affine[:3, 3] = ordered[0].position
    affine[:2] *= -1
    grid.check_affine(source, affine)
    return ordered, affine


def _check_steps(source: Path, ordered: list[Frame], places: np.ndarray) -> float:
    steps = np.diff(places)
    same = np.flatnonzero(steps < 0.01)
    if same.size:
        first, second = ordered[same[0]], ordered[same[0] + 1]
        raise DagmanError(
            "DUPPOS",
            source,
            f"{same.size} slices lie where another one lies, such as {_name(first, second)} and {_name(second, first)} "
            f"at {places[same[0]]:.2f} mm",
            "keep one reconstruction or phase per series",
        )
    usual = float(np.median(steps))
    wrong = np.flatnonzero(np.abs(steps - usual) > max(0.01 * usual, 0.01))
    if wrong.size:
        where = ", ".join(f"{places[i]:.2f} to {places[i + 1]:.2f}" for i in wrong[:3])
        missing = int(np.maximum(np.rint(steps / usual) - 1, 0).sum())
        raise DagmanError(
            "GAP",
            source,
            f"{wrong.size} of {steps.size} steps are not {usual:.4g} mm ({where} mm; slices missing: about {missing})",
            "copy the missing slices into the series" if missing else _CONVERT,
        )
    return float(places[-1] - places[0]) / steps.size


def _check_tilt(source: Path, positions: np.ndarray, normal: np.ndarray, tag: float) -> None:
    """Slices must lie straight above each other along their normal."""
    line = positions[-1] - positions[0]
    length = float(np.linalg.norm(line))
    if length < 0.01:
        return
    angle = math.degrees(math.atan2(float(np.linalg.norm(np.cross(line, normal))), abs(float(line @ normal))))
    if angle > MAX_TILT_DEGREES:
        problem = f"its slices are tilted by {angle:.2f} degrees against the direction they are stacked in"
        raise DagmanError("TILT", source, problem, _CONVERT)
    if abs(tag) > MAX_TILT_DEGREES:
        problem = f"GantryDetectorTilt says {tag:g} degrees, the positions say {angle:.2f}"
        raise DagmanError("TILT", source, problem, _EXPORT)
    offsets = positions - positions[0]
    aside = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    allowed = 0.1 + np.abs(offsets @ normal) * math.tan(math.radians(MAX_TILT_DEGREES))
    if (aside > allowed).any():
        problem = f"a slice is shifted sideways by {aside.max():.3g} mm against the others"
        raise DagmanError("TILT", source, problem, _EXPORT)


def _name(frame: Frame, beside: Frame) -> str:
    """A slice as people find it, beside another that may be of the same name in another folder."""
    alike = frame.path.name == beside.path.name and frame.path != beside.path
    name = f"{frame.path.parent.name}/{frame.path.name}" if alike else frame.path.name
    return name if frame.index == 0 else f"{name} (frame {frame.index + 1})"
