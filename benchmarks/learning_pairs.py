"""What do AITD and GITD agree about: the place, or its volume? Asked of the last checkpoints of learning curves.

    python benchmarks/learning_pairs.py --work WORK [--batches 12] [--json benchmarks/results/learning-pairs.json]

Batches as in training (new crops, noise and hiding). The student's distribution of each view is held against the
teacher's target of its own pair's other view, of another pair of the same volume, and of another volume: a student that
knew the volume alone would meet the first two alike. Only runs of `dagman-tiny` as it is, named `tiny`, are asked.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from dagman import config, files
from dagman.ct.datasets import ViewsDataset, collate, show
from dagman.ct.store import PreparedStore
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.run import Run, describe_environment
from dagman.train.settings import PretrainConfig

FIRST_SAMPLE = 800_000
"""Samples from here on no run has trained on."""


def module_of(run: Run, chosen: PretrainConfig) -> CoDistillation:
    """Student, teacher and heads of the last checkpoint."""
    state = safetensors.torch.load_file(max((run.folder / "checkpoints").iterdir()) / "state.safetensors")
    module = CoDistillation(chosen.encoder, chosen.method, mean_intensity=0.5, crop=chosen.data.crop)
    module.load_state_dict(
        {name.removeprefix("module."): value for name, value in state.items() if name.startswith("module.")}
    )
    return module.eval()


def ask(module: CoDistillation, chosen: PretrainConfig, store: PreparedStore, batches: int) -> dict[str, Any]:
    """Mean cross-entropies over ln K, and how often the own target is the most likely of its volume's."""
    dataset, size = ViewsDataset(store, chosen.data, chosen.optimisation.seed), chosen.optimisation.batch_size
    method, draws = chosen.method, torch.Generator().manual_seed(0)
    knobs = Knobs(method.class_temperature[-1], method.patch_temperature[-1], attended=True)
    sums: dict[str, dict[str, list[float]]] = {}
    for batch in range(batches):
        first = FIRST_SAMPLE + batch * size
        views = show(collate([dataset[first + number] for number in range(size)]), chosen.data)
        volume, pair = views.rows.flatten().repeat(2), torch.arange(size).repeat(2)
        images = torch.cat([views.u, views.v])
        with torch.no_grad():
            teacher = module._teach(images, draws)
            hidden = module._hide(teacher.attention, len(images), draws)
            student = module.student.encoder(images, hidden, final_only=module.final_only)
            for name in ("aitd", "gitd"):
                swapped = teacher.bottlenecks[name].roll(size, dims=0)
                targets = module.targets(name, swapped, knobs.class_temperature)
                head = module.student.head(name).project(module.head_input(name, student))
                said = (module.student.logits(name, head) / method.student_temperature).log_softmax(-1)
                apart = -(said @ targets.T) / math.log(targets.shape[-1])
                found = sums.setdefault(name, {})
                same, mine = volume[:, None] == volume, pair[:, None] == pair
                views_alike = (torch.arange(2 * size) < size)[:, None] == (torch.arange(2 * size) < size)
                for word, which in {
                    "own pair": torch.eye(2 * size, dtype=torch.bool),
                    "another pair of the volume": same & ~mine,
                    "another volume": ~same,
                }.items():
                    found.setdefault(word, []).append(float(apart[which].mean()))
                inside = apart.masked_fill(~(same & views_alike), math.inf).argmin(dim=1)
                found.setdefault("own place first", []).append(float((inside == torch.arange(2 * size)).float().mean()))
                nearest = apart.masked_fill(~views_alike, math.inf).argmin(dim=1)
                found.setdefault("own volume first", []).append(float((volume[nearest] == volume).float().mean()))
    return {
        name: {word: round(sum(values) / len(values), 4) for word, values in found.items()}
        for name, found in sums.items()
    }


def main() -> None:
    """Ask every run that ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="that of `learning_curve.py`")
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "learning-pairs.json")
    asked = parser.parse_args()
    stores = {"real": asked.work / "real", "phantoms": asked.work / "phantoms_160"}
    rows = json.loads(asked.json.read_text())["rows"] if asked.json.exists() else []
    for folder in sorted((asked.work / "runs").glob("*-tiny-seed[0-9]")):
        run, corpus = Run(folder), folder.name.split("-")[0]
        if folder.name != f"{corpus}-tiny-seed{folder.name[-1]}":
            continue
        chosen = config.from_dict(PretrainConfig, yaml.safe_load(run.config_file.read_text()))
        found = ask(module_of(run, chosen), chosen, PreparedStore(stores[corpus]), asked.batches)
        named = {"corpus": corpus, "seed": chosen.optimisation.seed}
        rows = [row for row in rows if not named.items() <= row.items()] + [named | found]  # of others stay as they are
        print(corpus, chosen.optimisation.seed, found, flush=True)
    rows.sort(key=lambda row: (row["corpus"], row["seed"]))
    result = {"batches": asked.batches, "rows": rows, "date": time.strftime("%Y-%m-%d")}
    files.write_json(asked.json, result | {"machine": describe_environment()["versions"]})
    print(f"wrote {asked.json}")


if __name__ == "__main__":
    main()
