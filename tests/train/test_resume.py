"""Interrupted equals uninterrupted, bit for bit: the rows of the metrics, the weights, the whole state."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_run import small, write_store

from dagman import files
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.run import TIMING, Run
from dagman.train import engine, job
from dagman.train.pretrain import PretrainConfig, Result, pretrain

pytestmark = pytest.mark.usefixtures("few_examined", "undrawn")


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without what depends on the clock."""
    return [{key: value for key, value in row.items() if key not in TIMING} for row in Run(folder).metrics()]


def final_state(folder: Path) -> dict[str, str]:
    """Hashes of the encoders and of the last checkpoint: student, teacher, heads, centers, moments."""
    last = max((folder / "checkpoints").iterdir())
    paths = [folder / "weights" / "model.safetensors", folder / "weights" / "student.safetensors"]
    return {path.name: files.sha256_file(path) for path in [*paths, last / "state.safetensors"]}


class StopAfter:
    """Asks for a stop while a given step is recorded, as a scheduler would: by a signal."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_start(self, step: int, total_steps: int) -> None:
        self.on_step({"step": step})

    def on_message(self, text: str) -> None: ...

    def on_step(self, row: Mapping[str, Any]) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), self.number)


def interrupted(config: PretrainConfig, store: PreparedStore, folder: Path, *stops: int, **how: Any) -> Result:
    """A run that is stopped after each of the steps and started again, with fresh objects every time."""
    for stop in stops:
        # The signal comes with the row before, or at the start: one more step ends.
        result = pretrain(config, store, folder, listeners=[StopAfter(stop - 1)], **how)
        assert (result.status, result.step) == ("stopped", stop)
    return pretrain(config, store, folder, **how)


@pytest.fixture(scope="module")
def whole(store: PreparedStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert pretrain(small(), store, folder).status == "finished"
    return folder


def test_a_run_stopped_after_every_single_step_equals_one_that_was_not(
    store: PreparedStore, whole: Path, tmp_path: Path
) -> None:
    assert interrupted(small(), store, tmp_path / "run", 1, 2, 3, 4, 5).step == 6
    assert rows(tmp_path / "run") == rows(whole)
    assert final_state(tmp_path / "run") == final_state(whole)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16", "steps": 3}, {"accumulate": 2, "batch_size": 2, "steps": 3}],
    ids=["bf16", "accumulated"],
)
def test_the_same_in_bf16_and_with_accumulation(store: PreparedStore, tmp_path: Path, changes: dict[str, Any]) -> None:
    config = small(**changes)
    pretrain(config, store, tmp_path / "whole")
    interrupted(config, store, tmp_path / "run", 1, 2)
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")


def test_a_stop_while_the_last_row_is_recorded_is_told_to_whoever_has_more_runs(
    store: PreparedStore, tmp_path: Path
) -> None:
    short = small(steps=1)
    ended = pretrain(short, store, tmp_path, listeners=[StopAfter(1, signal.SIGINT)])
    assert (ended.status, ended.step, ended.stop_asked) == ("finished", 1, True)
    again = pretrain(short, store, tmp_path)
    assert (again.status, again.stop_asked) == ("complete", False)


def test_a_stop_during_a_checkpoint_or_an_examination_needs_no_further_step(
    store: PreparedStore, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("dagman.train.pretrain.draw_crops", lambda *_: signal.raise_signal(signal.SIGTERM))
        ended = pretrain(small(), store, tmp_path, checkpoint_every=2)
    assert (ended.status, ended.step, ended.stop_asked) == ("stopped", 1, True)
    ended = pretrain(small(), store, tmp_path, checkpoint_every=2, listeners=[StopAfter(2)])
    assert (ended.status, ended.step) == ("stopped", 2)
    assert pretrain(small(), store, tmp_path, checkpoint_every=2).status == "finished"
    assert rows(tmp_path) == rows(whole)
    assert final_state(tmp_path) == final_state(whole)


def test_a_signal_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with engine.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted
    with engine.StopRequest(aloud=False):
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == "stopping at the end of this step\n"


@pytest.mark.parametrize("stop", [True, False])
def test_an_error_tells_whether_a_stop_was_asked_for_before_it(stop: bool) -> None:
    def diverge() -> None:
        with engine.StopRequest(aloud=False):
            if stop:
                signal.raise_signal(signal.SIGINT)
            raise DagmanError("UNHEALTHY", "run", "diverged", "lower the rate")

    with pytest.raises(DagmanError) as caught:
        diverge()
    assert caught.value.stop_asked is stop


SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from small_run import small
from dagman.ct.store import PreparedStore
from dagman.train import pretrain
pretrain.EXAMINED = 8
pretrain.draw = pretrain.draw_crops = lambda *_: None
result = pretrain.pretrain(small(), PreparedStore(Path(sys.argv[1])), Path(sys.argv[2]), checkpoint_every=2)
sys.exit(75 if result.status == "stopped" else 0)
"""


def start(store: PreparedStore, folder: Path, fault: str = "") -> subprocess.Popen[bytes]:
    environment = os.environ | {"DAGMAN_FAULT": fault, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(store.folder), str(folder), str(Path(__file__).parent)]
    return subprocess.Popen(command, env=environment)


def wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while len(Run(folder).metrics()) < step:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_process_killed_at_once_goes_on_from_its_checkpoint(
    store: PreparedStore, whole: Path, tmp_path: Path
) -> None:
    process = start(store, tmp_path / "run")
    wait_for_step(tmp_path / "run", 3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert "step-00000002" in before
    assert pretrain(small(), store, tmp_path / "run", checkpoint_every=2).status == "finished"
    assert "goes on after step" in (tmp_path / "run" / "log.txt").read_text()
    assert rows(tmp_path / "run") == rows(whole)
    assert final_state(tmp_path / "run") == final_state(whole)


def test_a_process_asked_to_stop_returns_75_and_continues_in_another(
    store: PreparedStore, whole: Path, tmp_path: Path
) -> None:
    process = start(store, tmp_path / "run")
    wait_for_step(tmp_path / "run", 1)
    process.terminate()
    assert process.wait(60) == ExitCode.STOPPED
    done = len(rows(tmp_path / "run"))
    assert 1 < done < 6
    assert (tmp_path / "run" / "checkpoints" / f"step-{done:08d}" / "manifest.json").exists()
    assert start(store, tmp_path / "run").wait(60) == 0
    assert rows(tmp_path / "run") == rows(whole)
    assert final_state(tmp_path / "run") == final_state(whole)


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(
    store: PreparedStore, whole: Path, tmp_path: Path
) -> None:
    pretrain(small(), store, tmp_path / "run", checkpoint_every=4)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000] + bytes(1000))
    assert pretrain(small(), store, tmp_path / "run", checkpoint_every=4).status == "finished"
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "checkpoint step-00000006 is damaged: state.safetensors is not what was written" in log
    assert "goes on after step 4; 2 later steps are done again" in log
    assert rows(tmp_path / "run") == rows(whole)
    assert final_state(tmp_path / "run") == final_state(whole)


def test_a_finished_run_says_so_and_changes_nothing(store: PreparedStore, whole: Path) -> None:
    before = final_state(whole), rows(whole), len(list((whole / "checkpoints").iterdir()))
    assert pretrain(small(), store, whole).status == "complete"
    assert (final_state(whole), rows(whole), len(list((whole / "checkpoints").iterdir()))) == before
    assert "already complete: 6 of 6 steps" in (whole / "log.txt").read_text()


def test_a_finished_run_writes_again_what_it_lost(store: PreparedStore, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    weights = tmp_path / "run" / "weights"
    for name in ("model.safetensors", "student.safetensors", "config.json"):
        before = (weights / name).read_bytes()
        (weights / name).unlink()
        (tmp_path / "run" / "progress.png").unlink(missing_ok=True)
        assert pretrain(small(), store, tmp_path / "run").status == "complete"
        assert (weights / name).read_bytes() == before
    assert (tmp_path / "run" / "progress.png").read_bytes().startswith(b"\x89PNG")


def test_a_signal_that_ended_those_who_read_too_is_a_stop(
    store: PreparedStore, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = engine.batches

    def batches(*what: Any, **how: Any) -> Iterator[Any]:
        source = begun(*what, **how)
        yield from (next(source) for _ in range(3))
        os.kill(os.getpid(), signal.SIGTERM)
        raise DagmanError("READER", "data", "reading stopped", "see", exit_code=ExitCode.STOPPED)

    monkeypatch.setattr(engine, "batches", batches)
    ended = pretrain(small(), store, tmp_path / "run")
    assert (ended.status, ended.step, ended.stop_asked) == ("stopped", 3, True)
    monkeypatch.undo()
    pretrain(small(), store, tmp_path / "run")
    assert final_state(tmp_path / "run") == final_state(whole)


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("optimisation.steps: 6 -> 12", {"steps": 12}),
        ("optimisation.learning_rate: 0.001 -> 0.002", {"learning_rate": 2e-3}),
        ("optimisation.seed: 0 -> 1", {"seed": 1}),
        ("optimisation.batch_size: 1 -> 2", {"batch_size": 2}),
    ],
)
def test_changed_settings_are_refused_with_the_difference(
    store: PreparedStore, whole: Path, field: str, changed: dict[str, Any]
) -> None:
    with pytest.raises(DagmanError, match="E-RESUME") as caught:
        pretrain(small(**changed), store, whole)
    assert caught.value.exit_code is ExitCode.REFUSED
    assert field in str(caught.value)
    assert "another output folder" in caught.value.advice
    assert "--fresh" in caught.value.advice


def test_how_often_a_run_is_examined_changes_nothing_else_and_may_change(
    store: PreparedStore, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("dagman.train.pretrain.draw_crops", lambda _, step, *__: drawn.append(step + 1))
    interrupted = pretrain(small(examine_every=2), store, tmp_path, listeners=[StopAfter(3)])
    assert (interrupted.status, interrupted.step) == ("stopped", 4)
    assert pretrain(small(examine_every=5), store, tmp_path).status == "finished"
    assert Run(tmp_path).config()["optimisation"]["examine_every"] == 5
    found, expected = rows(tmp_path), rows(whole)
    looked = set(expected[0]) - set(expected[1])
    assert [row["step"] for row in found if looked & row.keys()] == drawn == [1, 2, 4, 5, 6]
    shared = [[{name: row[name] for name in row if name not in looked} for row in both] for both in (found, expected)]
    assert shared[0] == shared[1]
    assert final_state(tmp_path) == final_state(whole)


def test_a_run_from_before_a_setting_that_is_free_goes_on(store: PreparedStore, whole: Path, tmp_path: Path) -> None:
    pretrain(small(), store, tmp_path, listeners=[StopAfter(0)])
    written = Run(tmp_path).config_file
    lines = written.read_text().splitlines(keepends=True)
    written.write_text("".join(line for line in lines if "examine_every" not in line))
    assert pretrain(small(), store, tmp_path).status == "finished"
    assert final_state(tmp_path) == final_state(whole)


def test_other_data_and_another_network_are_refused(store: PreparedStore, whole: Path, tmp_path: Path) -> None:
    config = small()
    with pytest.raises(DagmanError, match=r"encoder.drop_path: 0.1 -> 0.2"):
        pretrain(replace(config, encoder=replace(config.encoder, drop_path=0.2)), store, whole)
    with pytest.raises(DagmanError, match=r"data_store\.store: .*data_store.volumes: 4 -> 3"):
        pretrain(config, write_store(tmp_path / "other", [None] * 3), whole)


def test_two_at_once_in_one_folder_the_second_is_told(store: PreparedStore, tmp_path: Path) -> None:
    with files.folder_lock(tmp_path / "run"), pytest.raises(DagmanError, match="E-LOCKED"):
        pretrain(small(), store, tmp_path / "run")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_every_rank_counts_the_steps_skipped_before_the_checkpoint(store: PreparedStore, tmp_path: Path) -> None:
    """The first rank drops the later rows from the file, before or after the others have read it."""
    begun = job.prepare(small(), store, Run(tmp_path), engine.fabric(1, "float32", "cpu"), listeners=(), keep=2)
    job.save(begun, 4)
    for step in range(1, 6):
        begun.run.add({"step": step, "skipped": step - 1, "skipped_in_a_row": step - 1}, durable=True)
    for first in (False, True, False):
        begun.fabric = SimpleNamespace(is_global_zero=first, barrier=lambda: None)  # type: ignore[assignment]
        assert job.resume(begun) == 4
        assert (begun.skipped, begun.skipped_in_a_row) == (3, 3)


def test_workers_change_no_row(store: PreparedStore, whole: Path, tmp_path: Path) -> None:
    pretrain(small(), store, tmp_path / "run", workers=2)
    assert rows(tmp_path / "run") == rows(whole)
    assert final_state(tmp_path / "run") == final_state(whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it compiles")
def test_where_nothing_can_be_compiled_the_log_says_so_and_no_row_changes(
    store: PreparedStore, whole: Path, tmp_path: Path
) -> None:
    assert pretrain(small(), store, tmp_path, compiled=True).status == "finished"
    assert rows(tmp_path) == rows(whole)
    log = (tmp_path / "log.txt").read_text()
    # what is measured before it is of other sizes, which would be compiled for nothing
    assert log.index("s a step") < log.index("nothing is compiled: cpu is no CUDA device")


def test_the_folder_holds_what_other_verbs_read(whole: Path) -> None:
    run = Run(whole)
    assert run.config()["optimisation"]["steps"] == 6
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    wanted = {"total", "amip", "ampd", "aitd", "gitd", "learning_rate", "weight_decay", "momentum", "grad_norm"}
    wanted |= {"class_temperature", "patch_temperature", "aitd_teacher_entropy", "pooled_spread", "skipped", *TIMING}
    assert wanted <= set(run.metrics()[0])
    environment = run.environment()
    assert environment["versions"]["threads"] == 1
    assert environment["data"]["volumes"] == 4
    assert run.progress_file.read_bytes().startswith(b"\x89PNG")
    assert [picture.name for picture in sorted(run.pictures.iterdir())] == ["step-00000001.png", "step-00000006.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in run.pictures.iterdir())
    card = json.loads((run.weights / "config.json").read_text())
    assert (card["recipe"], card["role"], card["steps"]) == ("small", "teacher", 6)
    assert card["preparation"] == {
        "spacing_mm": 2.0,
        "orientation": "RAS",
        "resampling": "antialiased",
        "window_hu": [-175.0, 250.0],
        "crop": [32, 32, 64],
    }
    assert list(run.tensorboard.iterdir())
