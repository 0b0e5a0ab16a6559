"""Does pretraining help to segment tumours? Sarcomas (STS), patients in three folds, and few-shot parts of one fold.

    python benchmarks/uses_segment.py --data DATA --work WORK --weights RUN [--steps 400] [--part 0/2]

Three starts of one size: `pretrained` (RUN's encoder), `scratch` (the same network, new random weights) and `plain` (a
SwinUNETR: the same without semantic attention, new random weights). Every training writes its own
`benchmarks/results/uses/segment-sts-START-FRACTION-FOLD-seedSEED.json`; what is there, of the same steps and weights,
is not run again, so that the table grows over several sittings, and `--part i/n` shares it out. A training that was
interrupted goes on bit for bit.
"""

import argparse
import csv
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dagman import PreparedStore, files, load_encoder, prepare
from dagman.nets.encoder import new
from dagman.tasks import statistics
from dagman.tasks.protocol import Protocol
from dagman.train import segment
from dagman.train.finetune import FinetuneConfig

RESULTS = Path(__file__).parent / "results" / "uses"
STARTS = ("pretrained", "scratch", "plain")
PLAN = [(fold, 1.0) for fold in range(3)] + [(0, 0.25), (0, 0.5)]
"""Folds and fractions of their training patients."""


def sarcomas(data: Path, work: Path) -> PreparedStore:
    """The store of CTs and outlined tumours, made at its first use."""
    found = sorted((data / "sts").glob("*_ct.nii.gz"))
    table = work / "sts.csv"
    work.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["case_id", "image", "mask", "patient"])
        for image in found:
            name = image.name.removesuffix("_ct.nii.gz")
            writer.writerow([name, image.resolve(), image.resolve().with_name(f"{name}_gtv.nii.gz"), name])
    prepare([table], work / "store")
    return PreparedStore(work / "store")


def start(name: str, weights: Path, seed: int) -> tuple[object, str]:
    """The encoder of a start, and where it comes from."""
    encoder = load_encoder(weights)
    if name == "pretrained":
        return encoder, f"run {weights.name}"
    config = replace(encoder.config, attention=None) if name == "plain" else encoder.config
    return new(config, encoder.preparation, seed), f"{name}, new random weights"


def settings(name: str, fraction: float, arguments: argparse.Namespace) -> segment.SegmentConfig:
    """Of one training; the starts differ in nothing but the decay of the learning rate through the encoder."""
    finetune = FinetuneConfig(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=1e-3,
        layer_decay=0.75 if name == "pretrained" else 1.0,
        check_every=max(1, arguments.steps // 4),
        precision=arguments.precision,
        seed=arguments.seed,
    )
    return segment.SegmentConfig(
        finetune=finetune, crop=(arguments.crop,) * 3, protocol=Protocol(fraction=fraction, seed=arguments.seed)
    )


def run(name: str, fold: int, fraction: float, store: PreparedStore, arguments: argparse.Namespace) -> dict | None:
    """One training and its test; None when a signal stopped it."""
    encoder, source = start(name, arguments.weights, arguments.seed)
    folder = arguments.work / f"{name}-{fraction:g}-steps{arguments.steps}-seed{arguments.seed}"
    began, seen = time.monotonic(), []

    def progress(done: int, total: int, note: str) -> None:
        seen.append(time.monotonic())
        if done % 20 == 0 or done == total:
            print(f"{name} {fraction:g} fold {fold}: {done}/{total} {note}, {seen[-1] - began:.0f} s", flush=True)

    config = settings(name, fraction, arguments)
    found = segment.train(
        encoder,
        store,
        folder,
        config,
        source=source,
        only=[fold],
        weights=arguments.weights if name == "pretrained" else None,
        device=arguments.device,
        progress=progress,
    )
    if found is None:
        return None
    result = json.loads((folder / f"fold-{fold}" / "result.json").read_text())
    steps = [row["seconds"] for row in map(json.loads, (folder / f"fold-{fold}" / "metrics.jsonl").open())]
    return {
        "start": name,
        "fold": fold,
        "fraction": fraction,
        "steps": arguments.steps,
        "seed": arguments.seed,
        "crop": arguments.crop,
        "source": source,
        "patients_learnt_from": len(result["identity"]["train"]),
        "best_step": result["best_step"],
        "held_out_dice": result["held_out_dice"],
        "seconds": result["seconds"],
        "seconds_per_step": round(float(np.median(steps)), 2),
        "device": arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "threads": torch.get_num_threads(),
        "precision": arguments.precision,
        "grid": found["grid"],
        "pretraining_overlap": found["pretraining_overlap"],
        "scores": {row["case_id"]: row["scores"] for row in result["rows"]},
    }


def table(steps: int, seed: int) -> str:
    """Mean Dice of each start, its interval, and what the pretrained start gains, over the same patients."""
    read = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("segment-sts-*.json"))]
    read = [each for each in read if (each["steps"], each["seed"]) == (steps, seed)]
    lines = [
        "| training patients | start | patients tested | Dice (95 %) | HD95 mm | pretrained gains (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for fraction in (1.0, 0.5, 0.25):
        found = {name: {} for name in STARTS}
        for each in read:
            if each["fraction"] == fraction:
                found[each["start"]] |= each["scores"]
        for name in STARTS:
            cases = sorted(found[name])
            if not cases:
                continue
            dice, distance = (np.array([found[name][case][word] for case in cases]) for word in ("dice", "hd95_mm"))
            mean = statistics.estimate(lambda w, v=dice: statistics.mean(v, w), np.array(cases), seed=0)
            gain = "-"
            if name != "pretrained" and set(cases) == set(found["pretrained"]):
                more = np.array([found["pretrained"][case]["dice"] for case in cases]) - dice
                gain = str(statistics.estimate(lambda w, v=more: statistics.mean(v, w), np.array(cases), seed=0))
            lines.append(f"| {fraction:.0%} | {name} | {len(cases)} | {mean} | {distance.mean():.1f} | {gain} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing of this part, then print the table of what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--crop", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--only", help="such as pretrained-0.25-0")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    part, parts = map(int, arguments.part.split("/"))
    store, loaded = sarcomas(arguments.data, arguments.work), load_encoder(arguments.weights)
    digest = files.sha256_file(loaded.report.source) if loaded.report else None
    planned = [(name, fold, fraction) for fold, fraction in PLAN for name in STARTS]
    for name, fold, fraction in planned[part::parts]:
        key = f"{name}-{fraction:g}-{fold}"
        path = RESULTS / f"segment-sts-{key}-seed{arguments.seed}.json"
        if arguments.only and not re.fullmatch(arguments.only, key):
            continue
        about = {"steps": arguments.steps, "weights": digest if name == "pretrained" else None}
        if path.exists() and about.items() <= json.loads(path.read_text()).items():
            continue
        found = run(name, fold, fraction, store, arguments)
        if found is None:
            print("stopped; run the same command to continue")
            return
        files.write_json(path, found | about)
    print(table(arguments.steps, arguments.seed))


if __name__ == "__main__":
    main()
