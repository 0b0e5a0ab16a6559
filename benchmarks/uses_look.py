"""What encoders are looked at for: organs in clusters, attention on nodules and tumours, diversity of heads.

python benchmarks/uses_look.py --work WORK --data DATA --weights RUN [RUN ...] [--only cluster attention diversity]

Each part writes one file to `benchmarks/results/uses/` and its pictures to `docs/`; a part that is there for the same
weights is not done again, and the attention of a case is kept in WORK. Maps and tables of every case go to WORK.
"""

import argparse
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from dagman import files
from dagman.cli.watching import short_names
from dagman.ct import phantom
from dagman.ct.index import index
from dagman.ct.prepare import prepare
from dagman.ct.read import Limits
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.nets.encoder import Encoder
from dagman.nets.weights import load_encoder
from dagman.run import describe_environment
from dagman.tasks import cluster, diversity, pointing, structures
from dagman.tasks.attention import explain
from dagman.tasks.embed import untrained
from dagman.types import Scan
from learning_cases import PROBE_SEED, real_store

RESULTS = Path(__file__).parent / "results" / "uses"
DOCS = Path(__file__).parents[1] / "docs"
SHOWN = "LIDC-IDRI-0314"
"""The whole CT among the four with a nodule: the picture of the docs."""
THIN = Limits(min_extent_mm=10.0)
"""Two of the four scans with a nodule are parts of scans so thin that they would be refused."""
NUM_PHANTOMS = 12
JOINED = re.compile(r"_(left|right)(_\d+)?$|_(L|T|S)?\d+$")
"""Sides, ribs and vertebrae are one class each."""


def main() -> None:
    """Do what is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, nargs="+", required=True)
    parser.add_argument("--only", nargs="+", choices=sorted(PARTS), default=sorted(PARTS))
    parser.add_argument("--name", default="look", help="first part of the result files' names")
    asked = parser.parse_args()
    encoders = {name: load_encoder(path) for name, path in zip(short_names(asked.weights), asked.weights, strict=True)}
    key = {name: files.sha256_file(encoder.report.source) for name, encoder in encoders.items() if encoder.report}
    for part in asked.only:
        path = RESULTS / f"{asked.name}-{part}.json"
        if path.exists() and json.loads(path.read_text())["weights"] == key:
            print(f"{path} is there")
            continue
        began = time.monotonic()
        found = PARTS[part](encoders, asked.data, asked.work)
        about = {
            "weights": key,
            "date": time.strftime("%Y-%m-%d"),
            "machine": describe_environment()["versions"],
            "seconds": round(time.monotonic() - began, 1),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {**found, **about})
        print(f"wrote {path}")


def clusters(encoders: dict[str, Encoder], data: Path, work: Path) -> dict[str, Any]:
    """Organs of one real CT, and of phantoms of many patients."""
    found = {}
    for corpus, (store, labels) in {"real": _totalsegmentator(data, work), "phantoms": _phantoms(work)}.items():
        crops = structures.structures(store, labels)
        print(f"{corpus}: {crops}")
        runs = cluster.compare(encoders, store, crops.places)
        cluster.write(runs, work / "clusters" / corpus)
        shutil.copy(work / "clusters" / corpus / "clusters.png", DOCS / f"uses-clusters-{corpus}.png")
        too_small = dict(crops.too_small)
        found[corpus] = cluster.summary(runs, group_by="patient") | {
            "structures": crops.structures,
            "too_small": too_small,
        }
    return {"corpora": found}


def _totalsegmentator(data: Path, work: Path) -> tuple[PreparedStore, dict[int, str]]:
    image, labels = (
        (data / "seg_totalseg" / f"example_{name}.nii.gz").resolve() for name in ("ct", "seg_fast_force_split")
    )
    table = work / "totalseg.csv"
    files.write_text(table, f"case_id,image,mask,patient\nexample,{image},{labels},example\n")
    prepare([table], work / "totalseg", workers=1)
    content = nibabel.load(labels).header.extensions[0].get_content()
    text = content.decode() if isinstance(content, bytes) else str(content)
    named = re.findall(r'<Label Key="(\d+)"[^>]*><!\[CDATA\[(.*?)\]\]>', text)
    return PreparedStore(work / "totalseg"), {int(label): JOINED.sub("", name) for label, name in named}


def _phantoms(work: Path) -> tuple[PreparedStore, dict[int, str]]:
    folder, lines = work / "organs", ["case_id,image,mask,patient"]
    folder.mkdir(parents=True, exist_ok=True)
    for case in range(NUM_PHANTOMS):
        lines.append(f"phantom{case},ct{case}.nii.gz,organs{case}.nii.gz,patient{phantom.patient_of(case)}")
        if (folder / f"organs{case}.nii.gz").exists():
            continue
        made = phantom.make(PROBE_SEED, case)
        for kind, array in (("ct", made.volume.hu), ("organs", made.organs.astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(array, made.volume.affine), folder / f"{kind}{case}.nii.gz")
    if not (folder / "cases.csv").exists():
        files.write_text(folder / "cases.csv", "\n".join(lines) + "\n")
    prepare([folder / "cases.csv"], work / "organs_prepared", workers=1)
    chosen = {label: name for label, name in phantom.NAMES.items() if name not in ("body", "nodule", "vessel")}
    files.write_json(folder / "names.json", chosen)
    return PreparedStore(work / "organs_prepared"), chosen


def attention(encoders: dict[str, Encoder], data: Path, work: Path) -> dict[str, Any]:
    """Attention on the nodules that have images, and on soft-tissue sarcomas; beside it an untrained encoder's."""
    tag = hashlib.sha256(
        "".join(files.sha256_file(one.report.source) for one in encoders.values()).encode()
    ).hexdigest()
    encoders = {**encoders, "untrained": untrained(next(iter(encoders.values())))}
    return {
        "questions": {
            name: _points(encoders, scans, work / f"{name}-{tag[:8]}") for name, scans in _masked(data, work).items()
        }
    }


def _masked(data: Path, work: Path) -> dict[str, list[Scan]]:
    lines = ["case_id,image,mask,patient"]
    for path in sorted((data / "lidc").glob("*_substack_native.nii.gz")):
        patient = path.name.removesuffix("_substack_native.nii.gz")
        votes = path.with_name(f"{patient}_nodule_votes_native.nii.gz")
        lines.append(f"{patient},{path.resolve()},{_consensus(votes, work)},{patient}")
    whole, votes = (data / "ct_corpus" / "lidc_idri_0314.nii.gz"), data / "lidc" / "LIDC-IDRI-0314_nodule_votes.nii.gz"
    lines.append(f"LIDC-IDRI-0314,{whole.resolve()},{_consensus(votes, work)},LIDC-IDRI-0314")
    files.write_text(work / "nodules.csv", "\n".join(lines) + "\n")
    lines = ["case_id,image,mask,patient"]
    for path in sorted((data / "sts").glob("*_ct.nii.gz")):
        name = path.name.removesuffix("_ct.nii.gz")
        lines.append(f"{name},{path.resolve()},{path.resolve().with_name(f'{name}_gtv.nii.gz')},{name}")
    files.write_text(work / "tumours.csv", "\n".join(lines) + "\n")
    return {name: index([work / f"{name}.csv"])[0] for name in ("nodules", "tumours")}


def _consensus(votes: Path, work: Path) -> Path:
    """What half of LIDC's four readers outlined."""
    image = nibabel.load(votes)
    agreed = (np.asarray(image.dataobj) >= 2).astype(np.uint8)
    path = work / votes.name.replace("votes", "consensus")
    nibabel.save(nibabel.Nifti1Image(agreed, image.affine), path)
    return path


def _points(encoders: dict[str, Encoder], scans: list[Scan], folder: Path) -> dict[str, Any]:
    rows, refused = [], {}
    for scan in scans:
        kept = folder / f"{scan.case_id}.json"
        if not kept.exists():
            try:
                looks = explain(encoders, scan, folder, limits=THIN).looks.values()
            except DagmanError as error:
                print(error)
                refused[scan.case_id] = str(error).partition(" ")[0]
                continue
            files.write_json(kept, [look.pointing for look in looks])
        stored = json.loads(kept.read_text())
        rows += [pointing.Pointing(*row[:5], row[5] and pointing.Shares(*row[5]), row[6]) for row in stored]
    pointing.write(rows, folder)
    if (picture := folder / f"{SHOWN}_attention.png").exists():
        shutil.copy(picture, DOCS / "uses-attention.png")
    return pointing.summary(rows) | {"refused": refused}


def heads(encoders: dict[str, Encoder], data: Path, work: Path) -> dict[str, Any]:
    """Heads of the encoders on real CTs."""
    store = real_store(data, work)
    looked = {**encoders, "untrained": untrained(next(iter(encoders.values())))}
    runs = {name: diversity.head_diversity(encoder, store, num_crops=len(store)) for name, encoder in looked.items()}
    diversity.write(runs, work / "diversity")
    shutil.copy(work / "diversity" / "diversity.png", DOCS / "uses-diversity.png")
    return {"crops": len(store), "rows": diversity.summary(runs)}


PARTS: dict[str, Callable[[dict[str, Encoder], Path, Path], dict[str, Any]]] = {
    "attention": attention,
    "cluster": clusters,
    "diversity": heads,
}

if __name__ == "__main__":
    main()
