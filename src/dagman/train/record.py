"""Where the rows of a run go: metrics, TensorBoard, listeners, the collapse watch."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dagman.train.health import Watch
from dagman.train.job import Job


class Recorder(contextlib.AbstractContextManager["Recorder"]):
    """Takes each row to the metrics, TensorBoard, the listeners and the collapse watch; silent on other ranks."""

    def __init__(self, job: Job, start: int) -> None:
        self.job = job
        self.start = start
        self.seconds: list[float] = []
        self.watch = Watch(job.total)
        self.writer: Any = None

    def __enter__(self) -> "Recorder":
        if self.job.fabric.is_global_zero:
            for row in self.job.run.metrics():
                self.watch.see(row)
            self.writer = _tensorboard(self.job.run.tensorboard, self.start)
            for listener in self.job.listeners:
                listener.on_start(self.start, self.job.total)
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def add(self, row: Mapping[str, Any], *, durable: bool) -> None:
        """Record one step."""
        if not self.job.fabric.is_global_zero:
            return
        self.job.run.add(row, durable=durable)
        for message in self.watch.see(row):
            self.job.say(message)
        for listener in self.job.listeners:
            listener.on_step(row)
        if self.writer is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, row["step"])


def _tensorboard(folder: Path, start: int) -> Any:
    """A writer of TensorBoard's logs, None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)
