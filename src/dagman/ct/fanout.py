"""One task for each scan, on several processes; a worker that dies costs one scan, and a signal ends all of them."""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from types import FrameType
from typing import Any, TypeVar

from dagman.types import Scan

Outcome = TypeVar("Outcome")


def unordered(
    work: Callable[[Scan], Outcome], scans: Sequence[Scan], workers: int | None, lost: Callable[[Scan], Outcome]
) -> Generator[tuple[Scan, Outcome], None, None]:
    """Scans with their outcomes, as they come.

    When a worker dies, what was under way is done again, one scan at a time and each in a fresh process; a scan that
    ends its process again is lost.

    Args:
        work: Done once for each scan, in other processes unless `workers` is 1; can be pickled.
        scans: What to work on.
        workers: Processes; None: those a surrounding `joblib.parallel_config` names, else 1.
        lost: The outcome of a scan that ends its process.
    """
    if workers == 1:
        yield from ((scan, work(scan)) for scan in scans)
        return
    waiting = list(scans)
    while waiting:
        under_way: list[Scan] = []
        try:
            for scan, outcome in _pool(work, waiting, workers, under_way):
                under_way.remove(scan)
                waiting.remove(scan)
                yield scan, outcome
        except BrokenProcessPool:
            for scan in under_way:
                waiting.remove(scan)
                yield scan, _alone(work, scan, lost)


def _pool(
    work: Callable[[Scan], Outcome], scans: Sequence[Scan], workers: int | None, under_way: list[Scan]
) -> Generator[tuple[Scan, Outcome], None, None]:
    from joblib import Parallel, delayed

    def given() -> Iterator[Any]:
        for scan in list(scans):
            under_way.append(scan)
            yield delayed(_in_worker)(work, scan, os.getpid())

    # joblib warns of tasks that were given up, wherever in its own code a signal finds it; that is what stopping means.
    warnings.filterwarnings("ignore", r"\d+ tasks (which were still|have been successfully)", UserWarning)
    pool = Parallel(n_jobs=workers, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs + 1")
    outcomes = pool(given())
    try:
        yield from outcomes
    finally:
        outcomes.close()


def _alone(work: Callable[[Scan], Outcome], scan: Scan, lost: Callable[[Scan], Outcome]) -> Outcome:
    from joblib.externals.loky import ProcessPoolExecutor

    with ProcessPoolExecutor(max_workers=1) as pool:
        try:
            outcome: Outcome = pool.submit(_in_worker, work, scan, os.getpid()).result()[1]
        except BrokenProcessPool:
            outcome = lost(scan)
    return outcome


def _in_worker(work: Callable[[Scan], Outcome], scan: Scan, main: int) -> tuple[Scan, Outcome]:
    if os.getpid() == main:  # joblib works in the calling process where one worker is all there is
        return scan, work(scan)
    _follow_parent()
    # Ctrl-C reaches every process of a terminal: only the main one shall answer.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return scan, work(scan)


@cache
def _follow_parent() -> None:
    """End this worker when the process that started it is gone, killed perhaps: nobody waits for its work."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM stop the work inside as Ctrl-C does: by `KeyboardInterrupt`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
