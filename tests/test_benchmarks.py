"""The variants that `benchmarks/step.py` times take the same step."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dagman import recipes
from dagman.nets import kernel
from dagman.pretext.method import HeadConfig
from dagman.train import engine
from dagman.types import Views

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench
import step

CROP, STEPS = 32, 2
PAPER = recipes.get("dagman-swin")
RECIPE = replace(PAPER, method=replace(PAPER.method, heads=HeadConfig(num_prototypes=512, hidden_width=64)))
NEEDS_KERNEL = ("kernel", "row kernel", "tokens in place", "fused MLP")


def test_results_of_two_machines_do_not_mix(tmp_path: Path) -> None:
    kept = tmp_path / "step.json"
    assert step.kept_rows(kept, "one") == []
    rows = [{"crop": 64, "machine": "one"}]
    kept.write_text(json.dumps({"machine": {"processor": "One (R) 1"}, "rows": rows}))
    assert step.kept_rows(kept, "one") == rows
    with pytest.raises(SystemExit, match="holds rows of one; give another file for two"):
        step.kept_rows(kept, "two")
    assert bench.place_for(tmp_path / "new", "Two (R) 2") == tmp_path / "new"
    assert bench.place_for(tmp_path, "One (R) 1") == tmp_path
    assert bench.place_for(tmp_path, "Two (R) 2") == tmp_path / "others" / "two-r-2"


def test_without_instructions_for_bf16_none_is_measured() -> None:
    commands = [command for _, command in bench.pieces(None, None, bf16=False).values()]
    assert commands
    assert not any("bf16" in command or "targets.py" in command for command in commands)
    assert any("bf16" in command for _, command in bench.pieces(None, None, bf16=True).values())


def test_the_plain_step_and_the_fast_one_come_to_the_same_losses() -> None:
    children = [step.Child(variant, "tuned", (32, 1, "float32"), None) for variant in ("plain", "fast")]
    losses = [[child.ask()["loss"] for child in children] for _ in range(2)]
    for child in children:
        child.close()
    for plain, fast in losses:
        assert fast == pytest.approx(plain, rel=1e-5)
    assert losses[0] != losses[1], "the weights have moved"


def taken(*, bf16: bool) -> list[float]:
    """Losses of some steps, as `step.serve` takes them, of the same recipe with smaller heads."""
    torch.manual_seed(0)
    ours = step.Ours(RECIPE, CROP, checkpointing=False)
    images = torch.rand(2, 1, 1, CROP, CROP, CROP)
    views = Views(images[0], images[1], torch.arange(1), torch.zeros(1))
    with engine.flushed_denormals():
        return [ours.step(views, number, bf16=bf16) for number in range(STEPS)]


fast = functools.cache(taken)


IN_BF16 = [("matrices cast once", 1e-5), ("fused MLP", 2e-3)]  # float32 casts nothing; the kernel rounds less
CASES = [
    *((name, 1e-5, False) for name in step.RUNGS if name != "matrices cast once"),
    *((*one, True) for one in IN_BF16),
]


@pytest.mark.parametrize(("name", "within", "bf16"), CASES)
def test_a_step_without_one_part_comes_to_the_same_losses(
    name: str, within: float, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDS_KERNEL and kernel.library() is None:
        pytest.skip("the kernel was not compiled here")
    if (name, bf16) == ("fused MLP", True) and not kernel.has_tiles():
        pytest.skip("no AMX here")
    expected = fast(bf16=bf16)
    calls: dict[str, int] = {}

    def put(owner: Any, attribute: str, value: Any) -> None:
        monkeypatch.setattr(owner, attribute, counted(value, attribute) if callable(value) else value)

    def counted(value: Callable[..., Any], attribute: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[attribute] += 1
            return value(*args, **options)

        calls[attribute] = 0
        return call

    step.RUNGS[name](put)
    assert taken(bf16=bf16) == pytest.approx(expected, rel=within)
    assert all(calls.values()), f"nothing called what stands in place of a part: {calls}"
