"""What threads cost in products that are too small for them: a phantom painted, a linear probe fitted.

    python benchmarks/threads.py [--rounds 3] [--json benchmarks/results/threads.json]

Both are measured as they are, with one thread for the processor's products, and with as many as the library starts by
itself, in turns; each once more beside processes that keep every core busy.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dagman import files
from dagman.ct import phantom, phantom_canvas
from dagman.run import describe_environment
from dagman.tasks import classify


def paint() -> None:
    """A phantom of the size that `dagman demo` takes."""
    phantom.make(0, 0)


def fit() -> None:
    """A probe of 100 cases and 416 features: every strength, five inner folds."""
    draws = np.random.default_rng(0)
    numbers = np.arange(100) % 2
    features = draws.normal(size=(100, 416)) + 0.2 * numbers[:, None]
    classify.fit(features, numbers, np.arange(100) // 2 % 5)


@contextlib.contextmanager
def as_the_library_likes() -> Iterator[None]:
    """Without the limits to one thread."""
    before = phantom_canvas.threadpool_limits, classify.threadpool_limits
    phantom_canvas.threadpool_limits = classify.threadpool_limits = lambda *_: contextlib.nullcontext()
    try:
        yield
    finally:
        phantom_canvas.threadpool_limits, classify.threadpool_limits = before


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Beside one process a core that never rests."""
    others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(os.cpu_count() or 1) if wanted]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.terminate()


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


def measure(work: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median seconds with one thread and with the library's own number, in turns; the first round warms up."""
    seconds: dict[str, list[float]] = {"one": [], "free": []}
    for _ in range(rounds + 1):
        for how, threads in (("one", contextlib.nullcontext), ("free", as_the_library_likes)):
            with threads():
                began = time.perf_counter()
                work()
                seconds[how].append(time.perf_counter() - began)
    return {how: round(statistics.median(taken[1:]), 4) for how, taken in seconds.items()}


def main() -> None:
    """Measure both on a free and on a busy machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "threads.json")
    given = parser.parse_args()
    rows = []
    for crowded in (False, True):
        with busy(crowded):
            for what, work in (("a phantom", paint), ("a linear probe", fit)):
                found = measure(work, given.rounds)
                rows.append({"work": what, "busy": crowded, **found})
                print(f"{what}, {'busy' if crowded else 'free'}: {found['one']:.2f} s, {found['free']:.2f} s unlimited")
    result = {"rows": rows, "date": time.strftime("%Y-%m-%d"), "machine": describe_environment()["versions"]}
    files.write_json(given.json, result)
    print(f"wrote {given.json}")


if __name__ == "__main__":
    main()
