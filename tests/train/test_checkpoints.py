"""A damaged checkpoint is noticed and the one before it taken; a run never silently starts again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dagman.errors import DagmanError, ExitCode
from dagman.train import checkpoints, engine


def network(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    module.register_buffer("center", torch.zeros(4))
    return module, engine.adamw(module)


def learn(module: torch.nn.Module, optimizer: torch.optim.AdamW, step: int) -> None:
    engine.set_rates(optimizer, 0.1, 0.1)
    module(torch.full((2, 3), float(step))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def rename_the_step(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"step": 1}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda path: flip_a_bit(path / "state.safetensors"),
    "truncated": lambda path: (path / "state.safetensors").write_bytes((path / "state.safetensors").read_bytes()[:-9]),
    "zero bytes": lambda path: (path / "state.safetensors").write_bytes(b""),
    "missing": lambda path: (path / "state.safetensors").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "torn manifest": lambda path: (path / "manifest.json").write_text('{"format": 1, "st'),
    "manifest is a list": lambda path: (path / "manifest.json").write_text("[1]"),
    "manifest of another step": lambda path: rename_the_step(path / "manifest.json"),
    "tensors of another step": lambda path: (path / "state.safetensors").write_bytes(
        (path.with_name("step-00000001") / "state.safetensors").read_bytes()
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    module, optimizer = network()
    for step in (1, 2):
        learn(module, optimizer, step)
        checkpoints.save(tmp_path, step, checkpoints.state(module, optimizer), "run", keep=2)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder / "step-00000002")
    found = checkpoints.newest(folder, "run")
    assert found is not None
    assert found.step == 1
    assert len(found.damaged) == 1
    assert found.damaged[0].startswith("step-00000002 ")


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "another" not in name])
def test_where_all_are_damaged_the_run_is_refused(folder: Path, damage: str) -> None:
    for path in list(folder.iterdir()):
        DAMAGES[damage](path)
    with pytest.raises(DagmanError, match="E-CHECKPOINT") as caught:
        checkpoints.newest(folder, "run")
    assert caught.value.exit_code is ExitCode.REFUSED
    assert "step-00000001" in caught.value.problem


def test_a_checkpoint_of_another_run_is_refused(folder: Path) -> None:
    with pytest.raises(DagmanError, match="another run"):
        checkpoints.newest(folder, "other")


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "none", "run") is None


@pytest.mark.parametrize("point", ["file.before_replace", "folder.before_replace"])
def test_a_failed_write_leaves_the_older_checkpoints(folder: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagman import files

    module, optimizer = network()
    monkeypatch.setenv("DAGMAN_FAULT", f"{point}:1:enospc")
    monkeypatch.setattr(files, "_faults_seen", {})
    with pytest.raises(DagmanError, match="E-DISK"):
        checkpoints.save(folder, 3, checkpoints.state(module, optimizer), "run", keep=2)
    found = checkpoints.newest(folder, "run")
    assert found is not None
    assert (found.step, found.damaged) == (2, ())


def test_only_the_newest_are_kept(folder: Path) -> None:
    module, optimizer = network()
    for step in range(3, 8):
        checkpoints.save(folder, step, checkpoints.state(module, optimizer), "run", keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000006", "step-00000007"]


def test_later_checkpoints_that_are_done_again_make_way(folder: Path) -> None:
    """Where the newest was damaged, a run goes on before it: what it writes is not what is deleted."""
    module, optimizer = network()
    for step in (3, 4):
        checkpoints.save(folder, step, checkpoints.state(module, optimizer), "run", keep=4)
    for step in (3, 4):
        flip_a_bit(folder / f"step-0000000{step}" / "state.safetensors")
    assert checkpoints.newest(folder, "run").step == 2  # type: ignore[union-attr]
    written = checkpoints.save(folder, 2, checkpoints.state(module, optimizer), "run", keep=1)
    assert [path.name for path in folder.iterdir()] == [written.name]
    assert checkpoints.newest(folder, "run").step == 2  # type: ignore[union-attr]


def test_a_copy_beside_them_is_no_checkpoint_and_is_not_deleted(folder: Path) -> None:
    copy = shutil.copytree(folder / "step-00000002", folder / "step-00000002-best")
    module, optimizer = network()
    for step in (3, 4):
        checkpoints.save(folder, step, checkpoints.state(module, optimizer), "run", keep=2)
    assert checkpoints.last_step(folder) == 4
    assert copy.is_dir()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002-best", "step-00000003", "step-00000004"]


def test_what_is_restored_goes_on_as_what_was_saved(folder: Path) -> None:
    module, optimizer = network()
    for step in (1, 2, 3):
        learn(module, optimizer, step)
    again, its_optimizer = network(seed=1)
    found = checkpoints.newest(folder, "run")
    assert found is not None
    checkpoints.restore(found.tensors, again, its_optimizer)
    learn(again, its_optimizer, 3)
    expected, actual = checkpoints.state(module, optimizer), checkpoints.state(again, its_optimizer)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert {name for name in expected if name.startswith("optimizer.")} == {
        f"optimizer.{word}.{name}"
        for word in ("step", "exp_avg", "exp_avg_sq")
        for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    }


def test_weight_decay_spares_biases_norms_tokens_and_tables() -> None:
    from small_run import small

    from dagman.nets.swin import SwinEncoder

    optimizer = engine.adamw(SwinEncoder(small().encoder))
    engine.set_rates(optimizer, 1.0, 0.5)
    decayed, spared = (set(group["param_names"]) for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert all(name.endswith("weight") for name in decayed)
    assert {"hidden_token", "semantic_attention.cls_token"} <= spared
    assert sum(name.endswith("table") for name in spared) == 8
    assert not any("norm" in name for name in decayed)
