"""What decides whether it learns: short runs of `dagman-tiny`, each with one factor changed.

    python benchmarks/learning_factors.py --work WORK [--data DATA] [--seed 0] [--part 0/2]
    python benchmarks/learning_factors.py --work WORK [--data DATA] [--seed 0] [--part 0/2] --today

Without `--today`: all factors, 150 steps without a probe, of the recipe as it was when its hidden token was learned.
With it: those that matter most, of the recipe as it is, 300 steps, and which organ it is asked at the end.

On the real CTs of DATA, or on phantoms without. Each run writes `WORK/results/CORPUS-factor-NAME-seedSEED.json`, or
into the folder of `--results`; what is there is not run again: the table grows over several sittings. `--part i/n` does
every n-th run, for n processes side by side.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import learning_alterations as alterations
import learning_curve as curve
from dagman import config, recipes

FACTORS: dict[str, dict[str, str]] = {
    "as-it-is": {},
    "rate-1e-3": {"optimisation.learning_rate": "1e-3"},
    "rate-2e-4": {"optimisation.learning_rate": "2e-4"},
    "warmer-teacher": {"method.class_temperature": "0.03,0.03", "method.patch_temperature": "0.04,0.04"},
    "paper-temperature": {"method.class_temperature": "0.04,0.07", "method.patch_temperature": "0.04,0.07"},
    "one-pair-a-volume": {"data.pairs_per_volume": "1"},
    "eight-pairs-a-volume": {"data.pairs_per_volume": "8"},
    "centering": {"method.balance": "centering"},
    "noisy-guide": {"method.guide": "noisy"},
    "paper-noise": {"method.dropped_ratio": "0.7", "method.hidden.probability": "1.0"},
    "one-patch-center": {"method.patch_centers": "shared"},
    "position-in-residual": {"method.patch_centers": "shared", "encoder.attention.position": "residual"},
    "batch-4": {"optimisation.batch_size": "4"},
    "batch-4-times-4": {"optimisation.batch_size": "4", "optimisation.accumulate": "4"},
    "voxel-head-of-torch": {},
    "small-semantic-attention": {},
    "query-gain-1": {"encoder.attention.query_gain": "1.0"},
    "paper-weights": {"method.losses.ampd": "0.1", "method.losses.aitd": "0.1", "method.losses.gitd": "0.1"},
    "distillation-late": {},
    "image-late": {},
    "image-weight-3": {"method.losses.amip": "3.0"},
    "no-image-term": {"method.losses.amip": "0.0"},
    "overlap-half": {"data.overlap_ratio": "0.5"},
    "momentum-.996": {"optimisation.momentum": "0.996"},
    "momentum-warm-up": {"optimisation.momentum": "0.996"},
    "paper": {
        "method.balance": "centering",
        "method.patch_centers": "shared",
        "encoder.attention.position": "residual",
        "encoder.attention.query_gain": "1.0",
        "method.guide": "noisy",
        "method.dropped_ratio": "0.7",
        "method.hidden.probability": "1.0",
        "method.losses.ampd": "0.1",
        "method.losses.aitd": "0.1",
        "method.losses.gitd": "0.1",
        "method.class_temperature": "0.04,0.07",
        "method.patch_temperature": "0.04,0.07",
        "optimisation.learning_rate": "8e-4",
        "optimisation.momentum": "0.996",
        "data.pairs_per_volume": "1",
        "data.overlap_ratio": "0.5",
    },
    "no-warm-up": {"optimisation.warmup_ratio": "0.0"},
    "warm-up-.5": {"optimisation.warmup_ratio": "0.5"},
    "start-random-75": {"method.hidden.start_step": "75"},
    "prototypes-1024": {"method.heads.num_prototypes": "1024"},
    "center-momentum-.5": {"method.center_momentum": "0.5"},
    "center-momentum-.99": {"method.center_momentum": "0.99"},
    "normalised-target": {},
    "soft-tissue-window": {"data.window_hu": "-175,250"},
    "large-tokens": {},
    "zero-hidden-token": {"encoder.hidden_token": "zero"},
    "cells-of-16": {"encoder.attention.stage": "3"},
    "embed-12": {"encoder.embed_dim": "12"},
    "crop-64": {"data.crop": "64,64,64", "optimisation.batch_size": "2", "data.pairs_per_volume": "1"},
    "float32": {"optimisation.precision": "float32"},
}
"""What is changed, the most telling first; a name of `learning_alterations.py` also alters what no setting changes."""
TODAY = {
    "as-it-is": {},
    **{
        name: FACTORS[name]
        for name in (
            *("rate-1e-3", "centering", "one-pair-a-volume", "noisy-guide", "warmer-teacher", "one-patch-center"),
            *("no-warm-up", "prototypes-1024", "momentum-.996", "rate-2e-4"),
            *("batch-4", "batch-4-times-4", "overlap-half", "query-gain-1", "cells-of-16", "embed-12", "crop-64"),
            *("paper-noise", "eight-pairs-a-volume", "soft-tissue-window", "image-weight-3", "warm-up-.5"),
        )
    },
    "residual-position": {"encoder.attention.position": "residual"},
    "paper-weights": FACTORS["paper-weights"],
    "learned-token": {"encoder.hidden_token": "learned"},
    **{
        f"centering-{name}": {"method.balance": "centering", **settings}
        for name, settings in {
            "warmer": {"method.class_temperature": "0.02,0.02", "method.patch_temperature": "0.03,0.03"},
            "at-.04": {"method.class_temperature": "0.04,0.04", "method.patch_temperature": "0.04,0.04"},
            "paper-temperature": FACTORS["paper-temperature"],
            "momentum-.5": FACTORS["center-momentum-.5"],
            "momentum-.99": FACTORS["center-momentum-.99"],
            "one-patch-center": FACTORS["one-patch-center"],
        }.items()
    },
}
"""The same of the recipe as it is."""
TODAY_STEPS = 300
BASE = {"optimisation.precision": "bf16", "encoder.hidden_token": "learned"}
"""Of all runs but those about it: the recipe as it was before this table changed its hidden token."""


def done(path: Path, name: str, settings: dict[str, str] | None) -> bool:
    """Whether the result is there; one of today's recipe must be of these settings, others are of what was then."""
    if settings is None or not path.exists():
        return path.exists()
    seed = json.loads(path.read_text())["seed"]
    chosen = config.override(recipes.with_length(recipes.get("dagman-tiny"), TODAY_STEPS, None), settings)
    chosen = config.override(chosen, {"optimisation.seed": seed})
    corpus = path.name.partition("-")[0]
    return curve.is_done(path, curve.about(name, corpus, seed, chosen, settings=settings), chosen, [])


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of real CTs; phantoms without")
    parser.add_argument("--today", action="store_true", help="of the recipe as it is, longer, and probed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, help="folder of the results; WORK/results without it")
    arguments = parser.parse_args()
    results = arguments.results or arguments.work / "results"
    corpus = "real" if arguments.data else "phantoms"
    part, parts = map(int, arguments.part.split("/"))
    factors, prefix = (TODAY, "today") if arguments.today else (FACTORS, "factor")
    steps, questions = (TODAY_STEPS, ["organ"]) if arguments.today else (2 * alterations.HALF, [])
    for name, settings in list(factors.items())[part::parts]:
        path = results / f"{corpus}-{prefix}-{name}-seed{arguments.seed}.json"
        if done(path, f"{prefix}-{name}", settings if arguments.today else None):
            continue
        script = Path(__file__).with_name("learning_curve.py")
        common = ["--work", arguments.work, "--steps", steps, "--seed", arguments.seed, "--results", results]
        common += ["--questions", *questions]
        if arguments.data:
            common += ["--data", arguments.data, "--corpus", corpus]
        if name in alterations.ALTERATIONS and not arguments.today:
            common += ["--alter", name]
        chosen = [
            word
            for key, value in (settings if arguments.today else BASE | settings).items()
            for word in (f"--{key}", value)
        ]
        command = [sys.executable, script, "--name", f"{prefix}-{name}", "--threads", arguments.threads]
        command += ["--device", arguments.device, "--at"]
        print(f"{name}: {' '.join(chosen) or 'the recipe'}", flush=True)
        subprocess.run(list(map(str, [*command, *common, *chosen])), check=True)


if __name__ == "__main__":
    main()
