"""Atomic writes, logs, locks and coded errors."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dagman import files
from dagman.ct.prepare import prepare
from dagman.ct.store import PreparedStore, refuse_inside
from dagman.errors import DagmanError, ExitCode
from dagman.nets.weights import read_tensors


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setenv("DAGMAN_FAULT", "file.before_replace:1:enospc")
    monkeypatch.setattr(files, "_faults_seen", {})
    with pytest.raises(DagmanError, match="E-DISK") as caught:
        files.write_json(path, {"a": 2})
    assert caught.value.exit_code is ExitCode.RESOURCES
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("point", ["file.before_fsync", "file.before_replace", "file.after_replace"])
def test_a_kill_at_any_point_of_a_write_leaves_a_whole_file(tmp_path: Path, point: str) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})
    script = f"from dagman import files; from pathlib import Path; files.write_json(Path({str(path)!r}), {{'a': 2}})"
    environment = os.environ | {"DAGMAN_FAULT": f"{point}:1:kill"}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == -9
    assert json.loads(path.read_text()) == ({"a": 2} if point == "file.after_replace" else {"a": 1})


def test_safetensors_are_read_by_whom_the_umask_lets_and_a_full_disk_is_one(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(100_000)}
    path = tmp_path / "a.safetensors"
    before = os.umask(0o027)
    try:
        files.write_atomic(path, lambda temporary: save_file(tensors, temporary))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    script = (
        "import resource, signal, torch; from pathlib import Path; from safetensors.torch import save_file\n"
        "from dagman import files\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        f"files.write_atomic(Path({str(tmp_path / 'b.safetensors')!r}), "
        "lambda path: save_file({'a': torch.zeros(100_000)}, path))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "E-DISK" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_nan_is_never_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"a": float("nan")})


def test_a_torn_last_line_is_ignored_and_then_cut(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    files.append_line(log, {"step": 1})
    with log.open("a") as stream:
        stream.write('{"step": 2')
    assert files.read_lines(log) == [{"step": 1}]
    files.repair_log(log)
    files.append_line(log, {"step": 2})
    assert files.read_lines(log) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"other": 1}'])
def test_a_damaged_line_is_named_by_number(tmp_path: Path, line: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(DagmanError, match=r"E-MANIFEST .*log\.jsonl:2"):
        files.read_lines(log, required=["step"])


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'\xef\xbb\xbf{"step": 1}\r\n{"step": 2}\r\n')
    assert files.read_lines(log) == [{"step": 1}, {"step": 2}]


def test_the_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    script = (
        f"from dagman import files; from pathlib import Path\nwith files.folder_lock(Path({str(tmp_path)!r})): pass"
    )
    with files.folder_lock(tmp_path):
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"is in use by process {os.getpid()}" in result.stderr
    with files.folder_lock(tmp_path):
        pass


def test_who_waits_has_the_folder_after_the_other(tmp_path: Path) -> None:
    script = (
        "from dagman import files; from pathlib import Path\nprint('here', flush=True)\n"
        f"with files.folder_lock(Path({str(tmp_path)!r}), wait=True): print('held')"
    )
    with files.folder_lock(tmp_path):
        waiting = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "here\n"
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.3)
    assert waiting.communicate(timeout=60)[0] == "held\n"


def test_where_there_are_no_locks_the_work_goes_on_and_other_faults_are_no_lock_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file system mounted without locks `flock` says that it is not there."""

    def fail(number: int) -> Callable[[int, int], None]:
        def flock(_descriptor: int, _operation: int) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", fail(errno.ENOSYS))
    with files.folder_lock(tmp_path):
        pass
    assert "this file system has no locks; run one command at a time in it" in capsys.readouterr().err
    monkeypatch.setattr(fcntl, "flock", fail(errno.EIO))
    with pytest.raises(DagmanError, match="E-DISK"), files.folder_lock(tmp_path):
        pass


def test_a_path_that_is_no_utf8_is_refused_and_healthy_files_are_not_blamed(tmp_path: Path) -> None:
    """As on shares of old, in Latin-1."""
    folder = tmp_path / os.fsdecode(b"l\xe4t")
    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"healthy")
    (tmp_path / "scans").mkdir()
    for code, use in (
        ("STORE", lambda: PreparedStore(folder)),
        ("OUTPUT", lambda: refuse_inside(folder / "run")),
        ("OUTPUT", lambda: prepare([tmp_path / "scans"], folder / "store")),
        ("WEIGHTS", lambda: read_tensors(folder / "weights.safetensors")),
    ):
        with pytest.raises(DagmanError, match=f"E-{code} .*its path is no UTF-8") as caught:
            use()
        assert caught.value.exit_code is ExitCode.REFUSED


def test_an_error_is_one_line_even_for_a_hostile_name() -> None:
    error = DagmanError("GZIP", "a\nb\x1b[31m.nii.gz", "ends early", "copy it again")
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)


def test_an_error_survives_a_process_boundary() -> None:
    import pickle

    error = DagmanError("GZIP", "a.nii.gz", "ends early", "copy it again", exit_code=ExitCode.REFUSED)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert copy.exit_code is ExitCode.REFUSED


def test_a_short_write_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    files.append_line(log, {"step": 1})
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({log.stat().st_size + 5}, resource.RLIM_INFINITY))\n"
        "from pathlib import Path; from dagman import files\n"
        f"files.append_line(Path({str(log)!r}), {{'step': 2}})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "E-DISK" in result.stderr
    assert files.read_lines(log) == [{"step": 1}]
