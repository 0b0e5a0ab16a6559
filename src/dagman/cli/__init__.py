"""The `dagman` command: one verb is one function call. Heavy imports wait until a verb needs them."""

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError

from dagman import __version__
from dagman.cli import classification, comparing, encoder, looking, scans, segmentation, streams, training
from dagman.cli.usage import refusal
from dagman.errors import DagmanError, ExitCode

app = App(
    name="dagman",
    help="Turn unlabelled CT scans into an encoder that makes small labelled studies work, and show what it looks at.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # a stop has its own exit code, and says so
)
app.command(scans.check)
app.command(scans.prepare)
app.command(scans.lidc)
app.command(training.pretrain)
app.command(training.ablate)
app.command(encoder.embed)
app.command(classification.classify)
app.command(comparing.compare)
app.command(segmentation.segment)
app.command(looking.attention)
app.command(looking.cluster)
app.command(looking.diversity)
app.command(encoder.export)
app.command(encoder.info)
app.command(training.demo)


KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""glibc gives memory back after every large tensor and faults it in again, page by page of 4 KiB. With this memory is
kept, in large pages where the system gives them; see `benchmarks/step.py --allocators default tuned`."""


def main() -> None:
    """Run the command line and leave with an exit code of the contract."""
    streams.open_closed()
    training = {"pretrain", "ablate", "demo", "classify", "segment"}.intersection(sys.argv[1:2])
    own = any(name.startswith("MALLOC_") for name in os.environ)  # as in what begins here
    if training and sys.platform == "linux" and not own:
        # As the installed command has it, the folder it is called in is no place to import from.
        module = Path(sys.argv[0]).name == "__main__.py" and not sys.flags.safe_path
        safe = [] if module else ["-P"]
        again = [sys.executable, *safe, "-m", "dagman", *sys.argv[1:]]
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # until it has handlers again
        os.execve(sys.executable, again, KEEP_MEMORY | os.environ)  # noqa: S606
    streams.steady()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers stop a job so: as Ctrl-C does
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one verb; every error becomes one line on standard error and an exit code."""
    try:
        _refuse_lost_folder()
        code = _parsed(arguments)
        streams.refuse_lost_output()
    except DagmanError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("stopped; run the same command again", file=sys.stderr)
        return int(ExitCode.STOPPED)
    except MemoryError:
        advice = "close other programs, or lower --optimisation.batch-size, then --data.crop"
        print(f"E-MEMORY dagman: out of memory; {advice}", file=sys.stderr)
        return int(ExitCode.RESOURCES)
    except Exception as error:
        return _bug(error)
    return int(code or 0)


def _refuse_lost_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        problem = "the folder that this was called in no longer exists"
        raise DagmanError("GONE", ".", problem, "change to one that does") from None


def _parsed(arguments: list[str]) -> Any:
    try:
        return app(arguments, result_action="return_value", exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise refusal(error) from None


def _bug(error: Exception) -> int:
    """One line for what should not have happened; the traceback only when asked for."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    print(
        f"E-BUG {place}: {type(error).__name__}; run again with DAGMAN_DEBUG=1 for the details and report them",
        file=sys.stderr,
    )
    if os.environ.get("DAGMAN_DEBUG"):
        traceback.print_exception(error)
    return int(ExitCode.BUG)
