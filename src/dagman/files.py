"""The only door to disk writes: nothing final is ever half-written, and every reader can check what it reads.

A file appears under its name only after its bytes are on disk (temporary file in the same folder, fsync, rename,
fsync of the folder). Append-only logs may end in a torn line, which readers ignore.
"""

import contextlib
import errno
import fcntl
import gc
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dagman.errors import DagmanError, ExitCode, printable

TEMPORARY_SUFFIX = ".tmp"
_faults_seen: dict[str, int] = {}


def fault_point(name: str) -> None:
    """Mark a place where tests may kill the process.

    Does nothing unless the environment holds `DAGMAN_FAULT=name:n:kill` (or `:enospc`), which fires at the n-th visit.
    """
    wanted = os.environ.get("DAGMAN_FAULT")
    if not wanted:
        return
    point, count, action = wanted.split(":")
    if point != name:
        return
    _faults_seen[name] = _faults_seen.get(name, 0) + 1
    if _faults_seen[name] == int(count):
        if action == "enospc":
            raise OSError(28, "No space left on device")
        os.kill(os.getpid(), signal.SIGKILL)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary)` make a file, then put it in place of `path` in one step.

    Args:
        path: Where the finished file shall stand.
        write: Writes the whole file to the path it is given (same folder, same suffix as `path`).

    Raises:
        DagmanError: `E-DISK`, exit code 6, when the disk is full or read-only; `path` is then as it was.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{TEMPORARY_SUFFIX}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:  # safetensors' files can be read by nobody else, whatever the umask says
            with contextlib.suppress(PermissionError):
                temporary.chmod(mode)
        fault_point("file.before_fsync")
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        fault_point("file.before_replace")
        os.replace(temporary, path)
        fault_point("file.after_replace")
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
    except SafetensorError as error:
        if "I/O" not in str(error):
            raise
        raise disk_error(path, OSError(str(error))) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def publish_folder(temporary: Path, folder: Path) -> None:
    """Put a finished folder in place under its final name in one step; an older one of that name is removed first.

    Raises:
        DagmanError: `E-DISK`, exit code 6.
    """
    try:
        sync_folder(temporary)
        fault_point("folder.before_replace")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        fault_point("folder.after_replace")
        sync_folder(folder.parent)
    except OSError as error:
        raise disk_error(folder, error) from error


def remove_folder(folder: Path) -> None:
    """Delete a folder and all it holds, if it exists."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise disk_error(folder, error) from error


def disk_error(path: Path, error: OSError) -> DagmanError:
    """The coded error for a failed write."""
    return DagmanError(
        "DISK",
        path,
        f"cannot be written ({error.strerror or error})",
        "free space or choose another output folder, then run the same command again",
        exit_code=ExitCode.RESOURCES,
    )


def refuse_no_utf8(path: Path, code: str, advice: str) -> None:
    """Refuse a path whose bytes are no UTF-8: libraries that read and write arrays cannot open it.

    Raises:
        DagmanError: Of this code, exit code 4.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise DagmanError(code, path, "its path is no UTF-8", advice, exit_code=ExitCode.REFUSED) from None


def names_in_files(names: Sequence[str]) -> list[str]:
    """Each name as it can stand in a file's name (letters, digits, `.`, `_`, `-`), and none twice."""
    found: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name)
        numbered = (f"{plain}-{number}" for number in itertools.count(2))
        found.append(next(each for each in itertools.chain([plain], numbered) if each not in found))
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    write_atomic(path, lambda temporary: _write_bytes(temporary, text.encode()))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a binary file atomically."""
    write_atomic(path, lambda temporary: _write_bytes(temporary, data))


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinities are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def json_line(row: dict[str, Any]) -> str:
    """One row as one line of strict JSON, keys in the order given."""
    return json.dumps(row, allow_nan=False, separators=(", ", ": ")) + "\n"


def append_line(path: Path, row: dict[str, Any], *, durable: bool = True) -> None:
    """Append one JSON row to a log; with `durable`, it is on disk when this returns."""
    append_text(path, json_line(row), durable=durable)


def append_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Append text to a log in one write; with `durable`, the whole log is on disk when this returns."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _write_whole(descriptor, text.encode())
            fault_point("log.before_fsync")
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(path, error) from error


def _write_whole(descriptor: int, data: bytes) -> None:
    """Write all of it, or leave the file as it was."""
    before = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def read_lines(path: Path, required: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a torn last line (no newline) is ignored, any other damage is refused.

    Raises:
        DagmanError: `E-MANIFEST` with the line number.
    """
    if not path.exists():
        return []
    with _without_collections():
        return list(_rows(path, required))


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """While entered, Python looks for no cycles: rows have none, and each look goes through all that it holds."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _rows(path: Path, required: Iterable[str]) -> Iterator[dict[str, Any]]:
    text = path.read_bytes().decode("utf-8-sig", errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            missing = [key for key in required if key not in row]
        except (ValueError, TypeError):
            row, missing = None, []
        if not isinstance(row, dict) or missing:
            why = f"lacks {', '.join(missing)}" if missing else "is not a JSON object"
            raise DagmanError(
                "MANIFEST", f"{path}:{number}", f"line {why}", "restore the file or delete it and run again"
            )
        yield row


def repair_log(path: Path) -> None:
    """Cut a torn last line off an append-only log, before more is appended."""
    if path.exists():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            write_bytes(path, whole)


_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def folder_lock(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder` for this process; a second process is told who holds it. A dead holder's lock frees itself.

    On a file system that has no locks (some of clusters) nothing is held, which is said on standard error.

    Args:
        folder: Made where it is not there.
        wait: For the one who holds it, in place of an error: for what takes moments.

    Raises:
        DagmanError: `E-LOCKED`, exit code 4, when another process works in the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise disk_error(folder, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                print(
                    f"Note: {printable(folder)}: this file system has no locks; run one command at a time in it",
                    file=sys.stderr,
                )
                yield
                return
            if not isinstance(error, BlockingIOError):
                raise disk_error(folder, error) from error
            holder = os.read(descriptor, 500).decode(errors="replace") or "another process"
            raise DagmanError(
                "LOCKED",
                folder,
                f"is in use by {holder}",
                "wait for it to end or choose another output",
                exit_code=ExitCode.REFUSED,
            ) from None
        os.ftruncate(descriptor, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {started}".encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)
