"""The whole chain on real CTs: prepare, pretrain `dagman-tiny`, probe, and look at the attention beside a nodule.

    python benchmarks/real_data.py --data DATA --work WORK [--steps 1000] [--json benchmarks/results/real_data.json]

DATA holds `ct_corpus/*.nii.gz` (chest and abdomen CTs), `sts/STS_*_{ct,gtv}.nii.gz` with `sts/labels.csv` (soft-tissue
sarcoma CTs with tumour masks) and `dicom_series/` (two CT series). Every verb resumes, so the script may be stopped and
started again. Three probes, all by patient: lung metastasis (17 of 40: an illustration of the protocol), side of the
body, and tumour or not.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dagman import files
from dagman.ct.store import PreparedStore
from dagman.nets.weights import load_encoder
from dagman.run import Run, describe_environment
from dagman.tasks import classify
from dagman.tasks.embed import embed, untrained, voxels

CUBE_MM = 24.0
"""Side of the cube that marks where a probe's crop is centred."""
MARGIN_MM = 32.0
"""Half the crop of the tumour probe: neither class shows the end of the scan by its place alone."""
MEASURED_STEPS = 10


def peak_mib() -> int:
    """Most memory of any process that a verb has used so far."""
    return round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def dagman(*arguments: str | Path) -> None:
    """Run one verb; exit code 3 (some inputs rejected) is fine."""
    command = [Path(sys.executable).with_name("dagman"), *map(str, arguments)]
    print("$ dagman", *map(str, arguments), flush=True)
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 3):
        sys.exit(f"dagman {arguments[0]} ended with {code}")


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    """A CSV of cases for `dagman prepare`."""
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["case_id", "image", "label", "mask", "patient"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_cube(image: nib.Nifti1Image, centre: np.ndarray, path: Path) -> Path:
    """A mask on the image's grid: a cube round a voxel."""
    half = np.maximum(1, np.round(CUBE_MM / 2 / np.asarray(image.header.get_zooms()[:3]))).astype(int)
    mask = np.zeros(image.shape, np.uint8)
    low = np.maximum(0, centre - half)
    high = np.minimum(image.shape, centre + half + 1)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
    nib.save(nib.Nifti1Image(mask, image.affine), path)
    return path


def metastasis(data: Path, work: Path) -> Path:
    """Lung metastasis during follow-up, a property of the patient; the crop is centred on the tumour."""
    with (data / "sts" / "labels.csv").open() as stream:
        rows = [
            {
                "case_id": row["case"],
                "image": str((data / "sts" / f"{row['case']}_ct.nii.gz").resolve()),
                "mask": str((data / "sts" / f"{row['case']}_gtv.nii.gz").resolve()),
                "label": row["lung_metastasis"],
                "patient": row["case"],
            }
            for row in csv.DictReader(stream)
        ]
    return write_table(work / "metastasis.csv", rows)


def tumour_or_not(data: Path, work: Path) -> Path:
    """Two crops a patient: round the tumour, and in the body as far from it as the scan goes."""
    rows = []
    for path in sorted((data / "sts").glob("*_ct.nii.gz")):
        name = path.name.removesuffix("_ct.nii.gz")
        image = nib.load(path)
        hu = np.asanyarray(image.dataobj)
        tumour = np.argwhere(np.asanyarray(nib.load(path.with_name(f"{name}_gtv.nii.gz")).dataobj) > 0)
        body = np.argwhere(hu > -300)
        zooms = np.asarray(image.header.get_zooms()[:3])
        inner = np.all((body * zooms > MARGIN_MM) & (body * zooms < np.asarray(hu.shape) * zooms - MARGIN_MM), axis=1)
        body = body[inner] if inner.any() else body
        distance = np.linalg.norm((body - tumour.mean(0)) * zooms, axis=1)
        for label, centre in (("tumour", tumour.mean(0).round().astype(int)), ("not", body[distance.argmax()])):
            mask = write_cube(image, centre, work / f"{name}_{label}.nii.gz")
            rows.append(_row(f"{name}_{label}", path, mask, label, name))
    return write_table(work / "tumour.csv", rows)


def side_of_body(data: Path, work: Path, pairs: int = 6) -> Path:
    """Crops left and right of the midline, mirrored pairs at several heights."""
    patients = {row["name"]: row["patient"] for row in json.loads((data / "ct_corpus" / "index.json").read_text())}
    rows = []
    for path in sorted((data / "ct_corpus").glob("*.nii.gz")):
        name = path.name.removesuffix(".nii.gz")
        image = nib.as_closest_canonical(nib.load(path))
        body = np.asanyarray(image.dataobj) > -300
        for pair, height in enumerate(np.linspace(0.15, 0.85, pairs)):
            z = int(height * body.shape[2])
            x, y = np.nonzero(body[:, :, z])
            low, high = np.percentile(x, [2, 98])
            for label, share in (("left", 0.27), ("right", 0.73)):  # RAS: x grows to the patient's right end
                centre = np.array([round(low + share * (high - low)), round(float(np.median(y))), z])
                mask = write_cube(image, centre, work / f"{name}_{pair}_{label}.nii.gz")
                canonical = work / f"{name}_ras.nii.gz"
                if not canonical.exists():
                    nib.save(image, canonical)
                rows.append(_row(f"{name}_{pair}_{label}", canonical, mask, label, str(patients[name])))
    return write_table(work / "side.csv", rows)


def _row(case_id: str, image: Path, mask: Path, label: str, patient: str) -> dict[str, str]:
    return {
        "case_id": case_id,
        "image": str(image.resolve()),
        "label": label,
        "mask": str(mask.resolve()),
        "patient": patient,
    }


PROBES = {
    "lung metastasis": (metastasis, "1", 64),
    "tumour or not": (tumour_or_not, "tumour", 32),
    "side of the body": (side_of_body, "right", 64),
}
"""Name -> table, positive label, side of the crop in voxels of 2 mm."""


def probe(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Probe the pretrained encoder beside the untrained one and raw voxels."""
    write, positive, side = PROBES[name]
    place = work / name.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    dagman("prepare", "-i", write(data, place), "-o", place / "prepared")
    store = PreparedStore(place / "prepared")
    encoder = load_encoder(work / "run")
    encoder.preparation = replace(encoder.preparation, crop=(side,) * 3)
    tables = {
        "pretrained": embed(encoder, store),
        "untrained": embed(untrained(encoder), store),
        "raw voxels": voxels(store, encoder.preparation),
    }
    results = {kind: classify.probe(table, positive=positive) for kind, table in tables.items()}
    differences = {row["features"]: row["first_minus_this"] for row in classify.beside(results)}
    summaries = {kind: classify.summary(result) for kind, result in results.items()}
    for kind, difference in differences.items():
        summaries[kind]["pretrained_minus_this"] = difference and vars(difference)
    return {"crop": side, **summaries}


def training(run: Run) -> dict[str, Any]:
    """First and last twentieth of the run's metrics."""
    rows = run.metrics()
    part = max(1, len(rows) // 20)
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    summary = {
        when: {name: round(float(np.mean([row[name] for row in some])), 5) for name in names}
        for when, some in (("first", rows[:part]), ("last", rows[-part:]))
    }
    seconds = float(np.median([row["seconds"] for row in rows]))
    return {"steps": len(rows), "seconds_per_step_median": round(seconds, 3), **summary}


def main() -> None:
    """Run the chain and write what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "real_data.json")
    arguments = parser.parse_args()
    data, work = arguments.data, arguments.work
    work.mkdir(parents=True, exist_ok=True)
    unlabelled = work / "prepared"
    sources = (data / "ct_corpus", metastasis(data, work), data / "dicom_series")
    recipe = ("pretrain", "dagman-tiny", "--data", unlabelled)
    dagman("prepare", "-i", *sources, "-o", unlabelled)
    memory = {"prepare": peak_mib()}
    dagman(*recipe, "-o", work / "measured", "--steps", str(MEASURED_STEPS), "--fresh")
    memory["pretrain"] = peak_mib()
    dagman(*recipe, "-o", work / "run", "--steps", str(arguments.steps))
    lidc = data / "ct_corpus" / "lidc_idri_0314.nii.gz"
    nodule = data / "lidc" / "LIDC-IDRI-0314_nodule_votes.nii.gz"
    dagman("attention", "--weights", work / "run", "-i", lidc, "--mask", nodule, "-o", work / "attention")
    store = PreparedStore(unlabelled)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_environment()["versions"],
        "cases": len(store),
        "rejected": len(files.read_lines(unlabelled / "rejected.jsonl")),
        "seconds_per_scan_median": float(np.median([row["seconds"] for row in store.rows])),
        "peak_mib": memory,
        "training": training(Run(work / "run")),
        "probes": {name: probe(name, data, work) for name in PROBES},
    }
    files.write_json(arguments.json, result)
    for name, found in result["probes"].items():
        for kind in ("pretrained", "untrained", "raw voxels"):
            auc = found[kind]["auc"]
            print(f"{name:18s} {kind:12s} AUC {auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f})")
    print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
