"""One scan to one `Volume`: RAS+, its own spacing, exact Hounsfield units, or a refusal that says why."""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Integer

from dagman.ct import grid, guard
from dagman.ct.guard import Limits
from dagman.ct.index import index
from dagman.ct.segments import MODALITIES
from dagman.ct.sources import medmnist
from dagman.ct.survey import Problem, sniff_files
from dagman.errors import DagmanError
from dagman.types import Grid, Scan, Volume

__all__ = ["Limits", "check", "read", "read_mask", "read_mask_of"]

_MOST_COUNTED = 10_000
MASK_TOLERANCE = 0.05
"""Corners of a mask may lie this share of a voxel away from the image's."""


def read(scan: Scan, limits: Limits | None = None) -> Volume:
    """Read a CT in a guarded process; refuse rather than guess.

    Args:
        scan: A row of `index`.
        limits: What reading may cost and how thin a volume may be.

    Returns:
        Every voxel in Hounsfield units as the scanner stored them, axes turned to RAS+, not resampled.

    Raises:
        DagmanError: Why the scan cannot be used honestly; the codes are listed in `docs/errors.md`.
    """
    limits = limits or Limits()
    if scan.kind == "medmnist":
        return medmnist.volume(scan, limits=limits)
    arguments = {
        "paths": [str(path) for path in scan.files],
        "kind": scan.kind,
        "max_voxels": limits.max_voxels,
        "min_extent_mm": limits.min_extent_mm,
    }
    (affine, (x, y, z), own), hu = guard.run("volume", scan.source, arguments, limits)
    own_grid = Grid(shape=(x, y, z), affine=np.array(own))
    return Volume(hu=_present(hu), affine=np.array(affine), own_grid=own_grid)


def read_mask(
    path: Path,
    like: Volume | None = None,
    limits: Limits | None = None,
    *,
    image: Path | None = None,
    rois: Sequence[str] = (),
) -> Volume:
    """Read a label map in a guarded process.

    Args:
        path: NIfTI, NRRD or MHA of whole numbers, 0 outside; or DICOM RTSTRUCT or SEG.
        like: The image it was drawn on, as `read` returned it; RTSTRUCT and SEG need it.
        limits: What reading may cost.
        image: A DICOM file of that image, whose series an RTSTRUCT or SEG must refer to.
        rois: Names or numbers of structures of an RTSTRUCT or SEG, for labels 1, 2, ...; all of them by default.

    Returns:
        Labels (int16 or int32) in the place of `hu`, axes turned to RAS+.

    Raises:
        DagmanError: As `read`; `E-MASK` when the values are no labels or the grid is not the image's; `E-REFERENCE`
            and `E-ROI` as `dagman.ct.segments.read`.
    """
    limits = limits or Limits()
    facts = sniff_files([path], limits)[0]
    if "error" in facts:
        code, problem, advice = facts["error"]
        raise DagmanError(code, path, problem, advice)
    if facts["kind"] == "dicom" and facts["modality"] in MODALITIES:
        return _read_segments(path, like, limits, image, rois)
    if rois:
        raise DagmanError("ROI", path, "is no RTSTRUCT or SEG, so it has no names", "leave out what follows the #")
    if facts["kind"] not in ("nifti", "nrrd", "mha"):
        raise DagmanError("FORMAT", path, "is no NIfTI, NRRD, MHA, RTSTRUCT or SEG file", "save the mask as .nii.gz")
    arguments = {"paths": [str(path)], "kind": facts["kind"], "max_voxels": limits.max_voxels}
    affine, labels = guard.run("mask", path, arguments, limits)
    mask = Volume(hu=_present(labels), affine=np.array(affine))
    if like is not None:
        _check_same_grid(path, mask, like)
    return mask


def _read_segments(path: Path, like: Volume | None, limits: Limits, image: Path | None, rois: Sequence[str]) -> Volume:
    if like is None or like.own_grid is None:
        raise DagmanError("MASK", path, "needs the CT it was drawn on", "name both in a CSV table")
    arguments = {
        "path": str(path),
        "image": str(image) if image else None,
        "shape": [int(side) for side in like.own_grid.shape],
        "affine": like.own_grid.affine.tolist(),
        "rois": list(rois),
        "max_voxels": limits.max_voxels,
    }
    labels, affine = grid.to_ras(_present(guard.run("segments", path, arguments, limits)[1]), like.own_grid.affine)
    return Volume(hu=np.ascontiguousarray(labels), affine=affine)


def read_mask_of(scan: Scan, volume: Volume, limits: Limits | None = None) -> Volume | None:
    """The mask of a row of `index`, on the grid of its image; None for a scan without one."""
    if scan.mask is None:
        return None
    image = scan.files[0] if scan.kind == "dicom" else None
    return read_mask(scan.mask, volume, limits, image=image, rois=scan.rois)


def _present(array: np.ndarray | None) -> np.ndarray:
    if array is None:
        raise AssertionError("the task returns an array")
    return array


def _check_same_grid(path: Path, mask: Volume, image: Volume) -> None:
    if mask.hu.shape != image.hu.shape:
        sides = " and ".join(" x ".join(map(str, volume.hu.shape)) for volume in (mask, image))
        raise _disagrees(path, f"mask and image have {sides} voxels")
    distance = grid.corner_distance_mm(mask.affine, image.affine, image.hu.shape)
    if distance > MASK_TOLERANCE * min(image.spacing_mm):
        raise _disagrees(path, f"corners of mask and image lie {distance:.3g} mm apart")


def _disagrees(path: Path, problem: str) -> DagmanError:
    return DagmanError("MASK", path, problem, "draw or resample the mask on this image's grid")


def check(
    sources: Sequence[Path], *, limits: Limits | None = None, num_workers: int = 1
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Read everything, keep nothing: what is there, and every problem at once.

    Args:
        sources: As `index`.
        limits: As `read`.
        num_workers: Reading processes at a time.

    Returns:
        One row per usable scan (`case_id`, `format`, `shape`, `spacing_mm`, `slices`, `patient`, `label`, `mask`,
        `source`), and all problems. `mask` is the voxels of each of its labels, None without one. Nothing is written.
    """
    limits = limits or Limits()
    scans, problems = index(sources, limits=limits)
    with ThreadPoolExecutor(num_workers) as pool:
        outcomes = list(pool.map(lambda scan: _row(scan, limits), scans))
    rows = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    return rows, problems + [outcome for outcome in outcomes if isinstance(outcome, Problem)]


def labels_of(mask: Integer[np.ndarray, "x y z"]) -> dict[str, int]:
    """Voxels of each label, as a manifest writes them."""
    if not mask.size or mask.min() < 0 or mask.max() > _MOST_COUNTED:
        labels, counts = np.unique(mask, return_counts=True)
        return {str(label): int(count) for label, count in zip(labels, counts, strict=True) if label}
    # Slab by slab in the order of memory: a fraction of the time that sorting takes.
    slabs = np.moveaxis(mask, int(np.argmax(mask.strides)), 0)
    counts = np.sum([np.bincount(slab.ravel(order="K"), minlength=int(mask.max()) + 1) for slab in slabs], axis=0)
    return {str(label): int(counts[label]) for label in np.flatnonzero(counts) if label}


def _row(scan: Scan, limits: Limits) -> dict[str, Any] | Problem:
    try:
        volume = read(scan, limits)
        mask = read_mask_of(scan, volume, limits)
    except DagmanError as error:
        return dataclasses.replace(Problem.of(error), case_id=scan.case_id)
    return {
        "case_id": scan.case_id,
        "format": scan.kind,
        "shape": list(volume.hu.shape),
        "spacing_mm": [round(size, 4) for size in volume.spacing_mm],
        "slices": volume.hu.shape[2],
        "patient": scan.patient,
        "label": scan.label,
        "mask": None if mask is None else labels_of(mask.hu),
        "source": str(scan.source),
    }
