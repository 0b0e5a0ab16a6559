"""Structures drawn on a CT that lie in DICOM: RTSTRUCT contours and SEG frames, as labels on the CT's own grid.

Runs inside the guarded process. RTSTRUCT is filled by `dagman.ct.contours`: the scan converters at hand either need the
DICOM images beside the contours or fill each contour alone, without its holes. SEG is read by highdicom.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from dagman.ct import contours, pixels
from dagman.errors import DagmanError

MODALITIES = ("RTSTRUCT", "SEG")
TOLERANCE = 0.05
"""Frames of a SEG may lie this share of a voxel away from the image's voxels."""
_SAME_PLANE = 0.05
"""Contours that lie this share of a slice apart are of one plane."""
_SAME_GAP = 1.1
"""Gaps between planes that differ by this factor are the same."""
_CLOSED = ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
_MOST_POINTS = 20_000_000
_GRID = "give the CT it was drawn on"
_SELECT = "name those wanted after the file, such as file.dcm#GTV-1|GTV-2"


class Roi(NamedTuple):
    """One structure."""

    number: int
    name: str


def read(
    *, path: str, image: str | None, shape: list[int], affine: list[list[float]], rois: list[str], max_voxels: int
) -> tuple[Any, np.ndarray]:
    """Labels 1, 2, ... of the ROIs on a grid, in the order asked for; where two overlap, the later one is seen.

    Args:
        path: An RTSTRUCT or SEG.
        image: A file of the DICOM series that the grid is of; None where it is no DICOM.
        shape: Columns, rows, slices.
        affine: (4, 4), their index to RAS mm.
        rois: Names (in any case) or numbers; none: all, by number, where no two overlap.
        max_voxels: The most that a SEG may hold.

    Raises:
        DagmanError: `E-REFERENCE` for another CT's structures, `E-ROI` for names that are not there or not clear,
            `E-MASK` where they do not lie on the grid.
    """
    file, grid = Path(path), np.array(affine)
    with pixels.parsing("DICOM", file, "its structures are broken", "export them again"):
        header = pixels.parse(file, header_only=True).data
        if image is not None:
            _check_reference(file, header, pixels.parse(Path(image), header_only=True).data)
        if pixels.word(header, "Modality") == "SEG":
            known = [Roi(int(one.SegmentNumber), str(one.SegmentLabel)) for one in header.SegmentSequence]
            _check_size(file, header, max_voxels)
            chosen = _chosen(file, known, rois)
            masks = _segmented(file, chosen, shape, grid)
        else:
            known = [Roi(int(one.ROINumber), str(one.get("ROIName", ""))) for one in header.StructureSetROISequence]
            chosen = _chosen(file, known, rois)
            masks = _drawn(file, header, chosen, shape, grid)
        return None, _labels(file, masks, shape, chosen if rois else None)


def _labels(path: Path, masks: Iterator[np.ndarray], shape: Sequence[int], wanted: Sequence[Roi] | None) -> np.ndarray:
    """A label map from the voxels (n, 3) of each structure; each of those asked for by name is in it."""
    labels = np.zeros(shape, np.int16)
    for label, voxels in enumerate(masks, 1):
        where = tuple(voxels.T)
        if wanted is None and labels[where].any():
            raise DagmanError("ROI", path, "holds structures that overlap", _SELECT)
        labels[where] = label
    if not labels.any():
        raise DagmanError("MASK", path, "holds no voxel of this CT", _GRID)
    gone = [roi for label, roi in enumerate(wanted or (), 1) if not (labels == label).any()]
    if gone:
        problem = f"has no voxel of {gone[0].name or gone[0].number} to see: it is empty, or a later one covers it"
        raise DagmanError("ROI", path, problem, "name it after the one that covers it, or leave it out")
    return labels


def _chosen(path: Path, known: Sequence[Roi], wanted: Sequence[str]) -> list[Roi]:
    """The structures asked for, in that order; a name stands before a number."""
    if not wanted:
        return sorted(known)
    chosen = []
    for word in wanted:
        named = [roi for roi in known if roi.name.strip().casefold() == word.casefold()]
        named = named or [roi for roi in known if str(roi.number) == word]
        if len(named) != 1:
            problem = f"holds {len(known)} structures, {len(named) or 'none'} of them named {word}"
            raise DagmanError("ROI", path, problem, _SELECT)
        chosen += named
    return chosen


def _check_reference(path: Path, header: Any, image: Any) -> None:
    """The structures name the series of the image; or, where they name none, its frame of reference."""
    series, frames = _named_series(header), _named_frames(header)
    of_image, frame = str(image.get("SeriesInstanceUID")), str(image.get("FrameOfReferenceUID"))
    if series and of_image not in series:
        raise DagmanError("REFERENCE", path, "was drawn on another series than this CT", _GRID)
    if not series and frame not in frames:
        problem = "lies in another frame of reference than this CT" if frames else "does not say what it was drawn on"
        raise DagmanError("REFERENCE", path, problem, _GRID)


def _named_series(header: Any) -> set[str]:
    """SeriesInstanceUIDs that an RTSTRUCT or a SEG refers to."""
    series = list(header.get("ReferencedSeriesSequence", []))
    for frame in header.get("ReferencedFrameOfReferenceSequence", []):
        for study in frame.get("RTReferencedStudySequence", []):
            series += study.get("RTReferencedSeriesSequence", [])
    return {str(one.SeriesInstanceUID) for one in series if "SeriesInstanceUID" in one}


def _named_frames(header: Any) -> set[str]:
    frames = [header, *header.get("ReferencedFrameOfReferenceSequence", [])]
    rois = [one.get("ReferencedFrameOfReferenceUID") for one in header.get("StructureSetROISequence", [])]
    return {str(uid) for uid in [one.get("FrameOfReferenceUID") for one in frames] + rois if uid}


def _drawn(
    path: Path, header: Any, rois: Sequence[Roi], shape: Sequence[int], affine: np.ndarray
) -> Iterator[Int[np.ndarray, "voxels 3"]]:
    """Voxels of each ROI of an RTSTRUCT."""
    sequences = {int(one.ReferencedROINumber): one for one in header.get("ROIContourSequence", [])}
    apart = _apart(path, list(sequences.values()), affine)
    left = _MOST_POINTS
    for roi in rois:
        items = _closed(sequences[roi.number]) if roi.number in sequences else []
        lines = [_points(path, one, affine) for one in items]
        left -= sum(map(len, lines))
        if left < 0:
            raise DagmanError("BOMB", path, f"holds more than {_MOST_POINTS} points", "leave it out")
        yield _filled(path, lines, shape, apart)


def _closed(drawn: Any) -> list[Any]:
    """The closed contours of an item of the ROIContourSequence."""
    return [one for one in drawn.get("ContourSequence", []) if pixels.word(one, "ContourGeometricType") in _CLOSED]


def _apart(path: Path, drawn: Sequence[Any], affine: np.ndarray) -> float:
    """Slices from a plane to the next one, for structures of few planes: the smallest gap over all of the file.

    One slice where that gap comes only once: two planes far apart look the same whether what lies between was left
    out or is not part of the structure.
    """
    gaps: list[float] = []
    for one in drawn:
        lines = []
        for contour in _closed(one):
            # A contour that cannot be read is an error of its own structure, where that one is asked for.
            with suppress(DagmanError, ValueError, AttributeError):
                lines.append(_points(path, contour, affine))
        if flat := [line for line in lines if not _crosses(line)]:
            gaps += np.diff(_planes(flat)[0]).tolist()
    gaps.sort()
    same = [gap for gap in gaps if gap <= gaps[0] * _SAME_GAP]
    return same[-1] if len(same) > 1 else 1.0


def _points(path: Path, contour: Any, affine: np.ndarray) -> np.ndarray:
    """A contour's points as (column, row, slice) of the grid."""
    found = contour.get_item("ContourData").value
    # As it lies in the file: pydicom makes an object of each number, which takes seconds for a whole structure set.
    numbers = found.strip(b" \0").split(b"\\") if isinstance(found, bytes) else found
    points = np.array(numbers, dtype=np.float64).reshape(-1, 3) * [-1, -1, 1]
    if not np.isfinite(points).all() or not len(points):
        raise DagmanError("MASK", path, "has a contour without numbers", "export it again")
    places: np.ndarray = (points - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
    return places


def _crosses(line: np.ndarray) -> bool:
    """Whether a contour (points, 3) lies in no slice."""
    return bool(np.ptp(line[:, 2]) > 0.5)


def _regular(places: np.ndarray) -> float | None:
    """Slices from plane to plane of a structure whose own planes tell it: most of them, three and more, lie alike."""
    gaps = np.diff(places)
    if not len(gaps):
        return None
    middle = float(np.median(gaps))
    alike = np.count_nonzero((gaps <= middle * _SAME_GAP) & (middle <= gaps * _SAME_GAP))
    return middle if alike >= 3 and 2 * alike > len(gaps) else None


def _filled(path: Path, lines: Sequence[np.ndarray], shape: Sequence[int], apart: float) -> np.ndarray:
    """Voxels inside: each slice shows the contours of the plane nearest to it, no farther than half of `apart`.

    Where the structure's own planes lie regularly, they tell how far apart.
    """
    if any(map(_crosses, lines)):
        raise DagmanError("MASK", path, "has contours that cross the slices of this CT", _GRID)
    if not lines:
        return np.zeros((0, 3), np.int64)
    places, planes = _planes(lines)
    if places[0] < -0.51 or places[-1] > shape[2] - 0.49:
        raise DagmanError("MASK", path, "has contours beyond the slices of this CT", _GRID)
    apart = _regular(places) or max(1.0, apart)  # planes of others, finer than slices, leave no holes in these
    slices = np.arange(shape[2])
    nearest = np.abs(slices[:, None] - places).argmin(axis=1)
    away = np.abs(slices - places[nearest])
    near = away <= apart / 2 + 0.01
    if not near.any():  # finer planes, all of them between the same two slices
        near = away <= 0.51
    found = []
    for k in slices[near].tolist():
        layer = np.argwhere(contours.fill(planes[nearest[k]], (shape[0], shape[1])))
        found.append(np.column_stack([layer, np.full(len(layer), k)]))
    return np.concatenate(found) if found else np.zeros((0, 3), np.int64)


def _planes(lines: Sequence[np.ndarray]) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Places of the planes, and the contours (column, row) of each: those that lie closer than a gap are of one."""
    where = np.array([line[:, 2].mean() for line in lines])
    order = np.argsort(where, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(where[order]) > _SAME_PLANE) + 1)
    places = np.array([where[group].mean() for group in groups])
    return places, [[lines[index][:, :2] for index in group] for group in groups]


def _check_size(path: Path, header: Any, max_voxels: int) -> None:
    declared = int(header.Rows) * int(header.Columns) * int(header.get("NumberOfFrames") or 1)
    if declared > max_voxels:
        raise DagmanError("DIMS", path, f"declares {declared} voxels, the most is {max_voxels:.3g}", "leave it out")


def _segmented(
    path: Path, rois: Sequence[Roi], shape: Sequence[int], affine: np.ndarray
) -> Iterator[Int[np.ndarray, "voxels 3"]]:
    """Voxels of each segment of a SEG; of a fractional one, those of at least one half."""
    try:
        from highdicom.seg import segread
    except ImportError:
        raise DagmanError("HIGHDICOM", path, "needs the package highdicom", "install the extra `seg`") from None
    seg = segread(path)
    for roi in rois:
        volume = seg.get_volume(segment_numbers=[roi.number], allow_missing_positions=True)
        inside = np.argwhere(np.asarray(volume.array)[..., 0] >= 0.5)
        to_grid = np.linalg.inv(affine) @ np.diag([-1.0, -1, 1, 1]) @ np.asarray(volume.affine)
        yield _on_grid(path, inside, to_grid, shape)


def _on_grid(path: Path, voxels: np.ndarray, to_grid: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Voxels of a SEG as voxels of the image, which has just these."""
    places = voxels @ to_grid[:3, :3].T + to_grid[:3, 3]
    nearest: np.ndarray = np.rint(places).astype(np.int64)
    steps = np.linalg.norm(to_grid[:3, :3], axis=0)
    if np.abs(steps - 1).max() > 0.01 or np.abs(places - nearest).max(initial=0) > TOLERANCE:
        raise DagmanError("MASK", path, "was drawn on other voxels than this CT's", _GRID)
    if (nearest < 0).any() or (nearest >= np.array(shape)).any():
        raise DagmanError("MASK", path, "has voxels beyond this CT", _GRID)
    return nearest
