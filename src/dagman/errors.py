"""Errors a person can act on: one line that names the thing, what is wrong with it, and the way out."""

import math
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of every `dagman` verb."""

    OK = 0
    BUG = 1
    USAGE = 2
    REJECTED = 3
    """Finished, but some inputs were rejected."""
    REFUSED = 4
    """Refused to do something unsafe: leakage, a changed config, a lock held, disagreeing geometry."""
    NOTHING_USABLE = 5
    RESOURCES = 6
    """Disk full, read-only, out of memory."""
    UNHEALTHY = 7
    """Training diverged or collapsed."""
    STOPPED = 75
    """Stopped cleanly; the same command continues."""


def printable(text: object) -> str:
    """Escape control characters, so that a hostile file name stays on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


def count(number: int, one: str, several: str) -> str:
    """A number and what is counted, in the singular or the plural."""
    return f"{number} {one if number == 1 else several}"


def duration(seconds: float) -> str:
    """Seconds for people: 45 s, 12 min, 3.5 h, 20 days."""
    for unit, size, limit in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48), ("days", 86400, math.inf)):
        if seconds / size < limit:
            amount = seconds / size
            return f"{amount:.1f} {unit}" if amount < 10 and unit != "s" else f"{amount:.0f} {unit}"
    return f"{seconds:.0f} s"


class DagmanError(Exception):
    """A coded error for people, printed as `E-CODE subject: problem; advice`.

    Args:
        code: Short upper-case word, such as `GZIP`, listed in `docs/errors.md`.
        subject: The file, case or setting at fault.
        problem: What is wrong, with numbers.
        advice: What to do, an imperative sentence.
        exit_code: What the command returns when this error ends it.
    """

    def __init__(
        self, code: str, subject: object, problem: str, advice: str, *, exit_code: ExitCode = ExitCode.USAGE
    ) -> None:
        super().__init__(code, subject, problem, advice)
        self.code = code
        self.subject = printable(subject)
        self.problem = printable(problem)
        self.advice = printable(advice)
        self.exit_code = exit_code
        self.stop_asked = False
        """A signal asked for a stop in the work that this ended: whoever has more to do does not begin it."""

    def __str__(self) -> str:
        return f"E-{self.code} {self.subject}: {self.problem}; {self.advice}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.code, self.subject, self.problem, self.advice, self.exit_code)


def _rebuild(code: str, subject: str, problem: str, advice: str, exit_code: ExitCode) -> DagmanError:
    return DagmanError(code, subject, problem, advice, exit_code=exit_code)
