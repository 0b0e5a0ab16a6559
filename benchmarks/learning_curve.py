"""Does it learn? One run, probed on its way: what the features know, what the losses say, where attention goes.

    python benchmarks/learning_curve.py --work WORK --name tiny --data DATA [--corpus real] [--seed 0] [SETTINGS]

Trains a recipe on phantoms or on the real CTs of the folder DATA (laid out as `learning_cases.LAYOUT` says), stops at
the steps of `--at`, asks the teacher the questions of `learning_cases.py`, about real CTs only with `--data`, and goes
on exactly where it stopped; run again, it continues. The encoder of each such step is kept in `WORK/encoders`.
SETTINGS are pairs such as `--method.guide noisy`. Every answer stands beside those of `learning_baselines.py`. The
result is `WORK/results/CORPUS-NAME-seedSEED.json`, or lies in the folder of `--results`: that of the repository
(`benchmarks/results/learning`) is what `make docs` writes its tables from.

For scans of your own there is no need of this: `dagman pretrain --labelled STORE` probes a run on its way.
"""

import argparse
import functools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import learning_alterations as alterations
import learning_baselines as baselines
import learning_cases as cases
import learning_probes as probes
from dagman import config, files, recipes
from dagman.ct import crops, phantom_canvas
from dagman.ct.store import PreparedStore, padded_crop
from dagman.nets.encoder import Encoder
from dagman.nets.weights import load_encoder
from dagman.pretext import diagnostics, examination
from dagman.randomness import generator
from dagman.run import Run, describe_environment
from dagman.tasks import diversity, leakage
from dagman.tasks.embed import encode
from dagman.train.pretrain import pretrain
from dagman.train.settings import PretrainConfig

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
LOOKS, LOOK_VOLUMES = 2, 20
"""Crops of a volume, and volumes, on which attention is held against each structure."""


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
    for name, hu, truth in looks(store, side):
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


def looks(store: PreparedStore, side: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Crops near a structure of a volume: its name, (looks, x, y, z) HU, and which voxels are of it."""
    count: dict[str, int] = {}
    for row in range(len(store)):
        draws = generator(0, "learning.look", row)
        enough = {name for name, volumes in count.items() if volumes == LOOK_VOLUMES}
        for name, inside in structures(store, row, enough).items():
            if name in enough or not inside.any():
                continue
            count[name] = count.get(name, 0) + 1
            places = np.argwhere(inside)
            middles = places[draws.integers(len(places), size=LOOKS)] + draws.integers(
                -side // 4, side // 4, (LOOKS, 3)
            )
            corners = [tuple(int(m) - side // 2 for m in middle) for middle in middles]
            hu = np.stack([store.hu(row, corner, (side,) * 3) for corner in corners])
            yield name, hu, np.stack([padded_crop(inside, corner, (side,) * 3, 0) for corner in corners])


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


def look_at_heads(encoder: Encoder, hu: np.ndarray, device: str) -> list[dict[str, Any]]:
    """Diversity of the attention heads on a few crops."""
    images = torch.from_numpy(crops.window(hu, encoder.preparation.window_hu))[:, None].to(device)
    return [
        {
            "place": one.place,
            "distance_mm": [round(float(value), 3) for value in one.distance_mm],
            "distance_entropy": round(one.distance_entropy, 5),
            "row_entropy": round(one.row_entropy, 5),
        }
        for one in diversity.heads(encoder.to(device), images)
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


def alarms(run: Run) -> list[str]:
    """What rang, in the words of the log."""
    lines = run.log_file.read_text().splitlines()
    return [line.partition("ALARM ")[2] for line in lines if "ALARM " in line]


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
    parser.add_argument("--half", action="store_true", help="real: leave every second sarcoma out, ask of both halves")
    parser.add_argument("--alter", choices=list(alterations.ALTERATIONS), help="a change that is no setting")
    parser.add_argument("--questions", nargs="*", help="names of those asked; all without, none with no name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="processor threads; 0 for all")
    parser.add_argument("--results", type=Path, help="folder of the result; WORK/results without it")
    arguments, rest = parser.parse_known_args()
    settings = pairs(parser, rest)
    if arguments.corpus == "real" and not arguments.data:
        parser.error("--corpus real wants the folder of real CTs: --data FOLDER")
    if arguments.data and (lacking := cases.missing(arguments.data)):
        parser.error(f"{arguments.data} lacks {', '.join(lacking)}")
    arguments.results = arguments.results or arguments.work / "results"
    return arguments, settings


def pairs(parser: argparse.ArgumentParser, rest: Sequence[str]) -> dict[str, str]:
    """Settings by their dotted names, from what a parser left over."""
    if len(rest) % 2 or not all(flag.startswith("--") and "." in flag for flag in rest[::2]):
        parser.error(f"cannot read {' '.join(rest)}; settings are pairs such as --method.guide noisy")
    return dict(zip([flag.removeprefix("--") for flag in rest[::2]], rest[1::2], strict=True))


def gather(arguments: argparse.Namespace, side: int) -> tuple[PreparedStore, dict[str, cases.Crops]]:
    """What is trained on, and the questions with crops of `side`."""
    work, questions = arguments.work, {}
    if arguments.questions != []:
        questions = cases.phantom_crops(work / f"phantom_crops_{arguments.asked}.npz", arguments.asked)
        if arguments.data:
            questions |= cases.real_crops(arguments.data, work)
    if arguments.corpus == "real":
        store = cases.real_store(arguments.data, work)
        if arguments.half:
            questions = cases.by_sight(questions, store) if questions else questions
            left_out = cases.unseen(store)
            store.rows = [said for row, said in enumerate(store.rows) if row not in left_out]
    else:
        store = cases.phantom_store(work / f"phantoms_{arguments.volumes}", arguments.volumes)
    chosen = {name: asked for name, asked in questions.items() if name in (arguments.questions or questions)}
    return store, {name: asked._replace(hu=asked.middle(side)) for name, asked in chosen.items()}


def about(
    name: str,
    corpus: str,
    seed: int,
    chosen: PretrainConfig,
    *,
    settings: Mapping[str, str] | None = None,
    altered: str | None = None,
    half: bool = False,
) -> dict[str, Any]:
    """What is run, as its result says it."""
    said = {"name": name, "corpus": corpus, "seed": seed, "settings": dict(settings or {}), "altered": altered}
    return said | {"half": half, "config": config.to_dict(chosen), "steps": chosen.optimisation.steps}


def is_done(path: Path, wanted: Mapping[str, Any], chosen: PretrainConfig, at: Sequence[int]) -> bool:
    """Whether the result of this run is there, probed at these steps; one of other settings ends the program."""
    if not path.exists():
        return False
    found = {"half": False} | json.loads(path.read_text())
    found["config"] = config.deciding(chosen, found["config"])
    told = json.loads(json.dumps({**wanted, "config": config.deciding(chosen)}))
    if lines := config.difference({key: found.get(key) for key in told}, told):
        raise SystemExit(f"{path} is of other settings ({'; '.join(lines)}); give another --name or --results")
    return {*at, chosen.optimisation.steps} <= {probe["step"] for probe in found["probes"]}


def trained(
    chosen: PretrainConfig, store: PreparedStore, arguments: argparse.Namespace, name: str
) -> Iterator[tuple[int, Encoder]]:
    """The encoder at each step that is asked for, kept in `WORK/encoders`; fewer where someone stops the run."""
    run, kept = Run(arguments.work / "runs" / name), arguments.work / "encoders" / name
    before = config.deciding(chosen, run.config()) if run.config_file.exists() else config.deciding(chosen)
    if config.difference(before, json.loads(json.dumps(config.deciding(chosen)))):
        raise SystemExit(f"{run.folder} was trained with other settings; give another --name or --work")
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
            shutil.copy(run.folder / leakage.CASES, copied)
            copied.rename(folder)
        yield step, load_encoder(folder)


def last(work: Path, name: str) -> tuple[int, Encoder]:
    """Steps of a run when its encoder was last kept, and that encoder."""
    kept = max((work / "encoders" / name).iterdir(), key=lambda folder: int(folder.name))
    return int(kept.name), load_encoder(kept)


def see(encoder: Encoder, questions: baselines.Questions, device: str) -> dict[str, dict[str, np.ndarray]]:
    """Features of the crops of all questions."""
    return {question: features(encoder, asked.hu, device) for question, asked in questions.items()}


def table(
    asked: baselines.Asked, networks: list[baselines.Asked], others: Mapping[str, baselines.Asked]
) -> list[dict[str, Any]]:
    """One row a probe: its AUC, how much it lies above a random untrained network, and above each baseline."""
    rows = []
    for key, scores in asked.items():
        row = dict(zip(("question", "features", "labels"), key, strict=True)) | {"auc": probes.estimate(scores)}
        row["above untrained"] = probes.above(scores, [one[key] for one in networks])
        for name, other in others.items():
            row[f"above {name}"] = probes.estimate(scores, other[key]) if key in other else None
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
    named = arguments.name, arguments.corpus, arguments.seed
    result = about(*named, chosen, settings=settings, altered=arguments.alter, half=arguments.half)
    name = f"{arguments.corpus}-{arguments.name}-seed{arguments.seed}"
    path = arguments.results / f"{name}.json"
    if is_done(path, result, chosen, arguments.at):
        print(f"{path} is there")
        return
    store, questions = gather(arguments, chosen.data.crop[0])
    few = np.stack([store.hu(row, (40, 40, 40), chosen.data.crop) for row in range(8)])
    encoders = [(0, baselines.untrained(chosen, arguments.seed)), *trained(chosen, store, arguments, name)]
    if encoders[-1][0] != arguments.steps:
        return  # someone asked the run to stop; the same command goes on
    probed: list[tuple[baselines.Asked, dict[str, Any]]] = []
    for step, encoder in encoders:
        answers = baselines.ask(see(encoder, questions, arguments.device), questions)
        attention = attention_on_truth(encoder, store, arguments.device)
        heads = look_at_heads(encoder, few, arguments.device)
        probed.append((answers, {"step": step, "attention": attention, "heads": heads}))
    networks: list[baselines.Asked] = []
    if questions:
        look = functools.partial(see, questions=questions, device=arguments.device)
        networks = baselines.networks(chosen, questions, arguments.work / "untrained", arguments.alter, look)
    plain = baselines.without_network(questions, chosen.data.window_hu)
    result |= {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_environment()["versions"],
        "volumes": len(store),
        "crops": {question: len(asked.words) for question, asked in questions.items()},
        "patients": {
            question: len(set(asked.patients if asked.scored is None else asked.patients[asked.scored]))
            for question, asked in questions.items()
        },
        "untrained": [table(one, [other for other in networks if other is not one], {}) for one in networks],
        "baselines": {kind: table(asked, networks, {}) for kind, asked in plain.items()},
        "chance": baselines.chance(questions, chosen.data.window_hu, arguments.work / "untrained"),
        "probes": [looks | {"rows": table(answers, networks, plain)} for answers, looks in probed],
        "alarms": alarms(Run(arguments.work / "runs" / name)),
        "curve": curve(Run(arguments.work / "runs" / name)),
    }
    files.write_json(path, result)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
