"""LIDC-IDRI as tables and masks: the label of every nodule without images, and what `prepare` takes where they are."""

import csv
import gzip
import hmac
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from dagman.ct import contours, read
from dagman.ct.index import index
from dagman.ct.sources.lidc import Contour, Nodule, Reading, Rule, label
from dagman.ct.survey import PATIENT_KEY, Problem
from dagman.errors import DagmanError
from dagman.files import write_bytes, write_text
from dagman.types import Grid, Scan

LABELS, TABLE, SCANS, MASKS = "labels.csv", "nodules.csv", "scans.csv", "masks"
CONSENSUS = 0.5
"""Share of the readings that must hold a voxel."""
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_masks` came to."""

    nodules: int
    scans: int
    problems: tuple[Problem, ...]


def write_labels(nodules: Sequence[Nodule], output: Path, rule: Rule) -> Path:
    """The label table: one row a nodule that the rule keeps; needs no images."""
    rows: list[list[object]] = [
        ["case_id", "patient", "scan", "label", "median", "malignancy", "column", "row", "z_mm", "slice_thickness_mm"]
    ]
    for nodule in nodules:
        value = label(nodule.malignancy, rule)
        if value is not None:
            column, row, z_mm = (round(place, 2) for place in nodule.centroid)
            median = f"{np.median(nodule.malignancy):g}"
            readings = " ".join(map(str, nodule.malignancy))
            scan = nodule.scan
            place = [column, row, z_mm, scan.slice_thickness_mm]
            rows.append([nodule.case_id, scan.patient, scan.number, value, median, readings, *place])
    write_text(output / LABELS, _csv(rows))
    return output / LABELS


def write_masks(
    nodules: Sequence[Nodule],
    sources: Sequence[Path],
    output: Path,
    rule: Rule,
    *,
    workers: int = 2,
    progress: Tell | None = None,
) -> Written:
    """Consensus masks of the nodules whose CT is there, on its own grid, and the tables that `prepare` takes.

    `nodules.csv` has a row and a mask for each nodule that the rule keeps, to classify; `scans.csv` a row for each CT
    with one mask of all its nodules, to segment. A CT is known by its SeriesInstanceUID. One that cannot be read costs
    its own nodules only; one of whose nodules some cannot be drawn is not in `scans.csv`, where they would pass for
    lung.

    Args:
        nodules: Of the whole database.
        sources: DICOM trees.
        output: Gets `nodules.csv`, `scans.csv` and `masks/`.
        rule: For the labels.
        workers: CTs read at a time.
        progress: Called with CTs done, CTs in all, and the case.
    """
    wanted: dict[str, list[Nodule]] = defaultdict(list)
    for nodule in nodules:
        wanted[f"ct-{_hashed(nodule.scan.series_uid, 10)}"].append(nodule)
    scans, problems = index(sources)
    known = [(scan, wanted[name]) for scan in scans if (name := scan.case_id[: len("ct-") + 10]) in wanted]
    lost = [problem for problem in problems if not problem.ignored]
    drawn: list[_Drawn] = []
    with ThreadPoolExecutor(workers) as pool:
        for one in pool.map(lambda pair: _draw(pair[0], pair[1], output, rule), known):
            drawn.append(one)
            if progress:
                progress(len(drawn), len(known), known[len(drawn) - 1][1][0].scan.patient)
    rows = sorted((row for one in drawn for row in one.rows), key=str)
    whole = sorted((one.whole for one in drawn if one.whole), key=str)
    write_text(output / TABLE, _csv([["case_id", "image", "label", "mask", "patient"], *rows]))
    write_text(output / SCANS, _csv([["case_id", "image", "mask", "patient"], *whole]))
    lost += [problem for one in drawn for problem in one.problems]
    return Written(nodules=len(rows), scans=len(known), problems=tuple(lost))


def _hashed(identifier: str, digits: int) -> str:
    """A PatientID or SeriesInstanceUID as `index` gives it, so that CTs and nodules of a patient go together."""
    key = (os.environ.get("DAGMAN_PATIENT_KEY") or PATIENT_KEY).encode()
    return hmac.new(key, identifier.encode(), "sha256").hexdigest()[:digits]


class _Drawn(NamedTuple):
    """What came of one CT."""

    rows: list[list[object]]
    """Of its nodules."""
    whole: list[object] | None
    """Of the CT; None where its mask would lack a nodule."""
    problems: list[Problem]


def _draw(scan: Scan, nodules: Sequence[Nodule], output: Path, rule: Rule) -> _Drawn:
    """Write the masks of one CT."""
    try:
        grid = read.read(scan).own_grid
    except DagmanError as error:
        return _Drawn([], None, [Problem.of(error)])
    if grid is None:
        raise AssertionError("a CT from a file has a grid of its own")
    image, patient = os.path.relpath(scan.source.absolute(), output.absolute()), _hashed(nodules[0].scan.patient, 12)
    drawn, all_nodules = _Drawn([], None, []), np.zeros(grid.shape, np.uint8)
    for nodule in nodules:
        try:
            mask = consensus(nodule, grid)
        except DagmanError as error:
            drawn.problems.append(Problem.of(error))
            continue
        all_nodules |= mask
        if (kept := label(nodule.malignancy, rule)) is not None:
            name = f"{MASKS}/{nodule.case_id}.nii.gz"
            _write_nifti(output / name, mask, grid)
            drawn.rows.append([nodule.case_id, image, kept, name, patient])
    if drawn.problems:
        return drawn
    name = f"{MASKS}/{scan.case_id}.nii.gz"
    _write_nifti(output / name, all_nodules, grid)
    return drawn._replace(whole=[scan.case_id, image, name, patient])


def consensus(nodule: Nodule, grid: Grid, share: float = CONSENSUS) -> UInt8[np.ndarray, "columns rows slices"]:
    """Voxels that this share of a nodule's readings hold, on the scanner's grid.

    Args:
        nodule: With its contours.
        grid: `own_grid` of the CT: columns, rows and slices as the scanner stored them.
        share: 0.5 is pylidc's default.

    Raises:
        DagmanError: `E-LIDC` when the grid is not the one that was drawn on, or lacks slices of this nodule.
    """
    _check_grid(nodule, grid)
    lines = [contour for reading in nodule.readings for contour in reading.contours]
    slices = _slices(nodule, lines, grid)
    points = np.vstack([line.points for line in lines])
    low, high = points.min(axis=0).tolist(), (points.max(axis=0) + 1).tolist()
    box = slice(low[0], high[0]), slice(low[1], high[1]), slice(min(slices.values()), max(slices.values()) + 1)
    shape = [side.stop - side.start for side in box]
    votes = np.zeros(shape)
    for reading in nodule.readings:
        votes += _reading_mask(reading, (low[0], low[1], box[2].start), shape, slices)
    mask = np.zeros(grid.shape, np.uint8)
    mask[box] = votes >= share * len(nodule.readings)
    if not mask.any():
        raise _refused(nodule, "has no voxel that enough readings hold", "leave it out")
    return mask


def _refused(nodule: Nodule, problem: str, advice: str = "give the whole series as it was published") -> DagmanError:
    return DagmanError("LIDC", nodule.case_id, problem, advice)


def _check_grid(nodule: Nodule, grid: Grid) -> None:
    """Contours are in pixels of axial images whose first pixel is on the patient's right, in front."""
    spacing = nodule.scan.pixel_spacing_mm
    axes = np.diag([-spacing, -spacing, grid.affine[2, 2]])
    if np.abs(grid.affine[:3, :3] - axes).max() > 1e-3 or grid.affine[2, 2] <= 0:
        raise _refused(nodule, f"was drawn on axial images of {spacing:.4g} mm pixels, which this CT does not have")


def _slices(nodule: Nodule, lines: Sequence[Contour], grid: Grid) -> dict[float, int]:
    """Slice of each position of the contours."""
    places = {line.z_mm: (line.z_mm - grid.affine[2, 3]) / grid.affine[2, 2] for line in lines}
    outside = [
        z for z, place in places.items() if abs(place - round(place)) > 0.3 or not 0 <= round(place) < grid.shape[2]
    ]
    if outside or any((line.points.min() < 0 or (line.points >= grid.shape[:2]).any()) for line in lines):
        problem = f"has contours in {len(outside)} slices that this CT lacks" if outside else "leaves the image"
        raise _refused(nodule, problem)
    return {z: round(place) for z, place in places.items()}


def _reading_mask(
    reading: Reading, corner: tuple[int, int, int], shape: Sequence[int], slices: dict[float, int]
) -> Bool[np.ndarray, "columns rows slices"]:
    """What is inside the lines of one reading, in a box; the lines themselves, and what is inside holes, are not."""
    mask = np.zeros(shape, bool)
    for line in sorted(reading.contours, key=lambda each: not each.includes):
        layer = mask[:, :, slices[line.z_mm] - corner[2]]
        points = line.points - corner[:2]
        inside = contours.fill([points], (shape[0], shape[1]))
        layer[:] = layer | inside if line.includes else layer & ~inside
        layer[points[:, 0], points[:, 1]] = False
    return mask


def _write_nifti(path: Path, mask: np.ndarray, grid: Grid) -> None:
    import nibabel

    image = nibabel.Nifti1Image(mask, grid.affine)
    image.set_sform(grid.affine, 1)
    image.set_qform(grid.affine, 1)
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def _csv(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
