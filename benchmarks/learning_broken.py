"""Does the learning test turn red when a change stops the learning? It is run as it is, of three seeds, and changed.

    python benchmarks/learning_broken.py [--json benchmarks/results/learning-broken.json]

Each change breaks the package in the process of its own test run; a few minutes each. What is there is not run again,
unless the test or the change is another by now.
"""

import argparse
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEST = "tests/train/test_learning.py"
ROOT = Path(__file__).resolve().parents[1]
CHOICE, SEED, FIGURES = "LEARNING_BROKEN", "LEARNING_SEED", "LEARNING_FIGURES"


def nothing() -> None:
    """The test as it is."""


def encoder_without_gradient() -> None:
    """The heads learn, the encoder gets no gradient."""
    from dagman.nets.swin import SwinEncoder

    before = SwinEncoder.forward

    def forward(self: Any, *given: Any, **more: Any) -> Any:
        found = before(self, *given, **more)
        return type(found)(*(_detached(part) for part in found))

    SwinEncoder.forward = forward  # type: ignore[method-assign]


def _detached(part: Any) -> Any:
    import torch

    if isinstance(part, torch.Tensor):
        return part.detach()
    return tuple(map(_detached, part)) if isinstance(part, tuple) else part


def targets_of_other_places() -> None:
    """[CLS] and pooled targets come from the pair that follows in the batch."""
    from dagman.pretext import codistill

    swap = codistill._swap_views
    codistill._swap_views = lambda values: swap(values).roll(1, dims=0)


def teacher_stands_still() -> None:
    """The teacher never follows the student."""
    from dagman.pretext.codistill import CoDistillation

    before = CoDistillation.update_teacher
    CoDistillation.update_teacher = lambda self, _: before(self, 1.0)  # type: ignore[method-assign, assignment]


def image_term_of_other_crops() -> None:
    """What is filled in is compared with another crop of the batch."""
    from dagman.pretext.codistill import CoDistillation

    before = CoDistillation._predict

    def predict(self: Any, final: Any, images: Any, hidden: Any) -> Any:
        return before(self, final, images.roll(1, dims=0), hidden)

    CoDistillation._predict = predict  # type: ignore[method-assign]


def _whatever_the_recipe_says(settings: dict[str, str]) -> None:
    from dagman import config, recipes

    before = recipes.get
    recipes.get = lambda name: config.override(before(name), settings)


def targets_are_centered() -> None:
    """Targets are centered and not balanced, at the recipe's cold temperatures."""
    _whatever_the_recipe_says({"method.balance": "centering"})


def rate_too_high() -> None:
    """The learning rate is ten times the recipe's, without warm-up."""
    _whatever_the_recipe_says({"optimisation.learning_rate": "5e-3", "optimisation.warmup_ratio": "0"})


def teacher_too_warm() -> None:
    """The teacher's temperatures are those of the student."""
    _whatever_the_recipe_says({"method.class_temperature": "0.1,0.1", "method.patch_temperature": "0.1,0.1"})


def hiding_follows_the_noise() -> None:
    """The noisy pass guides the hiding."""
    _whatever_the_recipe_says({"method.guide": "noisy"})


BREAKS: dict[str, Callable[[], None]] = {
    one.__name__.replace("_", " "): one
    for one in (
        nothing,
        encoder_without_gradient,
        targets_of_other_places,
        teacher_stands_still,
        image_term_of_other_crops,
        targets_are_centered,
        rate_too_high,
        teacher_too_warm,
        hiding_follows_the_noise,
    )
}


def of(change: Callable[[], None]) -> str:
    """Which test, and which change, a row is of."""
    return hashlib.sha256(((ROOT / TEST).read_text() + inspect.getsource(change)).encode()).hexdigest()[:16]


def pytest_collection_finish() -> None:
    """This module is a plugin of the test's process, and imports the package after the plugin that checks shapes."""
    BREAKS[os.environ[CHOICE]]()


def main() -> None:
    """Run what is missing."""
    from dagman import files
    from dagman.run import describe_environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "learning-broken.json")
    given = parser.parse_args()
    rows = json.loads(given.json.read_text())["rows"] if given.json.exists() else []
    rows = [row for row in rows if row["change"] in BREAKS and row.get("of") == of(BREAKS[row["change"]])]
    planned = [
        (name, change, seed) for name, change in BREAKS.items() for seed in ((0, 1, 2) if change is nothing else (0,))
    ]
    for name, change, seed in planned:
        if any((row["change"], row["seed"]) == (name, seed) for row in rows):
            continue
        began = time.monotonic()
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        figures = Path(tempfile.mkdtemp()) / "figures.json"
        told = {CHOICE: name, SEED: str(seed), FIGURES: str(figures), "PYTHONPATH": path}
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "learning_broken", TEST],
            cwd=ROOT,
            env=os.environ | told,
            capture_output=True,
            text=True,
            check=False,
        )
        failed = re.search(r"^E\s+AssertionError: (.+)$", ran.stdout, re.MULTILINE)
        if ran.returncode not in (0, 1) or (ran.returncode == 1) != bool(failed):
            raise SystemExit(f"{name}: the test did not come to its claims:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
        rows.append(
            {
                "change": name,
                "seed": seed,
                "what": (change.__doc__ or "").rstrip("."),
                "red": failed is not None,
                "by": failed[1] if failed else None,
                "seconds": round(time.monotonic() - began),
                "figures": {name: round(value, 4) for name, value in json.loads(figures.read_text()).items()},
                "of": of(change),
            }
        )
        print(rows[-1], flush=True)
        rows.sort(key=lambda row: (list(BREAKS).index(row["change"]), row["seed"]))
        result = {"rows": rows, "date": time.strftime("%Y-%m-%d"), "machine": describe_environment()["versions"]}
        files.write_json(given.json, result)


if __name__ == "__main__":
    main()
