"""A label map as a DICOM segmentation object that refers to the patient and slices it was made from."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dagman import files
from dagman.ct.dicom import open_header
from dagman.errors import DagmanError
from dagman.run import package_version
from dagman.types import Grid

TOLERANCE_MM = 0.01
"""Between where a slice lies and where the grid has it."""


REFERRED = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPClassUID", "SOPInstanceUID")


def refuse_bare(slice_file: Path) -> None:
    """Refuse a series that nothing can refer to, before it is segmented.

    Raises:
        DagmanError: `E-DICOM`, naming what it lacks.
    """
    header = open_header(slice_file)
    if lacking := [name for name in REFERRED if not header.get(name)]:
        problem = f"lacks {', '.join(lacking)}, which a segmentation refers to"
        raise DagmanError("DICOM", slice_file, problem, "leave out --to for NIfTI")


def write(
    numbers: UInt8[np.ndarray, "x y z"], grid: Grid, slices: Sequence[Path], names: Sequence[str], path: Path
) -> None:
    """Write a DICOM SEG with one segment a class.

    It carries name and number of the patient from the slices, as DICOM demands.

    Args:
        numbers: Class numbers on the series' own grid, 0 the background.
        grid: That grid.
        slices: The series.
        names: Of the classes.
        path: The file.

    Raises:
        DagmanError: `E-HIGHDICOM` where the package is missing; `E-MULTIFRAME` for a series that is one file.
    """
    highdicom = _highdicom(path)
    headers = _in_order([open_header(file) for file in slices], grid, slices)
    frames = np.ascontiguousarray(numbers.transpose(2, 1, 0))
    with warnings.catch_warnings():
        # Names and codes of the source that the standard frowns on go over as they are.
        warnings.simplefilter("ignore", UserWarning)
        segmentation = highdicom.seg.Segmentation(
            source_images=headers,
            pixel_array=frames,
            segmentation_type="BINARY",
            segment_descriptions=[_segment(highdicom, number, name) for number, name in enumerate(names, 1)],
            series_instance_uid=highdicom.UID(),
            series_number=900,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="DAGMaN",
            manufacturer_model_name="dagman segment",
            software_versions=_version(),
            device_serial_number="1",
            omit_empty_frames=bool(frames.any()),
        )
    files.write_atomic(path, segmentation.save_as)


def _version() -> str:
    return package_version("dagman") or "from its sources"


def _highdicom(path: Path) -> Any:
    try:
        import highdicom
    except ImportError:
        raise DagmanError("HIGHDICOM", path, "needs the package highdicom", "pip install 'dagman[seg]'") from None
    return highdicom


def _in_order(headers: Sequence[Any], grid: Grid, slices: Sequence[Path]) -> list[Any]:
    """Headers in the order of the grid's third axis."""
    if len(headers) != grid.shape[2] or any("ImagePositionPatient" not in header for header in headers):
        raise DagmanError("MULTIFRAME", slices[0], "is no series of one file a slice", "write NIfTI: leave out --to")
    placed: dict[int, Any] = {}
    for header in headers:
        right, front, head = (float(value) for value in header.ImagePositionPatient)
        index = np.linalg.solve(grid.affine, [-right, -front, head, 1.0])[:3]
        step = round(float(index[2]))
        off_mm = np.linalg.norm(grid.affine[:3, :3] @ (index - [0, 0, step]))
        if off_mm > TOLERANCE_MM or step in placed:
            raise DagmanError("ORIENT", slices[0], f"lies {off_mm:.3g} mm off the grid", "write NIfTI: leave out --to")
        placed[step] = header
    return [placed[step] for step in sorted(placed)]


def _segment(highdicom: Any, number: int, name: str) -> Any:
    """A class by its name; its code says no more than tissue, as 3D Slicer's for segments that nobody coded."""
    from pydicom.sr.codedict import codes

    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:64],
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=codes.SCT.Tissue,
        algorithm_type="AUTOMATIC",
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="DAGMaN", family=codes.DCM.ArtificialIntelligence, version=_version()
        ),
    )
