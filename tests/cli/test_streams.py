"""Standard streams that are closed, full or no longer read, and stops before the work."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dagman.ct.store import PreparedStore
from dagman.errors import ExitCode

sys.path.append(str(Path(__file__).parents[1] / "corpus"))
from make_corpus import FILES

DAGMAN = f"{sys.executable} -m dagman"
STOPPED = "stopped; run the same command again\n"
HEARD = "signal.signal(signal.SIGINT, signal.default_int_handler)"
"""Where the tests run in the background, Ctrl-C is ignored by what they start."""


def shell(command, *, environment=None):
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def scan(tmp_path):
    path = tmp_path / "good.nii.gz"
    FILES[path.name][1](path)
    return path


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk_under_standard_output_is_one_line(buffered):
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    result = shell(f"{DAGMAN} --help > /dev/full", environment=environment)
    assert result.returncode == ExitCode.RESOURCES
    assert result.stderr.startswith("E-DISK standard output: cannot be written (No space left on device); ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", "2> /dev/full", "2>&1 | true"])
def test_work_goes_on_in_silence(closed, scan, tmp_path):
    """Also where a reader leaves, as in `dagman pretrain ... 2>&1 | grep -m1 WORD`."""
    command, _, reader = closed.partition("|")
    work = f"{DAGMAN} prepare -i {scan} -o {tmp_path}/store --workers 1 {command}"
    shell(f"({work}; echo $? > {tmp_path}/code) | {reader or 'cat'}")
    assert int((tmp_path / "code").read_text()) == ExitCode.OK
    assert len(PreparedStore(tmp_path / "store")) == 1


@pytest.mark.parametrize("closed", ["2>&-", "2> /dev/full"])
def test_what_is_printed_needs_no_standard_error(closed, scan):
    result = shell(f"{DAGMAN} check {scan} {closed}")
    assert result.returncode == ExitCode.OK
    assert result.stdout.startswith("good: nifti, ")
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("buffered", ["", "1"])
def test_whoever_stops_reading_what_is_printed_changes_no_exit_code(buffered, scan, tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(scan.read_bytes()[:5000])
    environment = os.environ | {"PYTHONUNBUFFERED": buffered}
    shell(f"({DAGMAN} check {tmp_path} 2> {tmp_path}/said; echo $? > {tmp_path}/code) | true", environment=environment)
    assert int((tmp_path / "code").read_text()) == ExitCode.REJECTED
    assert "Pipe" not in (tmp_path / "said").read_text()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("start", ["module", "script"])
def test_a_stop_while_modules_are_imported_is_one_line(name, start, tmp_path):
    (tmp_path / "cyclopts.py").write_text(f"import signal\n{HEARD}\nsignal.raise_signal(signal.{name})")
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, function = pyproject["project"]["scripts"]["dagman"].split(":")
    script = ["-c", f"from {module} import {function}; {function}()"] if start == "script" else ["-m", "dagman"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *script, "info", "dagman-tiny"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (result.returncode, result.stderr) == (ExitCode.STOPPED, STOPPED)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_while_a_training_begins_anew_is_one_line(name, tmp_path):
    """The interpreter that takes its place has no handlers yet."""
    second = f"import os, signal\n{HEARD}\nif 'MALLOC_TOP_PAD_' in os.environ:\n    signal.raise_signal(signal.{name})"
    (tmp_path / "sitecustomize.py").write_text(second)
    bare = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    bare["PYTHONPATH"] = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "dagman", "pretrain", "dagman-tiny", "--data", tmp_path, "-o", tmp_path / "run"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=bare)
    assert (result.returncode, result.stderr) == (ExitCode.STOPPED, STOPPED)
