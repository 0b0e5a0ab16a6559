"""The run folder: what one pretraining leaves behind, and the only thing other verbs read of it."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dagman import config, files
from dagman.errors import DagmanError, ExitCode

TIMING = ("seconds", "data_wait_seconds", "images_per_second")
"""Fields of `metrics.jsonl` that differ between two equal runs."""
_PACKAGES = ("torch", "numpy", "lightning-fabric", "safetensors", "dagman")


class Run:
    """A run folder.

    Args:
        folder: Where it stands, or shall stand.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = folder = Path(folder)
        self.config_file = folder / "config.yaml"
        self.environment_file = folder / "environment.json"
        self.metrics_file = folder / "metrics.jsonl"
        self.log_file = folder / "log.txt"
        self.progress_file = folder / "progress.png"
        self.pictures = folder / "pictures"
        self.checkpoints = folder / "checkpoints"
        self.weights = folder / "weights"
        self.tensorboard = folder / "tensorboard"

    def config(self) -> dict[str, Any]:
        """The resolved settings the run was started with, nested as they were declared.

        Raises:
            DagmanError: `E-CONFIG` when the folder is no run.
        """
        return config.read_yaml(self.config_file)

    def environment(self) -> dict[str, Any]:
        """Machine, versions and data of the latest start; empty for a run that was never started.

        Raises:
            DagmanError: `E-RESUME`, exit code 4, where the file is damaged.
        """
        if not self.environment_file.exists():
            return {}
        try:
            values: dict[str, Any] = json.loads(self.environment_file.read_text())
        except ValueError:
            raise DagmanError(
                "RESUME",
                self.environment_file,
                "is damaged, so that nobody knows what the run was started with",
                "restore it from a backup, or choose another output folder",
                exit_code=ExitCode.REFUSED,
            ) from None
        return values

    def metrics(self) -> list[dict[str, Any]]:
        """One row for each optimizer step, in order; a torn last line is left out.

        Raises:
            DagmanError: `E-MANIFEST` with the line that is no JSON.
        """
        return files.read_lines(self.metrics_file, required=("step",))

    def compare(self, settings: Any, data: Mapping[str, Any], devices: int) -> bool:
        """Whether the folder holds a run, which these settings would continue.

        Args:
            settings: The run's config, a frozen dataclass.
            data: What identifies the data: the store's identity and the number of volumes.
            devices: Number of processes that share a batch.

        Raises:
            DagmanError: `E-RESUME`, exit code 4, with every line that differs.
        """
        before = self.environment()
        if not (self.config_file.exists() and before):
            return False
        old = {
            **config.deciding(settings, self.config()),
            "data_store": before.get("data"),
            "devices": before.get("devices"),
        }
        new = {**config.deciding(settings), "data_store": dict(data), "devices": devices}
        if lines := config.difference(old, json.loads(json.dumps(new))):
            raise DagmanError(
                "RESUME",
                self.folder,
                f"was started with other settings ({'; '.join(lines)})",
                "give the old settings again, choose another output folder, or add --fresh to `dagman pretrain`, "
                "which moves the earlier run aside",
                exit_code=ExitCode.REFUSED,
            )
        return True

    def start(self, settings: Any, data: Mapping[str, Any], devices: int, kernels: str | None = None) -> None:
        """Write `config.yaml` and `environment.json`, after `compare` with those of the run that is continued.

        Args:
            settings: As for `compare`.
            data: As for `compare`.
            devices: As for `compare`.
            kernels: What is compiled of the network, in words.

        Raises:
            DagmanError: As `compare`.
        """
        self.compare(settings, data, devices)
        before = self.environment()
        files.write_text(self.config_file, config.to_yaml(settings))
        environment = {**describe_environment(), "devices": devices, "data": dict(data)}
        environment["versions"]["kernels"] = kernels
        for line in config.difference(_code(before), _code(environment)) if before else []:
            self.log(f"environment changed, {line}: the rest need not be bit-equal to an uninterrupted run")
        files.write_json(self.environment_file, environment)

    def log(self, text: str) -> None:
        """Add a line to `log.txt`, with the time."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n"
        files.append_text(self.log_file, line)

    def add(self, row: Mapping[str, Any], *, durable: bool) -> None:
        """Add a row to `metrics.jsonl`; with `durable`, it and all rows before it are on disk when this returns."""
        files.append_line(self.metrics_file, dict(row), durable=durable)

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the rows past `step`, so that a resumed run writes them once; the rows that stay."""
        rows = self.metrics()
        kept = [row for row in rows if row["step"] <= step]
        if self.metrics_file.exists():
            files.write_text(self.metrics_file, "".join(map(files.json_line, kept)))
        return kept


def _code(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What of an environment decides the bits of a run."""
    return {**environment.get("versions", {}), "git_commit": environment.get("git_commit")}


def describe_environment() -> dict[str, Any]:
    """Versions, threads, processor, GPU, git commit and the level of determinism that they allow."""
    import torch  # folders of studies are made without it

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: package_version(name) for name in _PACKAGES},
            "threads": torch.get_num_threads(),
            "processor": _processor(),
            "gpus": gpus,
        },
        "command": sys.argv,
        "platform": platform.platform(),
        "git_commit": _git_commit(),
        "flags": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ},
        "determinism": "same crops and hiding draws; losses equal up to rounding"
        if gpus
        else "bitwise: same machine type, versions and threads give the same bits, interrupted or not",
    }


def package_version(name: str) -> str | None:
    """Installed version of a distribution; None for one that runs from its sources or is absent."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
