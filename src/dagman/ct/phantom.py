"""Synthetic CTs of chest and upper abdomen, with organs and lung nodules: for a first run, for tests and for teaching.

No data set is needed and nothing is random twice: a case depends on `(seed, case)` alone. Every fourth case is a second
scan of the patient before it (the same anatomy and nodules; another position, breath, contrast phase, dose and noise),
so splits must be grouped by patient. The label of a patient is whether its main nodule is malignant; the classes are
balanced over each pair of patients. Size and mean HU do not tell them apart: the rim does.
"""

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dagman import files
from dagman.ct import phantom_anatomy as anatomy
from dagman.ct import phantom_nodules as nodules
from dagman.ct.phantom_canvas import NAMES, Canvas
from dagman.ct.phantom_nodules import Nodule
from dagman.errors import DagmanError
from dagman.randomness import generator
from dagman.types import Volume

HEIGHT_MM = 40.0
"""The scan's middle, above the diaphragm."""
AIR_HU, PADDING_HU = -1000.0, -1024.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Phantom:
    """A CT and the truth about it."""

    volume: Volume
    """int16 HU, (x, y, z) in RAS+."""
    organs: UInt8[np.ndarray, "x y z"]
    """Label map; 0 is outside the body."""
    names: dict[int, str]
    nodules: tuple[Nodule, ...]
    """The main one first."""
    nodule_mask: UInt8[np.ndarray, "x y z"]
    """1 in the main nodule, 2 and 3 in the others, 0 elsewhere."""
    patient: int


def patient_of(case: int) -> int:
    """The patient of a case: of every four cases, the fourth is a second scan of the third's patient."""
    group, place = divmod(case, 4)
    return 3 * group + min(place, 2)


def is_malignant(seed: int, patient: int) -> bool:
    """What the main nodule of a patient is: of patients 2n and 2n + 1, one is malignant and one benign."""
    return bool((patient + generator(seed, "phantom.label", patient // 2).integers(2)) % 2)


def make(
    seed: int,
    case: int,
    *,
    malignant: bool | None = None,
    spacing_mm: tuple[float, float, float] = (2.2, 2.2, 2.5),
    shape: tuple[int, int, int] = (160, 136, 110),
) -> Phantom:
    """Draw one CT of chest and upper abdomen.

    Args:
        seed: The cohort's.
        case: Number of the scan in the cohort.
        malignant: What the main nodule is; None draws it, half of the patients each way.
        spacing_mm: Voxel size along (x, y, z).
        shape: Voxels along (x, y, z).

    Raises:
        DagmanError: `E-PHANTOM` when the field is smaller than 280 x 240 x 150 mm, which cuts the patient.
    """
    field_mm = [size * step for size, step in zip(shape, spacing_mm, strict=True)]
    if any(extent < least for extent, least in zip(field_mm, (280, 240, 150), strict=True)):
        shown = " x ".join(f"{extent:.0f}" for extent in field_mm)
        raise DagmanError("PHANTOM", case, f"a field of {shown} mm cuts the patient", "cover 280 x 240 x 150 mm")
    patient = patient_of(case)
    if malignant is None:
        malignant = is_malignant(seed, patient)
    body, scan = generator(seed, "phantom", patient), generator(seed, "phantom.scan", case)
    canvas = Canvas(shape, spacing_mm, HEIGHT_MM)
    traits = anatomy.draw_patient(body, scan)
    canvas.place(body, scan, traits.stretch)
    chest = anatomy.paint_body(canvas, traits, body)
    depth = anatomy.paint_lungs(canvas, chest, traits, body)
    anatomy.paint_bones(canvas, chest, body)
    anatomy.paint_chest_organs(canvas, chest, traits)
    anatomy.paint_abdomen(canvas, chest, traits, body)
    anatomy.paint_lung_trees(canvas, traits, body)
    found, mask = _paint_nodules(canvas, depth, malignant, generator(seed, "phantom.nodules", patient))
    _paint_table(canvas, scan)
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = canvas.origin_mm
    return Phantom(
        volume=Volume(hu=_measure(canvas, chest.body, scan), affine=affine),
        organs=canvas.labels,
        names=dict(NAMES),
        nodules=found,
        nodule_mask=mask,
        patient=patient,
    )


def _paint_nodules(
    canvas: Canvas, depth: np.ndarray, malignant: bool, rng: np.random.Generator
) -> tuple[tuple[Nodule, ...], np.ndarray]:
    mask = np.zeros(canvas.hu.shape, np.uint8)
    found: list[Nodule] = []
    for number in range(int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))):
        worst = malignant if number == 0 else malignant and rng.random() < 0.4
        radius = float(rng.uniform(*nodules.RADIUS_MM)) if number == 0 else float(rng.uniform(5, 7))
        nodule = Nodule(centre_mm=nodules.place(canvas, depth, radius, rng), radius_mm=radius, malignant=worst)
        box, solid = nodules.paint(canvas, nodule, rng)
        mask[box][solid & (mask[box] == 0)] = number + 1
        found.append(nodule)
    return tuple(found), mask


def _paint_table(canvas: Canvas, rng: np.random.Generator) -> None:
    """A curved table top of carbon over foam on two posts, below the patient's back."""
    back = int(np.flatnonzero((canvas.labels > 0).any(axis=(0, 2)))[0])
    top = float(canvas.axes[1][back]) - rng.uniform(1, 5)
    x, y = canvas.axes[0][:, None, None], canvas.axes[1][None, :, None]
    surface = y - (top + x**2 / rng.uniform(900, 1600))
    air = canvas.labels == 0
    half = rng.uniform(150, 190)
    for depth_mm, thickness, hu in ((6, 12, -930.0), (14, 2.5, -250.0), (24, 9, -960.0), (34, 2.5, -300.0)):
        sheet = np.maximum(np.abs(surface + depth_mm) - thickness / 2, np.abs(x) - half)
        cover = np.clip(0.5 - sheet / canvas.spacing_mm[1], 0, 1)
        canvas.hu += np.where(air, cover * (hu - canvas.hu), 0)
    for side in (-1.0, 1.0):
        post = np.maximum(np.hypot(x - side * 0.55 * half, surface + 24) - 4.5, 0) - 0.5
        canvas.hu += np.where(air, np.clip(0.5 - post / canvas.spacing_mm[1], 0, 1) * (150 - canvas.hu), 0)


def _measure(canvas: Canvas, body: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a scanner makes of the truth: blur, cupping, correlated noise and, for some, a round field of view."""
    from scipy import ndimage

    spacing = np.array(canvas.spacing_mm)
    hu = ndimage.gaussian_filter(canvas.hu, rng.uniform(0.9, 1.3) / spacing, truncate=2.5)
    hu += np.where(body < -4, np.clip(body, -90, 0) * np.float32(rng.uniform(0.02, 0.07)), 0)  # beam hardening
    hu += _noise(canvas, body, rng)
    np.clip(hu, PADDING_HU, 3071, out=hu)
    if rng.random() < 0.4:
        radius = 0.5 * canvas.hu.shape[0] * spacing[0] + rng.uniform(-2, 6)
        outside = np.hypot(canvas.axes[0][:, None], canvas.axes[1][None, :]) > radius
        hu[outside] = PADDING_HU
    return np.rint(hu).astype(np.int16)  # type: ignore[no-any-return]


def _noise(canvas: Canvas, body: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Noise of a random dose and kernel, more in the middle of the body, with streaks along its widest diameter."""
    from scipy import ndimage

    shape, spacing = canvas.hu.shape, np.array(canvas.spacing_mm)
    white = rng.standard_normal(shape, dtype=np.float32)
    fine = ndimage.gaussian_filter(white, [*(rng.uniform(0.9, 1.5) / spacing[:2]), 0.35], truncate=2.5)
    fine /= fine.std()
    coarse = ndimage.uniform_filter1d(white, 21, axis=0)
    coarse /= coarse.std()
    depth = np.clip(-body, 0, 80) / 80
    dose = np.float32(rng.uniform(7, 20))
    wide = (1 + 0.35 * np.clip((canvas.axes[2] - 110) / 50, 0, 1)).astype(np.float32)  # shoulders
    return dose * wide * (0.45 + 0.75 * depth) * (fine + 0.3 * depth * coarse)  # type: ignore[no-any-return]


def write(
    folder: Path,
    num_cases: int,
    *,
    seed: int = 0,
    workers: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write a cohort of phantoms as NIfTI images, masks of the main nodules and a table for `dagman prepare`.

    Args:
        folder: Where `images/`, `masks/` and `cases.csv` go.
        num_cases: Scans; about three quarters as many patients.
        seed: The cohort's.
        workers: Processes; -1 for one on each core.
        progress: Called with (scans painted, scans in all, the name of the last).

    Returns:
        The table `cases.csv`: case_id, image, label (`benign` or `malignant`), mask, patient.
    """
    from joblib import Parallel, delayed

    rows = []
    cases = (delayed(_write_case)(folder, seed, case) for case in range(num_cases))
    for row in Parallel(n_jobs=workers, return_as="generator")(cases):
        rows.append(row)
        if progress:
            progress(len(rows), num_cases, row[0])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["case_id", "image", "label", "mask", "patient"], *rows])
    files.write_text(folder / "cases.csv", table.getvalue())
    return folder / "cases.csv"


def _write_case(folder: Path, seed: int, case: int) -> list[str]:
    """Write one case; its row of the table."""
    phantom = make(seed, case)
    name = f"phantom_{case:03d}"
    image, mask = Path("images") / f"{name}.nii.gz", Path("masks") / f"{name}.nii.gz"
    _write_nifti(folder / image, phantom.volume.hu, phantom.volume.affine)
    _write_nifti(folder / mask, (phantom.nodule_mask == 1).astype(np.uint8), phantom.volume.affine)
    label = "malignant" if phantom.nodules[0].malignant else "benign"
    return [name, str(image), label, str(mask), f"patient_{phantom.patient:03d}"]


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    import nibabel

    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    files.write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
