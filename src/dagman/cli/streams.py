"""Standard streams that end no work: their readers leave, their disks fill, or they were never open."""

import errno
import os
import sys
from io import TextIOWrapper
from pathlib import Path
from typing import Any


class Steady(TextIOWrapper):
    """A standard stream; what can no longer be written to it is left out."""

    failed: OSError | None = None
    """Why something was left out."""

    def write(self, text: str, /) -> int:
        """Text, or nothing."""
        try:
            return super().write(text)
        except OSError as error:
            self.failed = error
            return len(text)

    def flush(self) -> None:
        """What was written so far, or nothing."""
        try:
            super().flush()
        except OSError as error:
            self.failed = error


def steady() -> None:
    """Let standard output and error be `Steady`, and write names that the terminal has no letters for all the same."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream: Any = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            through, lines = stream.write_through, stream.line_buffering
            under = os.fdopen(number, "wb", 0 if through else -1, closefd=False)
            made = Steady(under, stream.encoding, "backslashreplace", line_buffering=lines, write_through=through)
            setattr(sys, name, made)


def refuse_lost_output() -> None:
    """What is printed is lost on a full disk; whoever reads a pipe no longer wants it.

    Raises:
        DagmanError: `E-DISK`, exit code 6.
    """
    sys.stdout.flush()
    failed = sys.stdout.failed if isinstance(sys.stdout, Steady) else None
    if failed and failed.errno != errno.EPIPE:
        from dagman.files import disk_error

        raise disk_error(Path("standard output"), failed)


def open_closed() -> None:
    """Open the null device where a standard stream is closed, or a file of data would be opened in its place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
