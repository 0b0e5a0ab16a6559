"""Do the compared methods learn at a tiny size? Every tiny recipe on the real CTs, three seeds, probed at the end.

    python benchmarks/learning_methods.py --work WORK --data DATA [--steps 300] [--seeds 0 1 2] [--part 0/2] [SETTINGS]

SETTINGS are pairs such as `--optimisation.precision bf16`. Each run is one of `learning_curve.py` and writes
`WORK/results/real-METHOD-seedSEED.json`, or into the folder of `--results`, with its length in its name where that is
not 300 steps; what is there is not run again, so that the table grows over several sittings.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import learning_curve
from dagman import config, recipes

STEPS = 300
"""Of the runs that bear their recipe's name alone."""


def main() -> None:
    """Run what is missing, first seeds first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, help="folder of the results; WORK/results without it")
    arguments, rest = parser.parse_known_args()
    settings = learning_curve.pairs(parser, rest)
    results = arguments.results or arguments.work / "results"
    part, parts = map(int, arguments.part.split("/"))
    tiny = [name for name in recipes.RECIPES if name.endswith("-tiny")]
    planned = [(name, seed) for seed in arguments.seeds for name in tiny]
    for name, seed in planned[part::parts]:
        chosen = recipes.with_length(recipes.get(name), arguments.steps, None)
        chosen = config.override(chosen, {**settings, "optimisation.seed": seed})
        label = name if arguments.steps == STEPS else f"{name}-{arguments.steps}"
        path = results / f"real-{label}-seed{seed}.json"
        if learning_curve.is_done(
            path, learning_curve.about(label, "real", seed, chosen, settings=settings), chosen, []
        ):
            continue
        print(f"{name}, seed {seed}", flush=True)
        script = Path(__file__).with_name("learning_curve.py")
        command = [
            *(sys.executable, script, "--work", arguments.work, "--data", arguments.data, "--corpus", "real"),
            *("--name", label, "--recipe", name, "--seed", seed, "--steps", arguments.steps, "--results", results),
            *("--threads", arguments.threads, "--device", arguments.device, *rest, "--at"),
        ]
        subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
