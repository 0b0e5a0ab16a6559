"""What decides whether it learns: short runs of `dagman-tiny` on phantoms, each with one factor changed.

    python benchmarks/learning_factors.py --work WORK [--steps 150] [--seed 0] [--part 0/2]

Each run writes `benchmarks/results/learning/phantoms-factor-NAME-seedSEED.json`; what is there is not run again: the
table grows over several sittings. `--part i/n` does every n-th run, for n processes side by side.
"""

import argparse
import subprocess
import sys
from pathlib import Path

FACTORS: dict[str, dict[str, str]] = {
    "as-it-is": {},
    "centering": {"method.balance": "centering"},
    "centering-cold": {"method.balance": "centering", "method.class_temperature": "0.01,0.01"},
    "one-patch-center": {"method.patch_centers": "shared"},
    "position-in-residual": {"method.patch_centers": "shared", "encoder.attention.position": "residual"},
    "noisy-guide": {"method.guide": "noisy"},
    "paper-noise": {"method.dropped_ratio": "0.7", "method.hidden.probability": "1.0"},
    "paper-weights": {"method.losses.ampd": "0.1", "method.losses.aitd": "0.1", "method.losses.gitd": "0.1"},
    "paper-start": {
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
        "method.class_temperature": "0.04,0.04",
        "data.pairs_per_volume": "1",
        "data.overlap_ratio": "0.5",
    },
    "query-gain-1": {"encoder.attention.query_gain": "1.0"},
    "query-gain-4": {"encoder.attention.query_gain": "4.0"},
    "batch-4": {"optimisation.batch_size": "4"},
    "rate-3e-4": {"optimisation.learning_rate": "3e-4"},
    "rate-3e-3": {"optimisation.learning_rate": "3e-3"},
    "one-pair-a-volume": {"data.pairs_per_volume": "1"},
    "overlap-half": {"data.overlap_ratio": "0.5"},
    "momentum-.99": {"optimisation.momentum": "0.99"},
    "prototypes-1024": {"method.heads.num_prototypes": "1024"},
    "warm-teacher": {"method.class_temperature": "0.06,0.06", "method.patch_temperature": "0.08,0.08"},
    "start-random-75": {"method.hidden.start_step": "75"},
    "no-image-term": {"method.losses.amip": "0.0"},
    "soft-tissue-window": {"data.window_hu": "-175,250"},
}
RESULTS = Path(__file__).parent / "results" / "learning"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    for name, settings in list(FACTORS.items())[part::parts]:
        if (RESULTS / f"phantoms-factor-{name}-seed{arguments.seed}.json").exists():
            continue
        script = Path(__file__).with_name("learning_curve.py")
        common = ["--work", arguments.work, "--steps", arguments.steps, "--seed", arguments.seed, "--no-questions"]
        chosen = [word for key, value in settings.items() for word in (f"--{key}", value)]
        command = [sys.executable, script, "--name", f"factor-{name}", "--threads", arguments.threads, "--at"]
        print(f"{name}: {' '.join(chosen) or 'the recipe'}", flush=True)
        subprocess.run(list(map(str, [*command, *common, *chosen])), check=True)


if __name__ == "__main__":
    main()
