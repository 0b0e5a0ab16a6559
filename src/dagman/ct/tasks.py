"""What runs inside the guarded process: sorting files, reading a volume, reading a mask."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.ma  # np.percentile imports it at first use, which every fork would pay for
import pydicom

from dagman.ct import dicom, grid, hounsfield, nifti, pixels, segments, sniff, textheader
from dagman.ct.sources import medmnist_files
from dagman.errors import DagmanError

_Result = tuple[Any, np.ndarray | None]
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE


def sniff_files(paths: list[str], key: str) -> _Result:
    """Facts of each file, in order; an error as `[code, problem, advice]`."""
    facts: list[Any] = []
    for path in paths:
        try:
            with pixels.parsing("DICOM", Path(path), "its header is broken", "export it again"):
                facts.append(sniff.sniff(Path(path), key.encode()))
        except DagmanError as error:
            facts.append({"kind": "error", "error": [error.code, error.problem, error.advice]})
        except PermissionError:
            facts.append({"kind": "error", "error": ["PERM", "may not be read", "give yourself the right to read it"]})
        except FileNotFoundError:
            facts.append({"kind": "error", "error": ["GONE", "is no longer there", "put it back"]})
        except IsADirectoryError:
            facts.append({"kind": "error", "error": ["FORMAT", "is a folder", "give one file, such as a .nii.gz"]})
    return facts, None


def read_volume(paths: list[str], kind: str, max_voxels: int, min_extent_mm: float) -> _Result:
    """HU in RAS+ order and, as the value, its affine and the shape and affine of the file's own order."""
    stored, own, slope, intercept = _stored(paths, kind, max_voxels)
    source = Path(paths[0]) if len(paths) == 1 else Path(paths[0]).parent
    hounsfield.check_finite(source, stored)
    turned, affine = grid.to_ras(stored, own)
    grid.check_extent(source, turned.shape, np.linalg.norm(affine[:3, :3], axis=0), min_extent_mm)
    hu = hounsfield.rescaled(source, stored, slope, intercept)
    hounsfield.check_hu(source, hu)
    return [affine.tolist(), list(stored.shape), own.tolist()], grid.to_ras(hu, own)[0]


def read_mask(paths: list[str], kind: str, max_voxels: int) -> _Result:
    """Labels in RAS+ order and, as the value, their affine."""
    stored, affine, slope, intercept = _stored(paths, kind, max_voxels)
    path = Path(paths[0])
    hounsfield.check_finite(path, stored)
    array, affine = grid.to_ras(stored, affine)
    labels = np.asarray(array) if (slope, intercept) == (1.0, 0.0) else array * slope + intercept
    low, high = labels.min(), labels.max()
    if low < 0 or high >= 2**31 or (labels.dtype.kind == "f" and (labels != np.rint(labels)).any()):
        raise DagmanError(
            "MASK",
            path,
            f"holds values from {low:.4g} to {high:.4g} that are no labels",
            "save it with labels 0, 1, 2, ...",
        )
    return affine.tolist(), labels.astype(np.int16 if high < 2**15 else np.int32)


def _stored(paths: list[str], kind: str, max_voxels: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    files = [Path(path) for path in paths]
    if kind == "dicom":
        return dicom.read(files, max_voxels)
    reader = {"nifti": nifti.read, "nrrd": textheader.read, "mha": textheader.read}[kind]
    return reader(files[0], max_voxels)


TASKS = {
    "sniff": sniff_files,
    "volume": read_volume,
    "mask": read_mask,
    "segments": segments.read,
    "medmnist": medmnist_files.read_file,
}
os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
