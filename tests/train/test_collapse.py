"""Collapses forced on running trainings ring by name within 50 steps, on the paper's centering and on `dagman-tiny`."""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small

from dagman import cli, config, recipes
from dagman.ct.datasets import DataConfig
from dagman.ct.store import PreparedStore
from dagman.errors import ExitCode
from dagman.pretext.codistill import CoDistillation
from dagman.run import Run
from dagman.train.pretrain import PretrainConfig, pretrain

pytestmark = pytest.mark.usefixtures("few_examined", "undrawn")

ALL = {"aitd", "ampd", "gitd"}
STEPS = 51
"""The first is well; the others are within 50 of the onset."""


@torch.no_grad()
def constant_teacher(model: CoDistillation) -> None:
    for head in model.teacher.heads.values():
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.fill_(1)


@torch.no_grad()
def uniform_teacher(model: CoDistillation) -> None:
    for head in model.teacher.heads.values():
        head.prototypes.copy_(head.prototypes[:1].expand_as(head.prototypes))


@torch.no_grad()
def dead_head(model: CoDistillation) -> None:
    for head in model.student.heads.values():
        head.layers[0].weight.zero_()
        head.layers[0].bias.zero_()
        head.layers[-1].bias.fill_(1)


@torch.no_grad()
def runaway_center(model: CoDistillation) -> None:
    for name in model.student.heads:
        model.center(name).add_(0.5).mul_(1.5)


@pytest.fixture(
    params=[
        (constant_teacher, "teacher constant"),
        (uniform_teacher, "teacher uniform"),
        (dead_head, "head dead"),
        (runaway_center, "center runaway"),
    ],
    ids=lambda param: param[0].__name__,
)
def named(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Breaks the model after each step; the name of what must ring."""
    force, name = request.param
    update = CoDistillation.update_teacher

    def then_break(self: CoDistillation, momentum: float) -> None:
        update(self, momentum)
        force(self)

    monkeypatch.setattr(CoDistillation, "update_teacher", then_break)
    return str(name)


class HeardError(Exception):
    """All that was listened for."""


class Listening:
    """Notes of which terms an alarm rings, and ends the run when it has rung of all that it should."""

    def __init__(self, named: str, wanted: set[str]) -> None:
        self.start, self.wanted, self.terms = f"ALARM {named}: ", wanted, set[str]()

    def on_start(self, step: int, total_steps: int) -> None: ...

    def on_message(self, text: str) -> None:
        if text.startswith(self.start):
            self.terms.add(text.removeprefix(self.start).split("_")[0])

    def on_step(self, row: Mapping[str, Any]) -> None:
        if self.terms >= self.wanted:
            raise HeardError


def rang(recipe: PretrainConfig, named: str, store: PreparedStore, folder: Path, wanted: set[str] = ALL) -> set[str]:
    """The terms of which that alarm rings in a run."""
    listening = Listening(named, wanted)
    with contextlib.suppress(HeardError):
        pretrain(recipe, store, folder, device="cpu", listeners=[listening])
    return listening.terms


def small_crops(**changes: Any) -> PretrainConfig:
    return replace(small(learning_rate=1e-4, **changes), data=DataConfig(crop=(32, 32, 32)))


def test_a_forced_collapse_rings_on_centering(named: str, store: PreparedStore, tmp_path: Path) -> None:
    assert rang(small_crops(steps=STEPS), named, store, tmp_path / "run") == ALL


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_forced_collapse_rings_on_dagman_tiny(named: str, store: PreparedStore, tmp_path: Path) -> None:
    """Its own encoder and method: balanced targets, a center for each place, every second view left whole.

    Balancing takes a center that all rows share away, so that one that ran away does nothing.
    """
    acting = {"ampd"} if named == "center runaway" else ALL
    recipe = recipes.with_length(recipes.get("dagman-tiny"), STEPS, None)
    few = config.override(recipe, {"optimisation.batch_size": 2, "data.pairs_per_volume": 2})
    assert rang(few, named, store, tmp_path / "run", acting) == acting
    assert "aitd_center_size" not in Run(tmp_path / "run").metrics()[-1]


@torch.no_grad()
def blind(model: CoDistillation) -> None:
    for network in (model.student, model.teacher):
        network.encoder.patch_embed.proj.weight.zero_()
        network.encoder.patch_embed.proj.bias.zero_()


def test_a_run_that_ends_collapsed_is_written_and_ends_with_7(
    store: PreparedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    update = CoDistillation.update_teacher

    def then_blind(self: CoDistillation, momentum: float) -> None:
        update(self, momentum)
        blind(self)

    monkeypatch.setattr(CoDistillation, "update_teacher", then_blind)
    sizes = ["--encoder.embed-dim", "12", "--encoder.depths", "1,1,1,1", "--optimisation.batch-size", "2"]
    sizes += ["--encoder.hidden-token", "zero", "--encoder.drop-path", "0", "--method.heads.num-prototypes", "64"]
    command = ["pretrain", "dagman-tiny", *sizes, "--data", store.folder, "-o", tmp_path / "run", "--steps", "23"]
    for _ in range(2):  # the second time it is complete
        assert cli.run(list(map(str, command))) == ExitCode.UNHEALTHY
        assert "E-UNHEALTHY" in (said := capsys.readouterr().err), said
        assert "features that are the same of everything" in said
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "ALARM features collapsed" in log
    assert "finished 23 steps; still wrong at the end: features collapsed" in log
    assert (tmp_path / "run" / "weights" / "model.safetensors").is_file()


def test_a_short_healthy_run_rings_nothing(store: PreparedStore, tmp_path: Path) -> None:
    pretrain(small(steps=22, learning_rate=1e-4), store, tmp_path / "run")
    assert "ALARM" not in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_healthy_seeds_ring_nothing(seed: int, store: PreparedStore, tmp_path: Path) -> None:
    """As long as a forced collapse takes to ring.

    Alarms that wait for step 100 or the second half cannot ring here: `test_health.py` shows them whole healthy runs of
    `dagman-tiny` as they were recorded, and `test_learning.py` a live one, on phantoms.
    """
    pretrain(small_crops(steps=52, batch_size=4, seed=seed), store, tmp_path / "run")
    assert "ALARM" not in (tmp_path / "run" / "log.txt").read_text()
