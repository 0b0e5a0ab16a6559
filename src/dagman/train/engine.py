"""What a training loop stands on: devices and precision, the optimizer, the loader, and a clean stop."""

import contextlib
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from dagman.errors import DagmanError, ExitCode
from dagman.randomness import torch_seed
from dagman.types import Precision

AHEAD = 2
"""Batches that a loader's process may be ahead of the training."""
_SUMMED = 1 << 18
"""Squares that float32 sums up: some processors' products lose digits with each that is added."""


def fabric(devices: int, precision: Precision, device: Literal["cpu", "cuda"] | None = None) -> Fabric:
    """Start the processes that share the work; with several devices the command runs once on each.

    Args:
        devices: Processes on this machine; under `torchrun` or Slurm, what these were told.
        precision: `bf16` is mixed: weights, losses and centers stay float32.
        device: Where to compute; without it the GPU where there is one.

    Raises:
        DagmanError: `E-DEVICE` for a kind of device that is not there, or more of it than there are.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.cuda.device_count() if kind == "cuda" else devices
    if kind == "cuda" and not found:
        raise DagmanError("DEVICE", "device cuda", "no CUDA device is here", "leave the device out, or give cpu")
    if devices < 1:
        raise DagmanError("DEVICE", f"devices {devices}", "is no number of processes", "give at least 1")
    if devices > found:
        raise DagmanError("DEVICE", f"devices {devices}", f"{found} of kind {kind} found", f"give 1 to {found}")
    engine = Fabric(
        accelerator=kind,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
    )
    engine.launch()
    return engine


def torch_generator(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A generator of the CPU, keyed as those of `randomness`."""
    return torch.Generator().manual_seed(torch_seed(seed, purpose, *index))


def slow_bf16(device: torch.device, precision: Precision) -> bool:
    """Whether a processor is asked for bfloat16 that it has no instructions for: several times slower than float32."""
    can = torch.cpu.get_capabilities()
    return (
        (device.type, precision) == ("cpu", "bf16")
        and can.get("architecture") == "x86_64"
        and not (can.get("avx512_bf16") or can.get("amx_bf16"))
    )


def adamw(
    module: nn.Module,
    weight_decay_less: Sequence[str] = ("token", "table"),
    scales: Mapping[nn.Parameter, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW in groups: what weight decay pulls at, and biases, norms, tokens and position tables.

    Args:
        module: Its parameters that need a gradient are optimised.
        weight_decay_less: Endings of the names of parameters without weight decay, beside all of one dimension.
        scales: Factor on the learning rate of a parameter, 1 for those not named; each factor is a group of its own.

    Reference:
        AttMask's `get_params_groups` (biases and all of one dimension), here with tokens and position tables;
        layer-wise rates: BEiT's `get_parameter_groups`.
    """
    groups: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim < 2 or name.endswith(tuple(weight_decay_less))
            scale = (scales or {}).get(parameter, 1.0)
            groups.setdefault((scale, free), []).append((name, parameter))
    given: list[dict[str, Any]] = [
        {"params": named, "scale": scale, "decayed": not free} | ({"weight_decay": 0.0} if free else {})
        for (scale, free), named in sorted(groups.items(), key=lambda item: item[0])
    ]
    optimizer = torch.optim.AdamW(given, fused=True)
    optimizer.register_step_post_hook(lambda stepped, *_: setattr(stepped, "grad_scale", None))  # of `clip`
    return optimizer


def clip(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """Measure the gradient; where its norm is above `most`, the optimizer's next step divides by the excess.

    It does so as it reads the gradients, which saves a pass over them beside `torch.nn.utils.clip_grad_norm_`.

    Args:
        optimizer: Fused, as `adamw` makes it; Fabric may have wrapped it.
        most: Largest norm of all gradients together.

    Returns:
        The norm before, NaN or infinite where a gradient is.
    """
    fused: Any = getattr(optimizer, "optimizer", optimizer)
    given = [parameter.grad for group in fused.param_groups for parameter in group["params"]]
    norm = _norm([gradient for gradient in given if gradient is not None])
    fused.grad_scale = (norm / most).clamp(min=1.0).float()
    return norm


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all together. On CPUs the norms of PyTorch sum up in one thread, to fewer digits."""
    if not gradients or any((each.device.type, each.dtype) != ("cpu", torch.float32) for each in gradients):
        return nn.utils.get_total_norm(gradients)
    pieces = [piece for each in gradients for piece in torch.split(each.flatten(), _SUMMED)]
    return torch.stack([torch.dot(piece, piece) for piece in pieces]).double().sum().sqrt()


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Give the next step its learning rate, and the groups with weight decay theirs."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
        if group["decayed"]:
            group["weight_decay"] = weight_decay


def loader(
    engine: Fabric, dataset: Dataset[Any], order: Sampler[int], collate: Any, *, batch: int, workers: int
) -> Any:
    """Batches on the device, in the order of `order` whatever the number of workers."""
    processes: dict[str, Any] = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dagman.ct.datasets"])
        processes = {"multiprocessing_context": context, "prefetch_factor": AHEAD, "worker_init_fn": _leave_signals}
    batches = DataLoader(
        dataset,
        batch_size=batch,
        sampler=order,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=engine.device.type == "cuda",
        **processes,
    )
    return engine.setup_dataloaders(batches, use_distributed_sampler=False)


def _leave_signals(_: int) -> None:
    """Ctrl-C reaches the whole process group, but the training process still wants the batches under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class StopRequest(contextlib.AbstractContextManager["StopRequest"]):
    """While entered, SIGTERM, SIGUSR1 and SIGINT only raise a flag; a second SIGINT interrupts at once.

    A coded error that leaves it is told of the flag, in `stop_asked`.

    Args:
        aloud: Say on standard error that the signal was heard.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, *, aloud: bool = True) -> None:
        self.aloud = aloud
        self.wanted = False
        """A signal came to this process."""
        self.agreed = False
        """All processes know, and stop after the step they are in."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(ValueError):  # only the main thread gets signals
            for name in self.SIGNALS:
                self._before[name] = signal.signal(name, self._ask)
        return self

    def __exit__(self, _kind: object, error: object, _trace: object) -> None:
        if isinstance(error, DagmanError):
            error.stop_asked = self.wanted or self.agreed
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.aloud and not self.wanted:
            with contextlib.suppress(OSError):  # not `print`: the signal may have come in the middle of one
                os.write(2, b"stopping at the end of this step\n")
        self.wanted = True


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """While entered, numbers too small for full precision become 0.

    Gradients of attention underflow, and each such number costs ten times a normal one.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def memory_guard(advice: str) -> Iterator[None]:
    """Turn running out of memory into `E-MEMORY`, exit code 6, with the advice."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _memory_error(error, advice) from error
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise _memory_error(error, advice) from error


def _memory_error(error: Exception, advice: str) -> DagmanError:
    first = (str(error).splitlines() or ["MemoryError"])[0]
    return DagmanError("MEMORY", "training", f"ran out of memory ({first})", advice, exit_code=ExitCode.RESOURCES)


def all_finite(values: Sequence[float]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(value) for value in values)


def mean_over_ranks(engine: Fabric, values: Tensor) -> Tensor:
    """The mean over all processes; one NaN anywhere is a NaN everywhere."""
    if engine.world_size == 1:
        return values
    reduced: Tensor = engine.all_reduce(values, reduce_op="mean")
    return reduced
