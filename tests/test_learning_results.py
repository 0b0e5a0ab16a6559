"""Results of `benchmarks/learning_curve.py`: what is there is not made again, and nothing else passes for it."""

import json
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dagman import config, recipes
from dagman.train.settings import PretrainConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import learning_curve
import learning_methods
import learning_probes

RESULTS = Path(learning_curve.__file__).parent / "results" / "learning"
AT = [100, 300, 600]
"""Of the command in docs/learning.md."""


def recipe(name: str, steps: int, seed: int) -> PretrainConfig:
    return config.override(recipes.with_length(recipes.get(name), steps, None), {"optimisation.seed": seed})


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_runs_of_the_docs_are_not_made_again(seed: int) -> None:
    chosen = recipe("dagman-tiny", 1000, seed)
    path, wanted = RESULTS / f"real-tiny-seed{seed}.json", learning_curve.about("tiny", "real", seed, chosen)
    assert learning_curve.is_done(path, wanted, chosen, AT)
    assert not learning_curve.is_done(path, wanted, chosen, [*AT, 700]), "it was not asked there"
    often = replace(chosen, optimisation=replace(chosen.optimisation, examine_every=7))
    assert learning_curve.is_done(path, learning_curve.about("tiny", "real", seed, often), often, AT), "decides nothing"
    faster = config.override(chosen, {"optimisation.learning_rate": 1e-3})
    with pytest.raises(SystemExit, match=r"learning_rate: 0\.0005 -> 0\.001"):
        learning_curve.is_done(path, learning_curve.about("tiny", "real", seed, faster), faster, AT)
    with pytest.raises(SystemExit, match="half: False -> True"):
        learning_curve.is_done(path, learning_curve.about("tiny", "real", seed, chosen, half=True), chosen, AT)
    assert not learning_curve.is_done(path.with_name("none.json"), wanted, chosen, AT)


def test_of_the_methods_what_is_missing_alone_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no work but the child processes left out: none is started where all results are there."""
    for path in RESULTS.glob("real-*-tiny-seed*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "real-mst-vit-tiny-seed1.json").unlink()
    started: list[str] = []
    monkeypatch.setattr(learning_methods.subprocess, "run", lambda command, check: started.append(" ".join(command)))
    folders = ["--work", str(tmp_path), "--data", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["learning_methods.py", *folders])
    learning_methods.main()
    (only,) = started
    assert "--name mst-vit-tiny --recipe mst-vit-tiny --seed 1 --steps 300" in only


def test_results_name_what_they_are() -> None:
    for path in RESULTS.glob("*.json"):
        found = json.loads(path.read_text())
        assert path.stem == f"{found['corpus']}-{found['name']}-seed{found['seed']}"


def test_an_interval_over_three_seeds_is_as_wide_as_students_t_says() -> None:
    scores = [0.70, 0.74, 0.72]
    wide, error = statistics.stdev(scores) / 3**0.5, 1.959964 * statistics.stdev(scores) / 3**0.5
    low, high = learning_probes.by_t(0.22, (0.22 - error, 0.22 + error), [scores, [0.5]])
    assert (0.22 - low) / wide == pytest.approx(4.302653)
    assert (high - 0.22) / wide == pytest.approx(4.302653)
    assert learning_probes.by_t(0.2, (0.1, 0.4), [[0.7], [0.5]]) == pytest.approx((0.1, 0.4))


@pytest.mark.parametrize("path", sorted(RESULTS.glob("real-*-tiny-1000-seed*.json")), ids=lambda path: path.stem)
def test_heads_of_every_place_are_measured(path: Path) -> None:
    found = json.loads(path.read_text())
    encoder = found["config"]["encoder"]
    places = encoder["depth"] if encoder["kind"] == "vit" else 4 + bool(encoder["attention"])
    assert {len(probe["heads"]) for probe in found["probes"]} == {places}
