"""The variants that `benchmarks/step.py` times take the same step."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import step


def test_the_plain_step_and_the_fast_one_come_to_the_same_losses() -> None:
    children = [step.Child(variant, "tuned", (32, 1, "float32"), None) for variant in ("plain", "fast")]
    losses = [[child.ask()["loss"] for child in children] for _ in range(2)]
    for child in children:
        child.close()
    for plain, fast in losses:
        assert fast == pytest.approx(plain, rel=1e-5)
    assert losses[0] != losses[1], "the weights have moved"
