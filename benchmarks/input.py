"""Does the input wait? Crops a second from a prepared store, preparing a scan beside MONAI, waiting in a short run.

    python benchmarks/input.py --series FOLDER_OF_DICOM --json benchmarks/results/input.json

Crops: two overlapping views of 128^3 from volumes of 300^3 (tissue with 12 HU of noise, which packs badly), by 0 to 4
loader processes. Preparing: each DICOM series is brought to 2 mm by this package (read in its guarded process,
anti-aliased as by default, and linear) and by MONAI's `LoadImaged`, `Orientationd` and `Spacingd`, in turns, in one
process with the allocator as it comes (so runs `dagman prepare`) and in another that keeps memory. Waiting: the share
of a step in which `dagman-tiny` stood without a batch.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np

from store import machine

SIDE, VOLUMES, PAIRS = 300, 4, 200
PROCESSES = (0, 1, 2, 4)
STORAGES: tuple[Literal["blosc2", "npy"], ...] = ("blosc2", "npy")


def write_store(folder: Path, side: int, volumes: int, storage: Literal["blosc2", "npy"] = "blosc2") -> Any:
    """A store of noise."""
    from dagman import files
    from dagman.ct.store import FORMAT, MANIFEST, SETTINGS, PreparedStore, array_path, write_array

    rows = []
    for case in range(volumes):
        path = array_path(folder, "volumes", f"case{case}", storage)
        write_array(path, np.random.default_rng(case).normal(40, 12, (side,) * 3).astype(np.int16))
        rows.append(
            {
                "case_id": f"case{case}",
                "shape": [side] * 3,
                "affine": np.diag([2.0, 2.0, 2.0, 1.0]).tolist(),
                "bytes": path.stat().st_size,
                "sha256": files.sha256_file(path),
                "mask": None,
            }
        )
    settings = {"format": FORMAT, "storage": storage, "spacing_mm": 2.0, "resampling": "antialiased"}
    files.write_json(folder / SETTINGS, settings)
    files.write_text(folder / MANIFEST, "".join(map(files.json_line, rows)))
    return PreparedStore(folder)


def crops(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Crops a second, as pretraining takes them."""
    from dagman.ct.datasets import DataConfig, SampleOrder, SharedCollate, ViewsDataset
    from dagman.train import engine

    fabric, found = engine.fabric(1, "float32", "cpu"), []
    for storage in STORAGES:
        store = write_store(folder / storage, SIDE, VOLUMES, storage)
        packed = blosc2.open(str(store.path(0)), mode="r").cparams.codec.name.lower() if storage == "blosc2" else None
        dataset = ViewsDataset(store, DataConfig(), 0)
        for processes in PROCESSES:
            warm = 20 * max(1, processes)
            order = SampleOrder(0, pairs + warm, 0, 1)
            together = SharedCollate(engine.AHEAD)
            batches = engine.batches(fabric, dataset, order, together, batch=2, workers=processes)
            for _ in range(warm // 2):
                next(batches)  # the processes are up, and each has compared every file with its checksum
            started = time.perf_counter()
            taken = 2 * sum(len(views.rows) for views in batches)
            rate = round(taken / (time.perf_counter() - started), 1)
            found.append({"storage": storage, "packed": packed, "processes": processes, "crops_a_second": rate})
            print(f"  {storage}, {processes} processes: {rate} crops a second", flush=True)
    return found


def ways(scan: Any) -> dict[str, Callable[[], Any]]:
    """How a series can be brought to 2 mm."""
    from monai import transforms

    from dagman.ct.prepare import PrepareConfig, prepare_volume
    from dagman.ct.read import read

    plainly = transforms.Compose(
        [
            transforms.LoadImaged("image", reader="PydicomReader", ensure_channel_first=True),
            transforms.Orientationd("image", axcodes="RAS", labels=None),
            transforms.Spacingd("image", pixdim=(2.0, 2.0, 2.0), mode="bilinear"),
        ]
    )
    return {
        "monai": lambda: plainly({"image": str(scan.files[0].parent)}),
        "linear": lambda: prepare_volume(read(scan), PrepareConfig(resampling="linear")),
        "antialiased": lambda: prepare_volume(read(scan), PrepareConfig()),
    }


def prepared(series: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds a scan with either allocator, each in a process of its own."""
    from dagman.cli import KEEP_MEMORY

    untouched = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    found = []
    for allocator, variables in (("default", untouched), ("tuned", untouched | KEEP_MEMORY)):
        with tempfile.NamedTemporaryFile(suffix=".json") as answer:
            command = [__file__, "--series", str(series), "--rounds", str(rounds), "--prepare-into", answer.name]
            subprocess.run([sys.executable, *command], env=variables, check=True)
            found += [{"allocator": allocator, **row} for row in json.loads(Path(answer.name).read_text())]
    return found


def preparing(series: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds a scan, in turns."""
    from dagman.ct.index import index
    from dagman.ct.read import read
    from dagman.errors import DagmanError

    found = []
    for scan in index([series])[0]:
        try:
            read(scan)
        except DagmanError as error:
            print(f"  left out: {error}")
            continue
        took: dict[str, list[float]] = {}
        chosen = ways(scan)
        for turn in range(rounds + 1):
            for name, way in chosen.items():
                started = time.perf_counter()
                way()
                if turn:  # the first only warms up
                    took.setdefault(name, []).append(time.perf_counter() - started)
        row = {name: round(statistics.median(seconds), 3) for name, seconds in took.items()}
        found.append({"scan": scan.files[0].parent.name, "slices": len(scan.files), **row})
        print(f"  {found[-1]}", flush=True)
    return found


def waiting(folder: Path, steps: int) -> dict[str, Any]:
    """Share of a run's time in which it stood without a batch, without and with a loader process."""
    from dagman import recipes
    from dagman.run import Run
    from dagman.train.pretrain import pretrain

    store = write_store(folder / "store", 96, VOLUMES)
    recipe = recipes.with_length(recipes.get("dagman-tiny"), steps, None)
    found = {}
    for workers in (0, 1):
        pretrain(recipe, store, folder / f"run-{workers}", device="cpu", workers=workers)
        rows = Run(folder / f"run-{workers}").metrics()[2:]
        share = sum(row["data_wait_seconds"] for row in rows) / sum(row["seconds"] for row in rows)
        found[f"{workers} processes"] = round(share, 4)
        print(f"  {workers} processes: waits {share:.2%} of its time", flush=True)
    return found


def main() -> None:
    """Measure, print, and write the figures if asked to; memory is kept as `dagman pretrain` keeps it."""
    from dagman.cli import KEEP_MEMORY

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--series", type=Path, help="folder of DICOM series; preparing is left out without")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--prepare-into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.prepare_into:
        arguments.prepare_into.write_text(json.dumps(preparing(arguments.series, arguments.rounds)))
        return
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "volume": SIDE, "crop": 128}
    with tempfile.TemporaryDirectory() as folder:
        print(f"crops of 128^3 from volumes of {SIDE}^3")
        result["crops"] = crops(Path(folder) / "volumes", arguments.pairs)
        if arguments.series:
            print("a scan to 2 mm, seconds")
            result["preparing"] = prepared(arguments.series, arguments.rounds)
        print("dagman-tiny without a batch")
        result["waiting"] = waiting(Path(folder), arguments.steps)
    result["load_after"] = round(os.getloadavg()[0], 1)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
