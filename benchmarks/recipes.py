"""What a step of each tiny recipe costs beside the others, measured in turns in one run.

python benchmarks/recipes.py [--rounds 5] [--json benchmarks/results/recipes.json]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from dagman import files, recipes
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.run import describe_environment
from dagman.train import engine
from dagman.types import Views

PAIRS = 8


class Stepper:
    """One recipe's whole step: forward, backward, optimizer, teacher, centers."""

    def __init__(self, name: str) -> None:
        recipe = recipes.get(name)
        torch.manual_seed(0)
        crop = recipe.data.crop
        self.module = CoDistillation(recipe.encoder, recipe.method, mean_intensity=0.4, crop=crop).train()
        self.optimizer = engine.adamw(self.module)
        self.knobs = Knobs(recipe.method.class_temperature[0], recipe.method.patch_temperature[0], attended=True)
        shape = (PAIRS, 1, *crop)
        self.views = Views(torch.rand(shape), torch.rand(shape), torch.arange(PAIRS), torch.zeros(PAIRS))
        self.seconds: list[float] = []

    def step(self, number: int) -> None:
        """Take one and note its time."""
        began = time.perf_counter()
        outcome = self.module(self.views, self.knobs, torch.Generator().manual_seed(number))
        outcome.losses.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.update_teacher(0.99)
        self.module.move_centers(outcome.means)
        self.seconds.append(time.perf_counter() - began)


def main() -> None:
    """Measure all recipes in turns; the first round warms up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "recipes.json")
    arguments = parser.parse_args()
    names = [name for name in recipes.RECIPES if name.endswith("-tiny")]
    steppers = {name: Stepper(name) for name in names}
    with engine.flushed_denormals():
        for number in range(arguments.rounds + 1):
            for stepper in steppers.values():
                stepper.step(number)
    base = statistics.median(steppers["dagman-tiny"].seconds[1:])
    rows = []
    for name, stepper in steppers.items():
        median = statistics.median(stepper.seconds[1:])
        size = sum(parameter.numel() for parameter in stepper.module.student.encoder.parameters())
        rows.append({"recipe": name, "seconds": median, "over_dagman": median / base, "encoder_parameters": size})
        print(f"{name:18s} {median:6.3f} s  {median / base:5.2f} x dagman-tiny  {size / 1e6:.2f} M parameters")
    result = {"pairs": PAIRS, "rounds": arguments.rounds, "rows": rows}
    result |= {"date": time.strftime("%Y-%m-%d"), "machine": describe_environment()["versions"]}
    files.write_json(arguments.json, result)
    print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
