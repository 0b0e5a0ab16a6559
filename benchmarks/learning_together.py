"""What three seeds say together: one interval for each question, over patients, seeds and untrained networks.

    python benchmarks/learning_together.py --work WORK --data DATA [--json benchmarks/results/learning-together.json]

Asks the last encoders of `learning_curve.py` (the runs named `tiny`, and `tiny-half` of fewer scans), beside untrained
networks and what needs no network. Rows of runs that are not in WORK stay as they are.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import yaml

import learning_baselines as baselines
import learning_cases as cases
import learning_curve as curve
import learning_probes as probes
from dagman import config, files
from dagman.run import Run, describe_environment
from dagman.train.settings import PretrainConfig

RUNS = {"phantoms": "phantoms-tiny", "real": "real-tiny", "half": "real-tiny-half"}
"""Name in the tables to that of the runs; of half the sarcomas."""
SEEDS = (0, 1, 2)


def main() -> None:
    """Ask, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="that of `learning_curve.py`")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "learning-together.json")
    given = parser.parse_args()
    there = {corpus: name for corpus, name in RUNS.items() if all(map(Path.is_dir, encoders(given.work, name)))}
    if not there:
        parser.error(f"{given.work} has no encoders of {', '.join(RUNS.values())}")
    first = Run(given.work / "runs" / f"{next(iter(there.values()))}-seed{SEEDS[0]}")
    chosen = config.from_dict(PretrainConfig, yaml.safe_load(first.config_file.read_text()))
    questions = cases.phantom_crops(given.work / "phantom_crops_160.npz", 160)
    questions |= cases.real_crops(given.data, given.work)
    questions = {name: asked._replace(hu=asked.middle(chosen.data.crop[0])) for name, asked in questions.items()}
    see = functools.partial(curve.see, questions=questions, device="cpu")
    networks = baselines.networks(chosen, questions, given.work / "untrained", None, see)
    plain = baselines.without_network(questions, chosen.data.window_hu)
    rows = json.loads(given.json.read_text())["rows"] if given.json.exists() else []
    rows = [row for row in rows if row["corpus"] not in there]
    for corpus, name in there.items():
        ends = [curve.last(given.work, f"{name}-seed{seed}") for seed in SEEDS]
        answers = [baselines.ask(see(encoder), questions) for _, encoder in ends]
        for key in answers[0]:
            if key[1] == probes.TOGETHER:
                runs = [one[key] for one in answers]
                row = {"corpus": corpus, "steps": ends[0][0], "question": key[0], "labels": key[2]}
                row["untrained"] = probes.together(runs, [one[key] for one in networks])
                rows.append(row | {name: probes.together(runs, [asked[key]]) for name, asked in plain.items()})
        print(f"{corpus}: asked", flush=True)
    rows.sort(key=lambda row: list(RUNS).index(row["corpus"]))
    result = {"rows": rows, "date": time.strftime("%Y-%m-%d"), "machine": describe_environment()["versions"]}
    files.write_json(given.json, result)
    print(f"wrote {given.json}")


def encoders(work: Path, name: str) -> list[Path]:
    """Folders of the encoders of the seeds of a run."""
    return [work / "encoders" / f"{name}-seed{seed}" for seed in SEEDS]


if __name__ == "__main__":
    main()
