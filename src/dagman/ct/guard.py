"""Reading in a child process with a memory and a time limit: a hostile file can end its own read, nothing else.

One small server per caller holds the reading libraries. A fork of it does one task after the other, which saves the
memory that a new one would have to touch first; it is replaced, which costs milliseconds, after the first that fails
and after any that decoded pixels outside of Python.
Requests and replies are JSON, voxels come back in shared memory; nothing is pickled.
"""

import atexit
import contextlib
import errno
import json
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from dagman.ct import grid
from dagman.errors import DagmanError, ExitCode


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What reading one scan may cost."""

    memory_bytes: int = 8 * 2**30
    """Address space of the reading process."""
    seconds: float = 120.0
    """Wall time of one scan."""
    max_voxels: int = 1_500_000_000
    """The largest volume that is tried."""
    min_extent_mm: float = 32.0
    """16 voxels at 2 mm: a thinner volume is refused."""


class _Server:
    """The caller's end of one reading process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        source = str(Path(__file__).parents[2])
        paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
        single = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dagman.ct.guard", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **single, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        theirs.close()

    def close(self) -> None:
        """Let the process end; in a fork of its owner, only let go of it."""
        self.socket.close()
        if self.owner == os.getpid():
            self.process.wait()
        else:
            self.process.returncode = 0


_idle: list[_Server] = []
_UNREAD = "unread"
_LARGEST_WORKER = 2**30
"""Bytes that a process may have held and still do another task, whose limit what it left behind would narrow."""


def run(task: str, subject: Path, arguments: dict[str, Any], limits: Limits) -> tuple[Any, np.ndarray | None]:
    """Run a task of `dagman.ct.tasks` in a guarded process.

    Args:
        task: Name of the task.
        subject: What an error about the process itself is about.
        arguments: Plain values for the task.
        limits: What it may cost.

    Returns:
        What the task returned, and its array, in memory shared with nobody any more.

    Raises:
        DagmanError: What the task raised; `E-TIMEOUT`, `E-MEMORY` or `E-CRASH` when its process was ended.
    """
    server = _take()
    with _shared_file() as note, _shared_file() as voxels:
        request = {"task": task, "arguments": arguments, "memory_bytes": limits.memory_bytes, "subject": str(subject)}
        request["folder"] = str(Path.cwd())  # from which paths count, wherever this process was when it began the other
        note.write(json.dumps(request).encode())
        note.flush()
        try:
            line = f"{limits.seconds}\n".encode()
            socket.send_fds(server.socket, [line], [note.fileno(), voxels.fileno()])
            outcome = server.socket.recv(64).decode()
        except OSError:
            outcome = ""
        except BaseException:
            server.close()
            raise
        if outcome:
            _idle.append(server)
        else:
            server.close()
        if outcome != "0":
            raise _ended(outcome, subject, limits)
        note.seek(0)
        reply = json.loads(note.read())
        if "error" in reply:
            code, about, problem, advice, exit_code = reply["error"]
            raise DagmanError(code, about, problem, advice, exit_code=ExitCode(exit_code))
        return reply["value"], _array(voxels, reply)


def _take() -> _Server:
    """An idle server of this very process, or a new one."""
    while _idle:
        server = _idle.pop()
        if server.owner == os.getpid():
            return server
        server.close()
    return _Server()


def _array(voxels: IO[bytes], reply: dict[str, Any]) -> np.ndarray | None:
    if not reply["dtype"]:
        return None
    memory = mmap.mmap(voxels.fileno(), 0)
    return np.frombuffer(memory, reply["dtype"]).reshape(reply["shape"])


def _ended(outcome: str, subject: Path, limits: Limits) -> DagmanError:
    if outcome == "timeout":
        return DagmanError(
            "TIMEOUT",
            subject,
            f"took longer than {limits.seconds:g} s to read",
            "export the scan again or leave it out",
        )
    if outcome == str(-signal.SIGKILL):
        return _memory(subject, limits.memory_bytes)
    return DagmanError(
        "CRASH",
        subject,
        f"ended its reading process (status {outcome or 'lost'})",
        "export the scan again or leave it out",
    )


def _memory(subject: object, limit: int) -> DagmanError:
    problem = f"needs more memory than there is or than the {limit / 2**30:.3g} GiB allowed"
    return DagmanError("MEMORY", subject, problem, "free memory, or give the scan with fewer voxels")


def _shared_file() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("dagman"), "w+b")
    return cast("IO[bytes]", tempfile.TemporaryFile())


@atexit.register
def close() -> None:
    """End this process's idle reading processes."""
    while _idle:
        _idle.pop().close()


def _serve(connection: socket.socket) -> None:
    """Hand every request to a fork, until the caller is gone."""
    from dagman.ct import tasks

    worker: _Worker | None = None
    while True:
        line, descriptors, _, _ = socket.recv_fds(connection, 64, 2)
        if not line:
            return
        for _ in range(2):
            worker = worker if worker and worker.alive else _Worker(tasks.TASKS, connection, descriptors)
            outcome = worker.outcome(descriptors, float(line), connection)
            if outcome != _UNREAD:  # a process that ended while it had nothing to do is no task's fault
                break
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(outcome.encode())


class _Worker:
    """A fork that does tasks, and the server's end of the line to it."""

    def __init__(self, tasks: dict[str, Any], connection: socket.socket, descriptors: list[int]) -> None:
        self.alive = True
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.process = os.fork()
        if self.process == 0:
            try:
                connection.close()
                self.channel.close()
                for descriptor in descriptors:
                    os.close(descriptor)
                _work(tasks, theirs)
            finally:
                os._exit(3)
        theirs.close()

    def outcome(self, descriptors: list[int], seconds: float, connection: socket.socket) -> str:
        """0 for a task that was done; else how the process ended, which is no longer alive then."""
        ready = [self.channel]
        try:
            socket.send_fds(self.channel, [b"task"], descriptors)
            ready = select.select([self.channel, connection], [], [], seconds)[0]
            if self.channel in ready and self.channel.recv(64):
                return "0"
            unread = False
        except ConnectionError:
            unread = True
        if self.channel not in ready:
            os.kill(self.process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        self.channel.close()
        self.alive = False
        return _UNREAD if unread else str(status) if ready else "timeout"


def _work(tasks: dict[str, Any], channel: socket.socket) -> None:
    """In the fork: limit, read, reply, again. Never returns.

    It ends with its first failure, once it held much, and after a decoder in C++ that a file could have led astray.
    """
    while True:
        line, descriptors, _, _ = socket.recv_fds(channel, 64, 2)
        if not line:
            os._exit(0)
        note, voxels = descriptors
        with os.fdopen(note, "r+b") as stream:
            stream.seek(0)
            request = json.loads(stream.read())
            reply = _answer(tasks, request, voxels)
            stream.seek(0)
            stream.truncate()
            stream.write(json.dumps(reply).encode())
        os.close(voxels)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if "error" in reply or peak > _LARGEST_WORKER or "SimpleITK" in sys.modules:
            os._exit(0)
        channel.sendall(b"done")


def _answer(tasks: dict[str, Any], request: dict[str, Any], voxels: int) -> dict[str, Any]:
    limit, most = request["memory_bytes"], resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (limit if most == resource.RLIM_INFINITY else min(limit, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    subject = request["subject"]
    try:
        os.chdir(request["folder"])
        value, array = tasks[request["task"]](**request["arguments"])
        if array is None:
            return {"value": value, "dtype": None}
        os.ftruncate(voxels, array.nbytes)
        memory = mmap.mmap(voxels, array.nbytes, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        grid.write_in_c_order(array, np.frombuffer(memory, array.dtype).reshape(array.shape))
        return {"value": value, "dtype": array.dtype.str, "shape": array.shape}
    except Exception as error:
        return _described(error if isinstance(error, DagmanError) else _foreign(error, subject, limit))


def _foreign(error: Exception, subject: str, limit: int) -> DagmanError:
    """A library's error as ours. Its text may quote the header, so only its type is told."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return _memory(subject, limit)
    if isinstance(error, PermissionError):
        return DagmanError("PERM", subject, "may not be read", "give yourself the right to read it")
    if isinstance(error, FileNotFoundError):
        return DagmanError("GONE", subject, "is no longer there", "put it back and run the command again")
    problem = f"cannot be read ({type(error).__name__})"
    return DagmanError("CRASH", subject, problem, "export the scan again or leave it out")


def _described(error: DagmanError) -> dict[str, Any]:
    return {"error": [error.code, error.subject, error.problem, error.advice, int(error.exit_code)]}


if __name__ == "__main__":
    with contextlib.suppress(OSError):
        _serve(socket.socket(fileno=int(sys.argv[1])))
