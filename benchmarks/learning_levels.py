"""Where does an encoder lose a small nodule? Each level by itself, over the whole crop and in its middle.

    python benchmarks/learning_levels.py --work WORK [--json benchmarks/results/learning-levels.json]

Asks "a nodule in the crop or none" of the last encoders of `learning_curve.py` (the runs named `tiny`) and of untrained
ones. The nodule lies in the middle of its crop: the mean over the crop dilutes it, the mean over the middle, two tokens
a side, does not.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import learning_baselines as baselines
import learning_cases as cases
import learning_curve as curve
import learning_probes as probes
from dagman import files, recipes
from dagman.ct import crops
from dagman.nets.encoder import Encoder
from dagman.run import describe_environment
from dagman.tasks.embed import encode

CORPORA = ("phantoms", "real")
QUESTION, SEEDS, BATCH = "nodule", 3, 32


def middle(level: Tensor) -> Tensor:
    """Mean of the eight tokens around the middle, of all where they are fewer: (batch, width, x, y, z) in."""
    first = [max(0, side // 2 - 1) for side in level.shape[2:]]
    x, y, z = (slice(start, start + 2) for start in first)
    return level[:, :, x, y, z].mean(dim=(2, 3, 4))


def look(encoder: Encoder, hu: np.ndarray) -> dict[str, np.ndarray]:
    """Features of the crops at each level."""
    images = torch.from_numpy(crops.window(hu, encoder.preparation.window_hu))[:, None]
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images), BATCH):
        seen = encode(encoder, images[start : start + BATCH], device="cpu", precision="float32")
        side = round(seen.tokens.shape[1] ** (1 / 3))
        cells = seen.tokens.transpose(1, 2).unflatten(2, (side,) * 3)
        levels = {f"level {number}": level for number, level in enumerate(seen.pyramid)} | {"cells": cells}
        for name, level in levels.items():
            found.setdefault(name, []).append(level.mean(dim=(2, 3, 4)).numpy())
            found.setdefault(f"{name}, middle", []).append(middle(level).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def ask(encoder: Encoder, asked: cases.Crops) -> dict[str, dict[int | None, probes.Scores]]:
    """What probes of each level say with 32 and with all labels."""
    return {
        name: {
            labels: probes.probe(vectors, asked.words, asked.patients, labels, asked.scored) for labels in (32, None)
        }
        for name, vectors in look(encoder, asked.hu).items()
    }


def main() -> None:
    """Ask, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="that of `learning_curve.py`")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "learning-levels.json")
    given = parser.parse_args()
    chosen = recipes.get("dagman-tiny")
    asked = cases.phantom_crops(given.work / "phantom_crops_160.npz", 160)[QUESTION]
    asked = asked._replace(hu=asked.middle(chosen.data.crop[0]))
    put = functools.partial(ask, asked=asked)
    plain = [put(baselines.untrained(chosen, seed)) for seed in range(baselines.UNTRAINED)]
    rows = json.loads(given.json.read_text())["rows"] if given.json.exists() else []
    for corpus in CORPORA:
        names = [f"{corpus}-tiny-seed{seed}" for seed in range(SEEDS)]
        if not all((given.work / "encoders" / name).is_dir() for name in names):
            continue  # its rows stay as they are
        rows = [row for row in rows if row["corpus"] != corpus]
        for seed, run in enumerate(names):
            for name, answers in put(curve.last(given.work, run)[1]).items():
                for labels, scores in answers.items():
                    others = [one[name][labels] for one in plain]
                    row = {"corpus": corpus, "seed": seed, "features": name, "labels": labels}
                    row |= {"auc": probes.estimate(scores), "above untrained": probes.above(scores, others)}
                    once = np.ones((1, len(asked.words)))
                    row["untrained"] = round(float(np.mean([other.statistic(once)[0] for other in others])), 4)
                    rows.append(row)
            print(f"{corpus}, seed {seed}: asked", flush=True)
    rows.sort(key=lambda row: CORPORA.index(row["corpus"]))
    about = {"date": time.strftime("%Y-%m-%d"), "machine": describe_environment()["versions"]}
    files.write_json(given.json, about | {"question": QUESTION, "rows": rows})
    print(f"wrote {given.json}")


if __name__ == "__main__":
    main()
