"""Do scans that were left out of pretraining gain less, or are they easier? Both kinds of runs, asked of both halves.

    python benchmarks/learning_control.py --work WORK --data DATA [--json benchmarks/results/learning-control.json]

The question is that of tumours. Runs named `tiny-half` left every second sarcoma out, those named `tiny` saw all; what
`learning_curve.py` kept of them is asked, seed by seed, about the half that all saw and about the half that was left
out. The two halves hold other patients, so only what both kinds of runs say of one half can be compared.
"""

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import yaml

import learning_baselines as baselines
import learning_cases as cases
import learning_curve as curve
import learning_probes as probes
from dagman import config, files
from dagman.run import Run, describe_environment
from dagman.train.settings import PretrainConfig

NAMES = {"saw all": "real-tiny", "left half out": "real-tiny-half"}
SEEDS = (0, 1, 2)


def main() -> None:
    """Ask, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="that of `learning_curve.py`")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "learning-control.json")
    given = parser.parse_args()
    first = Run(given.work / "runs" / f"{NAMES['saw all']}-seed{SEEDS[0]}")
    chosen = config.from_dict(PretrainConfig, yaml.safe_load(first.config_file.read_text()))
    store = cases.real_store(given.data, given.work)
    halves = cases.by_sight(cases.real_crops(given.data, given.work), store)
    questions = {
        name: asked._replace(hu=asked.middle(chosen.data.crop[0]))
        for name, asked in halves.items()
        if name in ("tumour seen", "tumour unseen")
    }
    see = functools.partial(curve.see, questions=questions, device="cpu")
    networks = baselines.networks(chosen, questions, given.work / "untrained", None, see)
    answers = {
        (kind, seed): baselines.ask(see(curve.last(given.work, f"{name}-seed{seed}")[1]), questions)
        for kind, name in NAMES.items()
        for seed in SEEDS
    }
    plain = baselines.without_network(questions, chosen.data.window_hu)
    rows = [
        _row(key, answers, [one[key] for one in networks], plain)
        | {"patients": len(set(questions[key[0]].patients[questions[key[0]].scored]))}
        for key in next(iter(answers.values()))
        if key[1] == probes.TOGETHER
    ]
    result = {"rows": rows, "date": time.strftime("%Y-%m-%d"), "machine": describe_environment()["versions"]}
    files.write_json(given.json, result)
    print(json.dumps(rows, indent=1))
    print(f"wrote {given.json}")


def _row(key: Any, answers: dict[Any, Any], networks: list[probes.Scores], plain: dict[str, Any]) -> dict[str, Any]:
    """One half with so many labels: gains of each run, and what the runs that saw these scans have above the others."""
    runs = {kind: [answers[kind, seed][key] for seed in SEEDS] for kind in NAMES}
    return {
        "question": key[0],
        "labels": key[2],
        "untrained": [probes.estimate(network)["value"] for network in networks],
        "baselines": {name: probes.estimate(asked[key]) for name, asked in plain.items()},
        "gains": {kind: [probes.above(one, networks) for one in some] for kind, some in runs.items()},
        "together": {kind: probes.together(some, networks) for kind, some in runs.items()},
        "saw all above left half out": probes.together(runs["saw all"], runs["left half out"]),
    }


if __name__ == "__main__":
    main()
