"""The run folder: settings kept, metrics rewound, a changed run refused."""

from pathlib import Path

import pytest

from dagman.config import from_dict
from dagman.ct.datasets import DataConfig
from dagman.errors import DagmanError, ExitCode
from dagman.run import Run


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    run, settings = Run(tmp_path / "run"), DataConfig(crop=(64, 64, 96), flip_ratio=0.25)
    run.start(settings, {"store": "a", "volumes": 3}, 1)
    assert from_dict(DataConfig, run.config()) == settings
    run.start(settings, {"store": "a", "volumes": 3}, 1)
    assert run.environment()["data"] == {"store": "a", "volumes": 3}
    assert run.environment()["versions"]["torch"]


def test_what_decides_the_bits_of_the_rest_is_told_where_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run")
    run.start(DataConfig(), {"store": "a"}, 1, "compiled")
    run.start(DataConfig(), {"store": "a"}, 1, "compiled")
    assert not run.log_file.exists()
    run.start(DataConfig(), {"store": "a"}, 1, "PyTorch alone")
    monkeypatch.setattr("dagman.run._git_commit", lambda: "another")
    run.start(DataConfig(), {"store": "a"}, 1, "PyTorch alone")
    told = run.log_file.read_text()
    assert "environment changed, kernels: compiled -> PyTorch alone: the rest need not be bit-equal" in told
    assert "-> another: the rest" in told
    assert told.count("environment changed") == 2


def test_a_changed_setting_store_or_number_of_devices_is_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.start(DataConfig(), {"store": "a"}, 1)
    before = run.config_file.read_bytes(), run.environment_file.read_bytes()
    for settings, data, devices, line in (
        (DataConfig(flip_ratio=0.5), {"store": "a"}, 1, "flip_ratio: 0.0 -> 0.5"),
        (DataConfig(), {"store": "b"}, 1, "data_store.store: a -> b"),
        (DataConfig(), {"store": "a"}, 2, "devices: 1 -> 2"),
    ):
        with pytest.raises(DagmanError, match=line) as caught:
            run.start(settings, data, devices)
        assert caught.value.exit_code is ExitCode.REFUSED
    assert (run.config_file.read_bytes(), run.environment_file.read_bytes()) == before


def test_a_damaged_environment_is_one_line(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.start(DataConfig(), {"store": "a"}, 1)
    run.environment_file.write_text("")
    with pytest.raises(DagmanError, match=r"E-RESUME .*environment.json: is damaged") as caught:
        run.start(DataConfig(), {"store": "a"}, 1)
    assert caught.value.exit_code is ExitCode.REFUSED


def test_rewinding_drops_later_rows_and_a_torn_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for step in (1, 2, 3):
        run.add({"step": step, "total": 0.1 * step, "none": None}, durable=step == 3)
    with run.metrics_file.open("a") as stream:
        stream.write('{"step": 4, "tot')
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    first_two = b"".join(run.metrics_file.read_bytes().splitlines(keepends=True)[:2])
    assert [row["step"] for row in run.rewind(2)] == [1, 2]
    assert run.metrics_file.read_bytes() == first_two


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DagmanError, match=r"config\.yaml"):
        Run(tmp_path).config()
    assert Run(tmp_path).metrics() == []
    assert Run(tmp_path).environment() == {}
