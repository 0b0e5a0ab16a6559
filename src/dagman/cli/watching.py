"""What a person sees of long work: lines, a bar with the time left, the next command."""

import contextlib
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from cyclopts import Parameter, Token

from dagman.config import convert
from dagman.errors import DagmanError, ExitCode

if TYPE_CHECKING:
    from dagman.ct.survey import Problem

PREDICT, RESULT = "classify predict", "result.json"
Sources = Annotated[list[Path], Parameter(name=["--input", "-i"], consume_multiple=True, negative=())]
Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Switch = Annotated[bool, Parameter(negative=())]


def _sides(_: Any, tokens: Sequence[Token]) -> Any:
    """Three numbers in one word, as in settings."""
    try:
        return convert(tuple[int, int, int], tokens[0].value, "--crop")
    except DagmanError as error:
        raise DagmanError("CONFIG", "--crop", error.problem, "give three sides, such as 64,64,64") from None


Crop = Annotated[tuple[int, int, int] | None, Parameter(negative=(), n_tokens=1, converter=_sides, metavar="X,Y,Z")]
"""Written `64,64,64`."""


def _present(_: Any, device: str | None) -> None:
    """Refuse a GPU that is not there; torch is imported only where one is asked for."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise DagmanError("DEVICE", "--device cuda", "no CUDA device is here", "leave --device out, or give cpu")


def _at_least(least: int) -> Parameter:
    """Refuse a smaller number."""

    def check(_: Any, number: int | None) -> None:
        if number is not None and number < least:
            raise ValueError(f"cannot be {number}; give at least {least}")

    return Parameter(validator=check)


Readers = Annotated[int, _at_least(0)]
"""Processes that read ahead of one that trains, which reads itself where there are none."""
Number = Annotated[int, _at_least(1)]


Device = Annotated[Literal["cpu", "cuda"], Parameter(validator=_present)]
"""Where a verb computes."""


@runtime_checkable
class Tell(Protocol):
    """Hears how far a piece of work is."""

    def __call__(self, done: int, total: int, note: str = "", /) -> None:
        """Units done, units in all, and what came last."""


def require(holds: object, subject: str, problem: str, advice: str) -> None:
    """Refuse a command line that cannot be meant.

    Raises:
        DagmanError: `E-USAGE`.
    """
    if not holds:
        raise DagmanError("USAGE", subject, problem, advice)


def short_names(paths: list[Path], subject: str = "--weights", taken: Sequence[str] = ()) -> list[str]:
    """A short name for each path that no other has, which can stand in a file's name.

    Args:
        paths: Files or folders.
        subject: Where they were given.
        taken: Names that stand for something else.

    Raises:
        DagmanError: `E-USAGE` for a path that is given twice.
    """
    from dagman import files

    whole = [path.resolve().with_suffix("") if path.suffix == ".safetensors" else path.resolve() for path in paths]
    twice = [str(path) for path, count in Counter(whole).items() if count > 1]
    require(not twice, subject, f"names {', '.join(twice)} twice", "name each once")
    for depth in range(1, max(len(path.parts) for path in whole) + 1):
        wanted = [*taken, *("-".join(path.parts[-depth:]) for path in whole)]
        names = files.names_in_files(wanted)
        if names == [files.names_in_files([each])[0] for each in wanted]:
            break
    return names[len(taken) :]


def by(sides: Sequence[float]) -> str:
    """Sides as `64x64x64`."""
    return "x".join(f"{side:g}" for side in sides)


def say(text: str = "") -> None:
    """A line for the person who watches (standard error, so that standard output can be piped)."""
    print(text, file=sys.stderr, flush=True)


def say_problems(problems: "Sequence[Problem]") -> bool:
    """Say what is lost of some sources, and how they were taken; whether anything is lost."""
    for problem in problems:
        if problem.told:
            say(str(problem))
    return any(not problem.ignored for problem in problems)


STOPPED = "stopped; run the same command to continue"


def claim(output: Path, verb: str) -> None:
    """Refuse, before any work, to write a verb's folder over something else.

    Args:
        output: Folder for the verb's results.
        verb: Its name, which its `result.json` bears as `made_by`.

    Raises:
        DagmanError: `E-OUTPUT`, exit code 4: it is a file, lies in a prepared store, is a pretraining run, or holds the
            result of another verb.
    """
    from dagman.ct.store import refuse_inside

    refuse_inside(output)
    problem = ""
    if output.exists() and not output.is_dir():
        problem = "is a file, and a folder is written"
    elif (output / "metrics.jsonl").is_file() and (output / "config.yaml").is_file():
        problem = "is a pretraining run"
    elif (other := maker(output) or verb) != verb:
        problem = f"holds the result of `dagman {other}`"
    if problem:
        raise DagmanError("OUTPUT", output, problem, "choose another output folder", exit_code=ExitCode.REFUSED)


def maker(folder: Path) -> str | None:
    """The verb whose `result.json` or predicted classes a folder holds; None where nothing says so."""
    if (folder / RESULT).is_file():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found: str | None = json.loads((folder / RESULT).read_text()).get("made_by")
            return found
        return None
    return PREDICT if (folder / "predictions.csv").is_file() else None


def next_step(*words: str | Path) -> None:
    """The last line of a verb: what to run next. A path is quoted where a shell would take it apart."""
    say(f"Next: {shown(*words)}")


def shown(*words: str | Path) -> str:
    """A command as it can be pasted into a shell."""
    return " ".join(shlex.quote(str(word)) if isinstance(word, Path) else word for word in words)


FEWEST = 3
"""Units that must be done before they tell how long the others take."""


@contextlib.contextmanager
def progress(title: str) -> Iterator[Tell]:
    """A callable (done, total, note): a bar on a terminal, elsewhere a line every ten seconds, with the time left."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, note="")

        def tell(done: int, total: int, note: str = "", /) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield tell


def _lines(title: str, every_seconds: float = 10.0) -> Tell:
    from dagman.errors import duration

    marks: list[tuple[int, float]] = []
    last, before = 0.0, 0

    def tell(done: int, total: int, note: str = "", /) -> None:
        nonlocal last, before
        now = time.monotonic()
        if not marks or done < before:  # another piece of work has begun
            marks[:] = [(done, now)]
        elif len(marks) == 1 and done > before:  # the first unit loads and compiles: others are the measure
            marks.append((done, now))
        before = done
        if now - last < every_seconds and done < total:
            return
        last = now
        first, began = next((mark for mark in reversed(marks) if mark[0] < done), (done, now))
        known = done - marks[0][0] >= FEWEST and first < done < total
        left = f", {duration((now - began) * (total - done) / (done - first))} left" if known else ""
        say(f"{title} {done}/{total}{left}{', ' + note if note else ''}")

    return tell


_RATIOS = {"image_error_ratio": "image error / visible mean"} | {
    f"{term}_loss_ratio": f"{term} / ln K" for term in ("ampd", "aitd", "gitd")
}


class Watcher:
    """Shows a run's progress and messages to the person who watches."""

    def __init__(self, tell: Callable[[int, int, str], None]) -> None:
        self.tell = tell
        self.total = 0

    def on_start(self, step: int, total_steps: int) -> None:
        """Remember the length of the run."""
        self.total = total_steps
        self.tell(step, total_steps, "")

    def on_step(self, row: Mapping[str, Any]) -> None:
        """Show the step, and its losses beside what knowing nothing would give."""
        shown = [f"{name} {row[column]:.2f}" for column, name in _RATIOS.items() if row.get(column) is not None]
        self.tell(row["step"], self.total, ", ".join(shown) or f"loss {row['total']:.3f}")

    def on_message(self, text: str) -> None:
        """Pass a message on."""
        say(text)
