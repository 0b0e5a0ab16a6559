"""Checkpoints: all that a run needs to go on bit for bit, as safetensors and JSON, each found whole or not at all.

A checkpoint is a folder `step-00000100` that appears by one rename. Its manifest names the run it belongs to and the
SHA-256 of its tensors. What is random is keyed by the step and needs no storing.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dagman import files
from dagman.errors import DagmanError, ExitCode

FORMAT = 1
_TENSORS = "state.safetensors"
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The newest checkpoint that is whole."""

    step: int
    """Optimizer steps done."""
    tensors: dict[str, Tensor]
    damaged: tuple[str, ...]
    """One line for each newer checkpoint that was passed over."""


def state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a module and its optimizer under flat names, copied to the CPU.

    Args:
        module: Student, teacher, heads and centers.
        optimizer: Built from named parameters.
    """
    tensors = {f"module.{name}": tensor for name, tensor in module.state_dict().items()}
    for name, parameter in _named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def restore(tensors: dict[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `state` gave, on whatever device the parameters are."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part == "module":
            weights[rest] = value
        else:
            word, _, name = rest.partition(".")
            moments.setdefault(name, {})[word] = value
    module.load_state_dict(weights)
    for name, parameter in _named_parameters(optimizer):
        if name in moments:
            kept = {word: value.to(parameter.device, copy=True) for word, value in moments[name].items()}
            optimizer.state[parameter] = kept


def _named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, nn.Parameter]]:
    return [
        (name, parameter)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]


def save(folder: Path, step: int, tensors: dict[str, Tensor], run: str, *, keep: int) -> Path:
    """Write one checkpoint, then delete all but the newest `keep`, and later ones: those steps are done again.

    Args:
        folder: The run's folder of checkpoints.
        step: Optimizer steps done.
        tensors: From `state`.
        run: Identity of the run: a hash of its settings and data.
        keep: Number of checkpoints to keep, at least 1.

    Raises:
        DagmanError: `E-DISK`, exit code 6; older checkpoints are then as they were.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}{files.TEMPORARY_SUFFIX}"
    files.remove_folder(temporary)
    files.write_atomic(temporary / _TENSORS, lambda path: safetensors.torch.save_file(tensors, path))
    manifest = {
        "format": FORMAT,
        "step": step,
        "run": run,
        "files": {_TENSORS: files.sha256_file(temporary / _TENSORS)},
    }
    files.write_json(temporary / _MANIFEST, manifest)
    files.publish_folder(temporary, final)
    found = _folders(folder)
    written = found.index(final)
    for other in (*found[:written], *found[written + keep :]):
        files.remove_folder(other)
    return final


def newest(folder: Path, run: str) -> Found | None:
    """The newest checkpoint that is whole and belongs to `run`; None where none was ever finished.

    Raises:
        DagmanError: `E-CHECKPOINT`, exit code 4, where there are checkpoints and none can be used.
    """
    damaged: list[str] = []
    for path in _folders(folder):
        try:
            step, tensors = _read(path, run)
        except _DamagedError as error:
            damaged.append(f"{path.name} {error}")
            continue
        return Found(step=step, tensors=tensors, damaged=tuple(damaged))
    if damaged:
        raise DagmanError(
            "CHECKPOINT",
            folder,
            f"holds no checkpoint that can be used ({'; '.join(damaged)})",
            "restore one from a backup, or choose another output folder to start again from step 0",
            exit_code=ExitCode.REFUSED,
        )
    return None


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


def _read(path: Path, run: str) -> tuple[int, dict[str, Tensor]]:
    try:
        manifest: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            raise _DamagedError(f"was written by a newer version (format {manifest['format']}, known is {FORMAT})")
        if manifest["run"] != run or path.name != f"step-{manifest['step']:08d}":
            raise _DamagedError("belongs to another run or step")
        for name, digest in manifest["files"].items():
            if files.sha256_file(path / name) != digest:
                raise _DamagedError(f"is damaged: {name} is not what was written")
        return int(manifest["step"]), safetensors.torch.load_file(path / _TENSORS)
    except FileNotFoundError as error:
        raise _DamagedError(f"lacks {Path(error.filename).name}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise _DamagedError(f"is damaged ({type(error).__name__})") from None


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint, by its name alone; 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in _folders(folder)), default=0)


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first; not what somebody put beside them, such as a copy of one."""
    named = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted(named, reverse=True)
