"""Does pretraining help to classify? Lung metastasis of sarcomas (STS), and adrenal glands (MedMNIST3D).

    python benchmarks/uses_classify.py --data DATA --work WORK --weights RUN [--part 0/2] [--only adrenal]

STS: 40 patients in three folds, crops around the tumour: the protocol, not evidence, with 17 positives. Adrenal 28: the
official split, a few seeds; these are binary shapes of glands, not CTs: the chain is shown, not what CTs teach.
Starts: `probe`; `fine-tuned`, whose linear layer starts as that probe, and `fine-tuned random head`, whose does not
(RUN's encoder); `random probe` (the same encoder untrained), `scratch` (it, trained from random weights), `resnet50`
(MONAI's, from random weights); an encoder's linear layer sees what its probe sees. Every training writes its own
`benchmarks/results/uses/classify-STUDY-START-seedSEED.json`; what is there, of the same weights, is not run again, so
that the table grows over several sittings, and `--part i/n` shares it out. A training that was interrupted goes on bit
for bit.
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from dagman import PreparedStore, embed, files, load_encoder, prepare
from dagman.ct import crops
from dagman.nets.encoder import Encoder
from dagman.run import describe_environment
from dagman.tasks import classify as probing
from dagman.tasks import leakage, predictions
from dagman.tasks.embed import untrained
from dagman.tasks.predictions import Predictions
from dagman.tasks.protocol import Protocol
from dagman.train.classify import ClassifyConfig, finetune
from dagman.train.finetune import FinetuneConfig

RESULTS = Path(__file__).parent / "results" / "uses"
STARTS = ("probe", "random probe", "fine-tuned", "fine-tuned random head", "scratch", "resnet50")
TUNED = ("fine-tuned", "fine-tuned random head")
PRETRAINED = ("probe", *TUNED)
STUDIES: dict[str, dict[str, Any]] = {
    "sts": {"protocol": Protocol(), "seeds": (0,), "steps": 150, "rate": 2e-4, "keep_sides": False},
    "adrenal": {
        "protocol": Protocol(split=True, group_by="case"),
        "seeds": (0, 1, 2),
        "steps": 400,
        "rate": 1e-3,
        "keep_sides": True,
    },
}
"""Adrenal's shapes stand in one pose and are not mirrored, as those that the networks of its published table
learnt from: their brightness alone was altered (MedMNIST/experiments, `MedMNIST3D`)."""


def store_of(study: str, data: Path, work: Path) -> PreparedStore:
    """The labelled cases, made at their first use."""
    source = data / "medmnist3d" / "adrenalmnist3d.npz"
    if study == "sts":
        source = work / "sts.csv"
        work.mkdir(parents=True, exist_ok=True)
        rows = csv.DictReader((data / "sts" / "labels.csv").open())
        labels = {row["case"]: row["lung_metastasis"] for row in rows}
        with source.open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["case_id", "image", "label", "mask", "patient"])
            for image in sorted((data / "sts").resolve().glob("*_ct.nii.gz")):
                name = image.name.removesuffix("_ct.nii.gz")
                mask = image.with_name(f"{name}_gtv.nii.gz")
                writer.writerow([name, image, labels[name], mask, name])
    prepare([source], work / study)
    return PreparedStore(work / study)


def plan(only: str | None) -> Iterator[tuple[str, str, int]]:
    """Studies, starts and seeds."""
    for study, about in STUDIES.items():
        if only in (None, study):
            for seed in about["seeds"]:
                yield from ((study, start, seed) for start in STARTS if "probe" not in start or seed == 0)


Found = tuple[dict[str, Any], Predictions]
"""Scores, and what they are of."""


def tuned(
    which: tuple[str, str, int], encoder: Encoder, store: PreparedStore, given: argparse.Namespace
) -> Found | None:
    """A study; None when a signal stopped it."""
    study, start, seed = which
    about = STUDIES[study]
    steps = given.steps or about["steps"]
    learning = FinetuneConfig(
        steps=steps,
        batch_size=32 if study == "adrenal" else 8,
        learning_rate=2e-4 if start == "fine-tuned" else about["rate"],
        layer_decay=0.75 if start in TUNED else 1.0,
        check_every=max(1, steps // 8),
        precision=given.precision,
        seed=seed,
    )
    network = "resnet50" if start == "resnet50" else "encoder"
    head: Literal["probe", "random"] = "probe" if start == "fine-tuned" else "random"
    config = ClassifyConfig(
        finetune=learning,
        protocol=about["protocol"],
        network=network,
        which="all",
        head=head,
        keep_sides=about["keep_sides"],
    )
    folder = given.work / f"{study}-{start.replace(' ', '-')}-steps{steps}-seed{seed}"
    began = time.monotonic()

    def tell(done: int, total: int, note: str) -> None:
        if done % 50 == 0:
            print(f"{study} {start} seed {seed}: {done}/{total} {note}, {time.monotonic() - began:.0f} s", flush=True)

    first = encoder if start in TUNED else untrained(encoder, seed)
    weights = given.weights if start in TUNED else None
    found = finetune(first, store, folder, config, weights=weights, progress=tell, say=print)
    if found is None:
        return None
    named = {"source": given.weights.name} if weights else {}  # not where it lay
    return found | named, predictions.read(folder)


def probed(start: str, study: str, encoder: Encoder, store: PreparedStore, weights: Path) -> Found:
    """A linear probe on all features side by side."""
    seen = encoder if start == "probe" else untrained(encoder)
    table = embed(seen, store, which="all")
    found = probing.probe(table, STUDIES[study]["protocol"])
    overlap = leakage.report(leakage.seen(store.rows, weights if start == "probe" else None), found.case_ids)
    about = {"method": "linear probe", "pretraining_overlap": overlap, "crops_around": crops.around(store)}
    return predictions.summary(found) | about, found


def is_there(path: Path, study: str, digest: str | None) -> bool:
    """Whether a result of these weights and of today's settings is there."""
    if not path.exists():
        return False
    stored = json.loads(path.read_text())
    found = stored["result"]
    mirrored = found.get("settings", STUDIES[study])["keep_sides"] == STUDIES[study]["keep_sides"]
    around = crops.AROUND if study == "sts" else None
    return bool(stored["weights_sha256"] == digest and mirrored and found.get("crops_around") == around)


def plain(found: Predictions) -> dict[str, Any]:
    """Predictions as JSON holds them, for differences between starts case by case."""
    return {
        "case_ids": list(found.case_ids),
        "groups": found.groups.tolist(),
        "labels": found.labels.tolist(),
        "names": list(found.names),
        "fold": found.fold.tolist(),
        "probabilities": found.probabilities.tolist(),
        "thresholds": list(found.thresholds),
        "group_by": found.group_by,
    }


def main() -> None:
    """Run what is missing of this part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--only", choices=list(STUDIES))
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    part, parts = map(int, given.part.split("/"))
    for number, (study, start, seed) in enumerate(plan(given.only)):
        path = RESULTS / f"classify-{study}-{start.replace(' ', '-')}-seed{seed}.json"
        encoder = load_encoder(given.weights)
        digest = files.sha256_file(encoder.report.source) if encoder.report and start in PRETRAINED else None
        if number % parts != part or is_there(path, study, digest):
            continue
        store, began = store_of(study, given.data, given.work), time.monotonic()
        if "probe" in start:
            found = probed(start, study, encoder, store, given.weights)
        else:
            found = tuned((study, start, seed), encoder, store, given)
            if found is None:
                return
        about = {
            "study": study,
            "start": start,
            "seed": seed,
            "weights": given.weights.name,
            "weights_sha256": digest,
            "date": time.strftime("%Y-%m-%d"),
            "machine": describe_environment()["versions"],
            "minutes": round((time.monotonic() - began) / 60, 1),
        }
        files.write_json(path, about | {"result": found[0], "predictions": plain(found[1])})
        print(f"{study} {start} seed {seed}: AUC {found[0]['auc']['value']}; wrote {path}", flush=True)


if __name__ == "__main__":
    main()
