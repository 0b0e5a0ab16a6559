"""What the learning curve trains on and asks about: stores of phantoms and real CTs, and labelled crops of both.

Labelled phantoms come from another cohort than those trained on. The real crops are cut from the scans that the real
run trains on without labels, as a hospital would use them; patients are never on both sides of a probe.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from scipy import ndimage

from dagman import files
from dagman.ct import phantom
from dagman.ct.prepare import prepare
from dagman.ct.store import FORMAT, MANIFEST, SETTINGS, PreparedStore, Triple, array_path, padded_crop, write_array
from dagman.randomness import generator

SPACING_MM, SHAPE = (2.0, 2.0, 2.0), (176, 150, 138)
TRAINING_SEED, PROBE_SEED = 0, 1
ORGANS = ("heart", "liver", "spleen", "stomach", "kidney_left", "kidney_right", "bone", "aorta")
NODULE = "lidc_idri_0314"
"""The real CT whose nodule readers have outlined."""
LARGEST_SIDE = 64
"""Crops are stored at this side; smaller ones are their middle."""
JITTER_VOXELS = 9.0
"""How far a nodule may lie from the middle of the crop that holds it, along each axis."""
NEAR_VOXELS = 20
"""A crop without a nodule has none within this many voxels along some axis."""
ALIKE_SIDE = 32
"""A tumour is told from the place, free of tumour over this side, whose intensities are most like it over this side."""
ORGAN_PATIENTS = 60
"""Of the phantoms asked about, those whose organs are asked for."""
PAIRS_OF_SIDES = 6
BODY_HU = -300


class Crops(NamedTuple):
    """Labelled crops of one question."""

    hu: np.ndarray
    """(crops, side, side, side), int16."""
    words: np.ndarray
    """Class of each."""
    patients: np.ndarray
    scored: np.ndarray | None = None
    """Which of them a probe's score counts; all where None."""

    def middle(self, side: int) -> np.ndarray:
        """The crops cut down to `side`."""
        first = (self.hu.shape[1] - side) // 2
        part = slice(first, first + side)
        return self.hu[:, part, part, part]


def phantom_store(folder: Path, num_volumes: int) -> PreparedStore:
    """A prepared store of phantoms, which need no resampling; their masks are the organs' label maps."""
    if not (folder / MANIFEST).exists():
        rows = Parallel(n_jobs=-1)(delayed(_write_volume)(folder, case) for case in range(num_volumes))
        settings = {"format": FORMAT, "storage": "npy", "spacing_mm": SPACING_MM[0], "resampling": "antialiased"}
        files.write_json(folder / SETTINGS, settings)
        files.write_text(folder / MANIFEST, "".join(map(files.json_line, rows)))
    return PreparedStore(folder)


def _write_volume(folder: Path, case: int) -> dict[str, Any]:
    made = phantom.make(TRAINING_SEED, case, spacing_mm=SPACING_MM, shape=SHAPE)
    name = f"phantom_{case:04d}"
    recorded = {}
    for kind, array in (("volumes", made.volume.hu), ("masks", made.organs)):
        path = array_path(folder, kind, name, "npy")  # type: ignore[arg-type]
        write_array(path, array)
        recorded[kind] = {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    return {
        "case_id": name,
        "patient": str(made.patient),
        "shape": list(made.volume.hu.shape),
        "affine": made.volume.affine.tolist(),
        **recorded["volumes"],
        "mask": recorded["masks"],
    }


def phantom_crops(path: Path, num_cases: int) -> dict[str, Crops]:
    """Three questions about phantoms: is the nodule malignant, which organ is it, is there a nodule."""
    if not path.exists():
        found = Parallel(n_jobs=-1)(delayed(_ask_phantom)(case) for case in range(num_cases))
        _save(path, [crop for crops in found for crop in crops])
    return _load(path)


Asked = tuple[str, np.ndarray, str, str]
"""Question, crop, class, patient."""


def _ask_phantom(case: int) -> list[Asked]:
    made = phantom.make(PROBE_SEED, case, spacing_mm=SPACING_MM, shape=SHAPE)
    draws, number = generator(0, "learning.crops", case), {name: label for label, name in made.names.items()}
    main, nodules = np.argwhere(made.nodule_mask == 1).mean(axis=0), np.argwhere(made.nodule_mask > 0)
    asked = [("malignancy", main, "malignant" if made.nodules[0].malignant else "benign")]
    for name in ORGANS if case < ORGAN_PATIENTS else ():
        voxels = np.argwhere(made.organs == number[name])
        if len(voxels):
            asked.append(("organ", voxels[draws.integers(len(voxels))], name))
    asked.append(("nodule", main + draws.uniform(-JITTER_VOXELS, JITTER_VOXELS, 3), "yes"))
    lungs = np.isin(made.organs, [number[name] for name in ("lung_left", "lung_right", "vessel", "nodule")])
    radius_mm = made.nodules[0].radius_mm
    edge = int(np.ceil(1.6 * radius_mm / SPACING_MM[0]))
    fits = ndimage.distance_transform_edt(lungs, SPACING_MM) > 1.15 * radius_mm + 2  # as `phantom_nodules.place` has it
    fits[:edge], fits[:, :edge], fits[:, :, :edge] = False, False, False
    fits[-edge:], fits[:, -edge:], fits[:, :, -edge:] = False, False, False
    places = np.argwhere(fits & np.isin(made.organs, (number["lung_left"], number["lung_right"])))
    for fitting in places[draws.permutation(len(places))[:200]]:
        place = fitting + draws.uniform(-JITTER_VOXELS, JITTER_VOXELS, 3)  # drawn as a nodule's is, and then missed
        if np.abs(nodules - place).max(axis=1).min() > NEAR_VOXELS:
            asked.append(("nodule", place, "no"))
            break
    # Of patients 2n and 2n + 1 one nodule is malignant: apart they would tell each other's class.
    groups = {"malignancy": f"pair {made.patient // 2}"}
    return [(name, _cut(made.volume.hu, at), word, groups.get(name, str(made.patient))) for name, at, word in asked]


LAYOUT = ("ct_corpus/index.json", "ct_corpus/*.nii.gz", "sts/*_ct.nii.gz", "lidc/LIDC-IDRI-0314_nodule_votes.nii.gz")
"""Of the folder of real CTs: public CTs with their patients, sarcomas with masks, and the nodule of one CT."""


def missing(data: Path) -> list[str]:
    """What the folder of real CTs lacks."""
    return [pattern for pattern in LAYOUT if not any(data.glob(pattern))]


def real_store(data: Path, work: Path) -> PreparedStore:
    """Whole CTs of chest and abdomen, and soft-tissue sarcomas with their tumours' masks, prepared in `work/real`."""
    folder, done = work / "real", work / "real.done"
    if done.exists():
        return PreparedStore(folder)
    patients = {row["name"]: row["patient"] for row in json.loads((data / "ct_corpus" / "index.json").read_text())}
    nodules = (data / "lidc" / "LIDC-IDRI-0314_nodule_votes.nii.gz").resolve()
    rows = [
        [name := path.name.removesuffix(".nii.gz"), path.resolve(), nodules if name == NODULE else "", patients[name]]
        for path in sorted((data / "ct_corpus").glob("*.nii.gz"))
    ]
    for path in sorted((data / "sts").glob("*_ct.nii.gz")):
        name = path.name.removesuffix("_ct.nii.gz")
        rows.append([name, path.resolve(), path.with_name(f"{name}_gtv.nii.gz").resolve(), name])
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([["case_id", "image", "mask", "patient"], *rows])
    source = folder.with_suffix(".csv")
    files.write_text(source, table.getvalue())
    prepare([source], folder)
    files.write_text(done, "")
    return PreparedStore(folder)


def real_crops(data: Path, work: Path) -> dict[str, Crops]:
    """Two questions about real CTs: tumour or a place like it, left or right."""
    path = work / "real_crops.npz"
    if not path.exists():
        store = real_store(data, work)
        _save(path, [crop for row in range(len(store)) for crop in _ask_scan(store, row)])
    return _load(path)


def unseen(store: PreparedStore) -> list[int]:
    """Every second sarcoma: rows whose tumours are asked about, for runs that leave these scans out."""
    masked = [row for row, said in enumerate(store.rows) if said["mask"] and said["case_id"] != NODULE]
    return masked[1::2]


def by_sight(questions: dict[str, Crops], store: PreparedStore) -> dict[str, Crops]:
    """The question of tumours, learnt as ever, but scored on the patients of `unseen`, and on the others, alone."""
    asked = questions["tumour"]
    left_out = np.isin(asked.patients, [str(store.rows[row]["patient"]) for row in unseen(store)])
    parts = {"tumour unseen": left_out, "tumour seen": ~left_out}
    return questions | {name: asked._replace(scored=part) for name, part in parts.items()}


def _ask_scan(store: PreparedStore, row: int) -> list[Asked]:
    hu, patient = store.hu(row), str(store.rows[row]["patient"])
    body = hu > BODY_HU
    mask = store.mask(row)
    if mask is None or store.rows[row]["case_id"] == NODULE:
        return [("side", _cut(hu, centre), word, patient) for centre, word in _sides(body)]
    places = _like_tumour(hu, mask)
    return [("tumour", _cut(hu, place), word, patient) for place, word in zip(places, ("yes", "no"), strict=False)]


def _like_tumour(hu: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The middle of a tumour, and that of the place most like it; none where no place is free or the scan is small."""
    side = ALIKE_SIDE
    free = _boxes(mask > 0, side) == 0
    if not free.any():
        return []
    shades = np.digitize(hu, np.linspace(-1000, 400, 17)[1:-1])
    first = np.rint(np.argwhere(mask > 0).mean(axis=0)).astype(int) - side // 2
    first = np.clip(first, 0, np.array(free.shape) - 1)
    unlike = np.zeros(free.shape)
    for shade in range(16):
        share = _boxes(shades == shade, side)
        unlike += np.abs(share - share[tuple(first)])
    other = np.unravel_index(int(np.where(free, unlike, np.inf).argmin()), free.shape)
    return [np.array(corner) + side // 2 for corner in (first, other)]


def _boxes(counted: np.ndarray, side: int) -> np.ndarray:
    """How many voxels count in every box of `side` that lies inside, by its first voxel; empty where none does."""
    sums = np.pad(counted.astype(np.int64), ((1, 0),) * 3)
    for axis in range(3):
        sums = sums.cumsum(axis=axis)
    for axis in range(3):
        sums = np.moveaxis(sums, axis, 0)
        sums = np.moveaxis(sums[side:] - sums[:-side], 0, axis)
    return sums


def _sides(body: np.ndarray) -> list[tuple[np.ndarray, str]]:
    """Mirrored pairs of places left and right of the midline, at several heights."""
    places = []
    for height in np.linspace(0.15, 0.85, PAIRS_OF_SIDES):
        z = int(height * body.shape[2])
        x, y = np.nonzero(body[:, :, z])
        low, high = np.percentile(x, [2, 98])
        for word, share in (("left", 0.27), ("right", 0.73)):  # x grows to the patient's right
            places.append((np.array([low + share * (high - low), np.median(y), z]), word))
    return places


def _cut(hu: np.ndarray, centre: np.ndarray, outside: int = -1024) -> np.ndarray:
    corner: Triple = tuple(round(float(middle)) - LARGEST_SIDE // 2 for middle in centre)  # type: ignore[assignment]
    return padded_crop(hu, corner, (LARGEST_SIDE,) * 3, outside)


def _save(path: Path, asked: list[Asked]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names, hu, words, patients = zip(*asked, strict=True)
    np.savez(path, names=np.array(names), hu=np.stack(hu), words=np.array(words), patients=np.array(patients))


def _load(path: Path) -> dict[str, Crops]:
    with np.load(path) as stored:
        names, hu, words, patients = (stored[key] for key in ("names", "hu", "words", "patients"))
    return {
        str(name): Crops(hu[names == name], words[names == name], patients[names == name])
        for name in dict.fromkeys(names.tolist())
    }
