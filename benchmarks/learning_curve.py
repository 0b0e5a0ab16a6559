"""Does it learn? One run, probed on its way: what the features know, what the losses say, where attention goes.

    python benchmarks/learning_curve.py --work WORK --name tiny --data DATA [--corpus real] [--seed 0] [SETTINGS]

Trains a recipe on phantoms or on the real CTs of the folder DATA (laid out as `learning_cases.LAYOUT` says), stops at
the steps of `--at`, asks the teacher the questions of `learning_cases.py`, about real CTs only with `--data`, and goes
on exactly where it stopped; run again, it continues. The encoder of each such step is kept in `WORK/encoders`.
SETTINGS are pairs such as `--method.guide noisy`. Every answer stands beside those of the same encoder untrained, of
raw voxels and of a histogram of intensities. The result is
`WORK/results/CORPUS-NAME-seedSEED.json`, or lies in the folder of `--results`: that of the repository
(`benchmarks/results/learning`) is what `make docs` writes its tables from.

For scans of your own there is no need of this: `dagman pretrain --labelled STORE` probes a run on its way.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import learning_alterations as alterations
import learning_cases as cases
import learning_probes as probes
from dagman import config, files, recipes
from dagman.ct import crops, phantom_canvas
from dagman.ct.store import PreparedStore, padded_crop
from dagman.nets.encoder import Encoder
from dagman.nets.weights import load_encoder
from dagman.pretext import diagnostics, examination
from dagman.pretext.codistill import CoDistillation
from dagman.randomness import generator, torch_seed
from dagman.run import Run, describe_environment
from dagman.tasks import diversity
from dagman.tasks.embed import encode
from dagman.train.pretrain import pretrain
from dagman.train.settings import PretrainConfig
from dagman.types import Preparation

METRICS = [
    *("total", "amip", "ampd", "aitd", "gitd", "seconds", "learning_rate", "weight_decay", "momentum", "grad_norm"),
    *diagnostics.MEANINGS,
    *examination.MEANINGS,
]
POINTS = 60
PHANTOM_STRUCTURES = {name: [label] for label, name in phantom_canvas.NAMES.items()} | {
    "organs": [4, 5, 6, 7, 8, 9, 10],
    "body": list(range(1, 15)),
}
BINS = 16
LOOKS, LOOK_VOLUMES = 2, 20
"""Crops of a volume, and volumes, on which attention is held against each structure."""
UNTRAINED = 6
"""Untrained networks that a run stands beside, of seeds 0 to 5; each run sets out from that of its own seed."""


def features(encoder: Encoder, hu: np.ndarray, device: str) -> dict[str, np.ndarray]:
    """Pooled, mean cell and [CLS] features of every crop, and all of them side by side."""
    images = torch.from_numpy(crops.window(hu, encoder.preparation.window_hu))[:, None]
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images), 32):
        seen = encode(encoder, images[start : start + 32], device=device, precision="float32")
        parts = {"pooled": seen.pooled, "cells": seen.tokens.mean(dim=1)}
        if seen.cls is not None:
            parts["cls"] = seen.cls
        for name, part in (parts | {"all": torch.cat(list(parts.values()), dim=1)}).items():
            found.setdefault(name, []).append(part.float().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def voxels(hu: np.ndarray, window_hu: tuple[float, float]) -> dict[str, np.ndarray]:
    """A baseline that knows no network: 8^3 means."""
    images = torch.from_numpy(crops.window(hu, window_hu))[:, None]
    return {probes.TOGETHER: torch.nn.functional.adaptive_avg_pool3d(images, 8).flatten(1).numpy()}


def histogram(hu: np.ndarray, window_hu: tuple[float, float]) -> dict[str, np.ndarray]:
    """A baseline that knows no place either: share of the voxels in 16 bins of the window."""
    shown = crops.window(hu, window_hu).reshape(len(hu), -1)
    bins = np.minimum((shown * BINS).astype(int), BINS - 1)
    return {probes.TOGETHER: np.stack([(bins == number).mean(axis=1) for number in range(BINS)], axis=1)}


def shells(hu: np.ndarray, window_hu: tuple[float, float]) -> dict[str, np.ndarray]:
    """A baseline made by hand for what lies in the middle: intensity, deviation and slope by distance from there."""
    shown = crops.window(hu, window_hu)
    side = shown.shape[1]
    away = np.linalg.norm(np.indices((side,) * 3) - (side - 1) / 2, axis=0).astype(int).ravel()
    within = (away[:, None] == np.arange(side // 2)).astype(np.float32)
    within /= within.sum(axis=0)
    found = []
    for crop in shown.astype(np.float32):
        slope = np.sqrt(sum(step**2 for step in np.gradient(crop)))
        mean, square = crop.ravel() @ within, crop.ravel() ** 2 @ within
        found.append(np.concatenate([mean, np.sqrt(np.clip(square - mean**2, 0, None)), slope.ravel() @ within]))
    return {probes.TOGETHER: np.stack(found)}


Asked = dict[tuple[str, str, int | None], probes.Scores]
"""(question, features, labels) -> scores."""


def ask(seen: Mapping[str, dict[str, np.ndarray]], questions: Mapping[str, cases.Crops]) -> Asked:
    """All probes: all features together with 8, 32 and all labels, each by itself with 32."""
    return {
        (question, kind, labels): probes.probe(vectors, questions[question].words, questions[question].patients, labels)
        for question, kinds in seen.items()
        for kind, vectors in kinds.items()
        for labels in (probes.LABELS if kind == probes.TOGETHER else (32,))
    }


def attention_on_truth(encoder: Encoder, store: PreparedStore, device: str) -> dict[str, dict[str, float]]:
    """Share of attention over share of volume of each structure, with an interval over volumes.

    `elsewhere` is that of each map held against the truth of another crop: what comes of where structures lie in a
    crop, and not of what is seen.
    """
    if not encoder.config.has_cls:
        return {}
    side, cell = encoder.preparation.crop[0], encoder.config.cell_side
    n = side // cell
    sums: dict[str, list[np.ndarray]] = {}
    for row in range(len(store)):
        draws = generator(0, "learning.look", row)
        enough = {name for name, parts in sums.items() if len(parts) == LOOK_VOLUMES}
        for name, inside in structures(store, row, enough).items():
            if name in enough or not inside.any():
                continue
            places = np.argwhere(inside)
            middles = places[draws.integers(len(places), size=LOOKS)] + draws.integers(
                -side // 4, side // 4, (LOOKS, 3)
            )
            corners = [tuple(int(m) - side // 2 for m in middle) for middle in middles]
            hu = np.stack([store.hu(row, corner, (side,) * 3) for corner in corners])
            truth = np.stack([padded_crop(inside, corner, (side,) * 3, 0) for corner in corners])
            images = torch.from_numpy(crops.window(hu, encoder.preparation.window_hu))[:, None]
            seen = encode(encoder, images, device=device, precision="float32").attention
            assert seen is not None
            share = truth.reshape(-1, n, cell, n, cell, n, cell).mean(axis=(2, 4, 6)).reshape(LOOKS, -1)
            maps = seen.cpu().numpy()
            met = [(maps * share).sum(), share.mean(axis=1).sum(), (np.roll(maps, 1, axis=0) * share).sum()]
            sums.setdefault(name, []).append(np.array(met))
    found = {}
    for name, parts in sums.items():
        values = np.stack(parts)
        total = values.sum(axis=0)
        found[name] = {"gain": total[0] / total[1], "elsewhere": total[2] / total[1], "volumes": len(values)}
        if len(values) > 1:
            again = generator(0, "learning.look.bootstrap").integers(len(values), size=(2000, len(values)))
            ratios = values[again].sum(axis=1)
            low, high = np.quantile(ratios[:, 0] / ratios[:, 1], [0.025, 0.975])
            found[name] |= {"low": low, "high": high}
    return {name: {key: round(float(value), 4) for key, value in one.items()} for name, one in found.items()}


def structures(store: PreparedStore, row: int, enough: set[str]) -> dict[str, np.ndarray]:
    """Name to voxels of what attention is held against in one volume; the body of real CTs is what is no air."""
    case = str(store.rows[row]["case_id"])
    if "phantom" in case:
        wanted = PHANTOM_STRUCTURES.keys() - enough
        mask = store.mask(row) if wanted else None
        return {name: np.isin(mask, PHANTOM_STRUCTURES[name]) for name in PHANTOM_STRUCTURES if name in wanted}
    found = {} if "body" in enough else {"body": store.hu(row) > cases.BODY_HU}
    if (mask := store.mask(row)) is not None:
        found["nodule of one CT" if case == cases.NODULE else "tumour"] = mask > 0
    return found


def look_at_heads(encoder: Encoder, hu: np.ndarray) -> list[dict[str, Any]]:
    """Diversity of the attention heads on a few crops."""
    images = torch.from_numpy(crops.window(hu, encoder.preparation.window_hu))[:, None]
    return [
        {
            "place": one.place,
            "distance_mm": [round(float(value), 3) for value in one.distance_mm],
            "distance_entropy": round(one.distance_entropy, 5),
            "row_entropy": round(one.row_entropy, 5),
        }
        for one in diversity.heads(encoder, images)
    ]


class StopAt:
    """Asks the run to stop cleanly after a step, so that it can be probed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_start(self, step: int, _: int) -> None:
        """A run that goes on one step ahead has no earlier row to stop at."""
        self.on_step({"step": step})

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Stop one step ahead: the request is honoured at the end of the next step."""
        if row["step"] >= self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_message(self, text: str) -> None:
        """Show the log."""
        print(text, flush=True)


def curve(run: Run) -> list[dict[str, float]]:
    """Metrics thinned to some points, each the mean of the steps since the last."""
    rows = run.metrics()
    edges = np.unique(np.geomspace(1, len(rows), POINTS).astype(int))
    points = []
    for start, end in zip([0, *edges[:-1]], edges, strict=True):
        part = rows[start:end]
        values = {name: [row[name] for row in part if row.get(name) is not None] for name in METRICS}
        means = {name: round(float(np.mean(some)), 6) for name, some in values.items() if some}
        points.append({"step": part[-1]["step"], **means})
    return points


def parse() -> tuple[argparse.Namespace, dict[str, str]]:
    """The command line, and the settings that it replaces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for stores, crops and runs")
    parser.add_argument("--name", required=True, help="what the settings are called in the tables")
    parser.add_argument("--data", type=Path, help="folder of real CTs, to ask about and to train on")
    parser.add_argument("--corpus", choices=["phantoms", "real"], default="phantoms", help="what is trained on")
    parser.add_argument("--recipe", default="dagman-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--at", type=int, nargs="*", default=[100, 300, 600])
    parser.add_argument("--volumes", type=int, default=160, help="phantoms to train on")
    parser.add_argument("--asked", type=int, default=160, help="phantoms to ask about")
    parser.add_argument("--alter", choices=list(alterations.ALTERATIONS), help="a change that is no setting")
    parser.add_argument("--no-questions", action="store_true", help="train and watch, but probe nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="processor threads; 0 for all")
    parser.add_argument("--results", type=Path, help="folder of the result; WORK/results without it")
    arguments, rest = parser.parse_known_args()
    if len(rest) % 2 or not all(flag.startswith("--") and "." in flag for flag in rest[::2]):
        parser.error(f"cannot read {' '.join(rest)}; settings are pairs such as --method.guide noisy")
    if arguments.corpus == "real" and not arguments.data:
        parser.error("--corpus real wants the folder of real CTs: --data FOLDER")
    if arguments.data and (lacking := cases.missing(arguments.data)):
        parser.error(f"{arguments.data} lacks {', '.join(lacking)}")
    arguments.results = arguments.results or arguments.work / "results"
    return arguments, dict(zip([flag.removeprefix("--") for flag in rest[::2]], rest[1::2], strict=True))


def gather(arguments: argparse.Namespace, side: int) -> tuple[PreparedStore, dict[str, cases.Crops]]:
    """What is trained on, and the questions with crops of `side`."""
    work, questions = arguments.work, {}
    if not arguments.no_questions:
        questions = cases.phantom_crops(work / f"phantom_crops_{arguments.asked}.npz", arguments.asked)
        if arguments.data:
            questions |= cases.real_crops(arguments.data, work)
    if arguments.corpus == "real":
        store = cases.real_store(arguments.data, work)
    else:
        store = cases.phantom_store(work / f"phantoms_{arguments.volumes}", arguments.volumes)
    return store, {name: asked._replace(hu=asked.middle(side)) for name, asked in questions.items()}


def about(arguments: argparse.Namespace, settings: Mapping[str, str], chosen: PretrainConfig) -> dict[str, Any]:
    """What was run."""
    return {
        "name": arguments.name,
        "corpus": arguments.corpus,
        "seed": arguments.seed,
        "settings": settings,
        "altered": arguments.alter,
        "config": config.to_dict(chosen),
        "steps": arguments.steps,
    }


def trained(
    chosen: PretrainConfig, store: PreparedStore, arguments: argparse.Namespace, name: str
) -> Iterator[tuple[int, Encoder]]:
    """The encoder at each step that is asked for, kept in `WORK/encoders`; fewer where someone stops the run."""
    run, kept = Run(arguments.work / "runs" / name), arguments.work / "encoders" / name
    for step in [*(step for step in sorted(arguments.at) if step < arguments.steps), arguments.steps]:
        folder = kept / str(step)
        if not folder.exists():
            pretrain(
                chosen,
                store,
                run.folder,
                device=arguments.device,
                checkpoint_every=100_000,
                listeners=[StopAt(step)],
            )
            done = run.metrics()[-1]["step"]
            if done > step:
                raise SystemExit(f"{run.folder} is past step {step}; ask for later steps, or give another --work")
            if done < step:
                return  # someone else asked it to stop
            copied = folder.with_name(f"{step}.new")
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(run.weights, copied / "weights")
            copied.rename(folder)
        yield step, load_encoder(folder)


def untrained(chosen: PretrainConfig, seed: int) -> Encoder:
    """The encoder that a run of this seed sets out from."""
    torch.manual_seed(torch_seed(seed, "weights"))
    module = CoDistillation(chosen.encoder, chosen.method, mean_intensity=0.5, crop=chosen.data.crop)
    encoder = module.teacher.encoder.eval()
    encoder.preparation = Preparation(window_hu=chosen.data.window_hu, crop=chosen.data.crop)
    return encoder


Questions = Mapping[str, cases.Crops]


def see(encoder: Encoder, questions: Questions, device: str) -> dict[str, dict[str, np.ndarray]]:
    """Features of the crops of all questions."""
    return {question: features(encoder, asked.hu, device) for question, asked in questions.items()}


def networks_of(chosen: PretrainConfig, questions: Questions, arguments: argparse.Namespace) -> list[Asked]:
    """What the untrained networks answer; their features are kept in `WORK/untrained`, as all seeds share them."""
    shown = [arguments.alter, *(config.to_dict(chosen)[part] for part in ("encoder", "data"))]
    key = hashlib.sha256(json.dumps(shown, sort_keys=True).encode())
    for asked in questions.values():
        key.update(np.ascontiguousarray(asked.hu))
    answers = []
    for seed in range(UNTRAINED):
        path = arguments.work / "untrained" / f"{key.hexdigest()[:16]}-{seed}.npz"
        if not path.exists():
            seen = see(untrained(chosen, seed), questions, arguments.device)
            flat = {
                f"{question} {kind}": vectors for question, kinds in seen.items() for kind, vectors in kinds.items()
            }
            stream = io.BytesIO()
            np.savez(stream, **flat)  # type: ignore[arg-type]
            files.write_bytes(path, stream.getvalue())
        with np.load(path) as stored:
            kinds: dict[str, dict[str, np.ndarray]] = {}
            for named, vectors in stored.items():
                question, kind = named.split(" ")
                kinds.setdefault(question, {})[kind] = vectors
        answers.append(ask(kinds, questions))
    return answers


def baselines_of(questions: Questions, window_hu: tuple[float, float]) -> dict[str, Asked]:
    """What needs no network: voxels, intensities, shells; and intensities told shuffled labels, which shows chance."""
    draws = generator(0, "learning.shuffled")
    shuffled = {name: asked._replace(words=draws.permutation(asked.words)) for name, asked in questions.items()}
    ways = {"voxels": voxels, "histogram": histogram, "shells": shells}
    return {
        name: ask({question: way(asked.hu, window_hu) for question, asked in questions.items()}, questions)
        for name, way in ways.items()
    } | {"shuffled labels": ask({name: histogram(asked.hu, window_hu) for name, asked in questions.items()}, shuffled)}


def table(asked: Asked, networks: list[Asked], baselines: Mapping[str, Asked]) -> list[dict[str, Any]]:
    """One row a probe: its AUC, how much it lies above a random untrained network, and above each baseline."""
    rows = []
    for key, scores in asked.items():
        row = dict(zip(("question", "features", "labels"), key, strict=True)) | {"auc": probes.estimate(scores)}
        row["above untrained"] = probes.above(scores, [one[key] for one in networks])
        for name, others in baselines.items():
            row[f"above {name}"] = probes.estimate(scores, others[key]) if key in others else None
        rows.append(row)
    return rows


def main() -> None:
    """Train, and keep the encoders; ask them; write."""
    arguments, settings = parse()
    if arguments.alter:
        alterations.ALTERATIONS[arguments.alter]()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        threadpool_limits(arguments.threads)
    chosen = recipes.with_length(recipes.get(arguments.recipe), arguments.steps, None)
    chosen = config.override(chosen, {**settings, "optimisation.seed": arguments.seed})
    store, questions = gather(arguments, chosen.data.crop[0])
    name, result = f"{arguments.corpus}-{arguments.name}-seed{arguments.seed}", about(arguments, settings, chosen)
    path = arguments.results / f"{name}.json"
    if path.exists() and any(json.loads(path.read_text())[key] != value for key, value in result.items()):
        raise SystemExit(f"{path} is of other settings; give another --name or --results")
    few = np.stack([store.hu(row, (40, 40, 40), chosen.data.crop) for row in range(8)])
    probed: list[tuple[Asked, dict[str, Any]]] = []
    for step, encoder in [(0, untrained(chosen, arguments.seed)), *trained(chosen, store, arguments, name)]:
        answers = ask(see(encoder, questions, arguments.device), questions)
        attention = attention_on_truth(encoder, store, arguments.device)
        probed.append((answers, {"step": step, "attention": attention, "heads": look_at_heads(encoder, few)}))
    if probed[-1][1]["step"] != arguments.steps:
        return  # someone asked the run to stop; the same command goes on
    networks = networks_of(chosen, questions, arguments) if questions else []
    baselines = baselines_of(questions, chosen.data.window_hu)
    result |= {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_environment()["versions"],
        "volumes": len(store),
        "crops": {question: len(asked.words) for question, asked in questions.items()},
        "patients": {question: len(set(asked.patients)) for question, asked in questions.items()},
        "untrained": [table(one, [other for other in networks if other is not one], {}) for one in networks],
        "baselines": {kind: table(asked, networks, {}) for kind, asked in baselines.items()},
        "probes": [looks | {"rows": table(answers, networks, baselines)} for answers, looks in probed],
        "curve": curve(Run(arguments.work / "runs" / name)),
    }
    files.write_json(path, result)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
