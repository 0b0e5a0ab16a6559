"""What a sample costs as everything around it grows: crop, batch, volumes, loader processes, ranks.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

Steps are those of `dagman-tiny` by `dagman pretrain` in a process of its own, the median of the last ones. A point that
the JSON holds is not measured again, so that a stopped run goes on. What grows no faster than the work is level here:
per voxel for the crop, per pair of views for batch, processes and ranks, per crop for the number of volumes.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from input import write_store
from store import machine

WARM_UP = 3
CROPS, BATCHES, WORKERS, RANKS = (32, 64, 96), (1, 2, 4, 8, 16), (0, 1, 2), (1, 2)
VOLUMES = (10, 100, 1000, 10_000)


def step(folder: Path, store: Path, steps: int, *flags: object) -> dict[str, float]:
    """Seconds a step, and pairs of views a second, of a short run."""
    folder = folder / str(len(list(folder.iterdir())))
    length = ["--steps", str(steps), "--checkpoint-every", "1000", "--device", "cpu"]
    command = [sys.executable, "-m", "dagman", "pretrain", "dagman-tiny", "--data", str(store), "-o", str(folder)]
    subprocess.run([*command, *length, *map(str, flags)], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    seconds = statistics.median(row["seconds"] for row in rows)
    waited = statistics.median(row["data_wait_seconds"] for row in rows)
    views = statistics.median(row["images_per_second"] * row["seconds"] for row in rows)
    return {
        "seconds_a_step": round(seconds, 4),
        "seconds_a_pair": round(2 * seconds / views, 5),
        "waited": round(waited, 5),
    }


def stores(folder: Path, volumes: int) -> dict[str, float]:
    """Opening a store of so many rows, and a crop of it; the volumes are links to ten."""
    from dagman.ct.datasets import DataConfig, ViewsDataset
    from dagman.ct.store import MANIFEST, PreparedStore, array_path

    write_store(folder, 96, 10)
    rows = [json.loads(line) for line in (folder / MANIFEST).read_text().splitlines()]
    for number in range(10, volumes):
        row = rows[number % 10] | {"case_id": f"case{number}"}
        os.link(
            array_path(folder, "volumes", f"case{number % 10}", "blosc2"),
            array_path(folder, "volumes", row["case_id"], "blosc2"),
        )
        rows.append(row)
    (folder / MANIFEST).write_text("".join(json.dumps(row) + "\n" for row in rows))
    started = time.perf_counter()
    store = PreparedStore(folder)
    opened = time.perf_counter()
    dataset = ViewsDataset(store, DataConfig(crop=(32, 32, 32)), 0)
    dataset[0]
    planned = time.perf_counter()
    took = []
    for sample in np.random.default_rng(0).integers(len(dataset), size=100):
        before = time.perf_counter()
        dataset[int(sample)]
        took.append(time.perf_counter() - before)
    return {
        "open_ms": round(1000 * (opened - started), 2),
        "first_pair_ms": round(1000 * (planned - opened), 2),
        "pair_ms": round(1000 * statistics.median(took), 3),
    }


def points(folder: Path, steps: int) -> dict[tuple[str, int], Any]:
    """How each point is measured."""
    store = folder / "store"
    runs = folder / "runs"
    runs.mkdir()
    write_store(store, 160, 4)
    run, batch_of = functools.partial(step, runs, store, steps), "--optimisation.batch_size"
    found: dict[tuple[str, int], Any] = {}
    for side in CROPS:
        found["crop", side] = functools.partial(run, "--data.crop", f"{side},{side},{side}", batch_of, 2)
    for batch in BATCHES:
        found["batch", batch] = functools.partial(run, batch_of, batch)
    for workers in WORKERS:
        found["workers", workers] = functools.partial(run, "--workers", workers)
    for ranks in RANKS:
        found["ranks", ranks] = functools.partial(run, "--devices", ranks, batch_of, 8)
    for volumes in VOLUMES:
        found["volumes", volumes] = functools.partial(stores, folder / f"volumes-{volumes}", volumes)
    return found


def main() -> None:
    """Measure what is missing, print it, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures; what it holds is not measured again")
    parser.add_argument("--only", nargs="*", help="quantities to measure, such as crop batch")
    parser.add_argument("--steps", type=int, default=8, help=f"of each run; the first {WARM_UP} are not counted")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "points": []}
    if arguments.json and arguments.json.exists():
        result["points"] = json.loads(arguments.json.read_text())["points"]
    done = {(point["quantity"], point["value"]) for point in result["points"]}
    with tempfile.TemporaryDirectory() as folder:
        for (quantity, value), measure in points(Path(folder), arguments.steps).items():
            if (quantity, value) in done or (arguments.only and quantity not in arguments.only):
                continue
            result["points"].append({"quantity": quantity, "value": value, **measure()})
            print(result["points"][-1], flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
