"""Does it learn? One run of `dagman-tiny` (or another recipe) on phantoms, probed on its way; one JSON per run.

    python benchmarks/learning_curve.py --work WORK --name base --seed 0 --steps 5000 [--optimisation.batch-size 8 ...]

Trains on `--volumes` phantoms at 2 mm (or on the prepared store given by `--store`), stops at the steps of `--at`,
probes the teacher on other phantoms, and goes on exactly where it stopped. Started again, it continues. Three probes by
patient, each beside the untrained encoder and raw voxels: malignancy of a nodule (crop on the nodule), left or right
kidney, liver or spleen (crop on the organ). The result lies in `benchmarks/results/learning/NAME-seedSEED.json`.
"""

import argparse
import json
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed

from dagman import config, files, recipes
from dagman.ct import crops, phantom
from dagman.ct.store import FORMAT, MANIFEST, SETTINGS, PreparedStore, array_path, padded_crop, write_array
from dagman.nets.swin import SwinEncoder
from dagman.nets.weights import load_encoder
from dagman.randomness import torch_seed
from dagman.run import Run, describe_environment
from dagman.tasks import classify
from dagman.tasks.embed import encode
from dagman.tasks.table import Table
from dagman.train.pretrain import pretrain
from dagman.types import Preparation

SPACING_MM, SHAPE = (2.0, 2.0, 2.0), (176, 150, 138)
PROBE_SEED, PROBE_CASES = 1, 128
PROBES = {
    "malignancy": ("benign", "malignant"),
    "kidney": ("kidney_left", "kidney_right"),
    "liver-spleen": ("liver", "spleen"),
}
METRICS = [
    *("total", "amip", "ampd", "aitd", "gitd", "image_error_ratio", "seconds"),
    *("pooled_spread", "cls_spread", "tokens_spread", "pooled_effective_rank", "tokens_effective_rank"),
    *(f"{loss}_{who}_entropy" for loss in ("aitd", "ampd", "gitd") for who in ("teacher", "student")),
    *("attention_entropy", "attention_peak", "attention_dropped_ratio", "hidden_dropped_ratio"),
]


def write_store(folder: Path, num_volumes: int) -> PreparedStore:
    """A prepared store of phantoms, which need no resampling."""
    if not (folder / MANIFEST).exists():
        rows = Parallel(n_jobs=-1)(delayed(_write_volume)(folder, case) for case in range(num_volumes))
        files.write_json(
            folder / SETTINGS,
            {"format": FORMAT, "storage": "npy", "spacing_mm": SPACING_MM[0], "resampling": "antialiased"},
        )
        files.write_text(folder / MANIFEST, "".join(map(files.json_line, rows)))
    return PreparedStore(folder)


def _write_volume(folder: Path, case: int) -> dict[str, Any]:
    made = phantom.make(0, case, spacing_mm=SPACING_MM, shape=SHAPE)
    name = f"phantom_{case:04d}"
    path = array_path(folder, "volumes", name, "npy")
    write_array(path, made.volume.hu)
    return {
        "case_id": name,
        "patient": str(made.patient),
        "shape": list(made.volume.hu.shape),
        "affine": made.volume.affine.tolist(),
        "bytes": path.stat().st_size,
        "sha256": files.sha256_file(path),
        "mask": None,
    }


def write_probe_crops(path: Path, side: int) -> dict[str, np.ndarray]:
    """Labelled crops of other phantoms: int16 HU, class word and patient of each."""
    if not path.exists():
        cases = Parallel(n_jobs=-1)(delayed(_probe_crops)(case, side) for case in range(PROBE_CASES))
        hu, words, patients = zip(*(crop for case in cases for crop in case), strict=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, hu=np.stack(hu), words=np.array(words), patients=np.array(patients))
    return dict(np.load(path))


def _probe_crops(case: int, side: int) -> list[tuple[np.ndarray, str, int]]:
    made = phantom.make(PROBE_SEED, case, spacing_mm=SPACING_MM, shape=SHAPE)
    numbers = {name: number for number, name in made.names.items()}
    masks = {"malignant" if made.nodules[0].malignant else "benign": made.nodule_mask == 1}
    masks |= {word: made.organs == numbers[word] for word in ("kidney_left", "kidney_right", "liver", "spleen")}
    found = []
    for word, mask in masks.items():
        if mask.any():
            centre = np.argwhere(mask).mean(axis=0).round().astype(int)
            hu = padded_crop(made.volume.hu, [int(c) - side // 2 for c in centre], (side,) * 3, -1024)
            found.append((hu, word, made.patient))
    return found


def score(features: np.ndarray, words: np.ndarray, patients: np.ndarray) -> dict[str, Any]:
    """AUC with interval of each probe."""
    scores = {}
    for name, (negative, positive) in PROBES.items():
        chosen = np.isin(words, (negative, positive))
        table = Table(
            case_ids=tuple(f"{index:04d}" for index in np.flatnonzero(chosen)),
            patients=tuple(map(str, patients[chosen])),
            labels=tuple(map(str, words[chosen])),
            features=features[chosen],
        )
        scores[name] = vars(classify.probe(table, positive=positive).auc())
    return scores


def encode_all(encoder: SwinEncoder, hu: np.ndarray, preparation: Preparation, device: str) -> np.ndarray:
    """Pooled features of every crop."""
    images = torch.from_numpy(crops.window(hu, preparation.window_hu))[:, None]
    parts = [
        encode(encoder, images[start : start + 16], device=device, precision="float32").pooled.float().cpu().numpy()
        for start in range(0, len(images), 16)
    ]
    return np.concatenate(parts)


class StopAt:
    """Asks the run to stop cleanly after a step, so that it can be probed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_start(self, step: int, total_steps: int) -> None:
        """Nothing to do."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Stop one step ahead: the request is honoured at the end of the next step."""
        if row["step"] == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_message(self, text: str) -> None:
        """Show the log."""
        print(text, flush=True)


def curve(run: Run) -> list[dict[str, float]]:
    """Metrics thinned to about 60 points, each the mean of the steps since the last."""
    rows = run.metrics()
    edges = np.unique(np.geomspace(1, len(rows), 60).astype(int))
    points = []
    for start, end in zip([0, *edges[:-1]], edges, strict=True):
        part = rows[start:end]
        means = {name: float(np.mean([row[name] for row in part])) for name in METRICS if part[0].get(name) is not None}
        points.append({"step": part[-1]["step"], **{name: round(value, 6) for name, value in means.items()}})
    return points


def main() -> None:
    """Train, probe, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--recipe", default="dagman-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--at", type=int, nargs="*", default=[100, 300, 1000, 3000])
    parser.add_argument("--volumes", type=int, default=400)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "learning")
    arguments, rest = parser.parse_known_args()
    settings = dict(zip([flag.removeprefix("--") for flag in rest[::2]], rest[1::2], strict=True))
    chosen = recipes.with_length(recipes.get(arguments.recipe), arguments.steps, None)
    chosen = config.override(chosen, {"data.window_hu": "-1000,400", **settings, "optimisation.seed": arguments.seed})
    store = (
        PreparedStore(arguments.store)
        if arguments.store
        else write_store(arguments.work / f"phantoms_{arguments.volumes}", arguments.volumes)
    )
    side = min(chosen.data.crop)
    labelled = write_probe_crops(arguments.work / f"probe_{side}.npz", side)
    words, patients = labelled["words"], labelled["patients"]
    preparation = Preparation(window_hu=chosen.data.window_hu, crop=chosen.data.crop)
    torch.manual_seed(torch_seed(arguments.seed, "untrained"))
    untrained = encode_all(SwinEncoder(chosen.encoder).eval(), labelled["hu"], preparation, arguments.device)
    raw = torch.from_numpy(crops.window(labelled["hu"], preparation.window_hu))[:, None]
    voxels = torch.nn.functional.adaptive_avg_pool3d(raw, 8).flatten(1).numpy()
    result: dict[str, Any] = {
        "name": arguments.name,
        "seed": arguments.seed,
        "settings": settings,
        "config": config.to_dict(chosen),
        "volumes": len(store),
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_environment()["versions"],
        "probe_cases": {name: int(np.isin(words, pair).sum()) for name, pair in PROBES.items()},
        "untrained": score(untrained, words, patients),
        "raw voxels": score(voxels, words, patients),
        "probes": [],
    }
    run = Run(arguments.work / "runs" / f"{arguments.name}-seed{arguments.seed}")
    path = arguments.results / f"{arguments.name}-seed{arguments.seed}.json"
    for step in [*(step for step in sorted(arguments.at) if step < arguments.steps), arguments.steps]:
        pretrain(
            chosen,
            store,
            run.folder,
            device=arguments.device,
            workers=arguments.workers,
            checkpoint_every=100_000,
            listeners=[StopAt(step)],
        )
        encoder = load_encoder(run.folder)
        found = score(encode_all(encoder, labelled["hu"], preparation, arguments.device), words, patients)
        result["probes"].append({"step": step, **found})
        result["curve"] = curve(run)
        files.write_json(path, result)
        print(
            json.dumps({"step": step, **{name: round(value["value"], 3) for name, value in found.items()}}), flush=True
        )


if __name__ == "__main__":
    main()
