"""What a training loop stands on: devices and precision, the optimizer, the loader, and a clean stop."""

import contextlib
import math
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment
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
        devices: Processes on this machine. `torchrun` and `srun` may have started them; a Slurm job alone starts none.
        precision: `bf16` is mixed: weights, losses and centers stay float32.
        device: Where to compute; without it the GPU where there is one.

    Raises:
        DagmanError: `E-DEVICE` for a kind of device that is not there, more of it than there are, or another number
            than a launcher started processes.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.cuda.device_count() if kind == "cuda" else devices
    if kind == "cuda" and not found:
        raise DagmanError("DEVICE", "device cuda", "no CUDA device is here", "leave the device out, or give cpu")
    if devices < 1:
        raise DagmanError("DEVICE", f"devices {devices}", "is no number of processes", "give at least 1")
    if devices > found:
        raise DagmanError("DEVICE", f"devices {devices}", f"{found} of kind {kind} found", f"give 1 to {found}")
    launcher, started = _launched(devices)
    if launcher and started != devices:
        problem = f"but {launcher} started {started} processes here"
        raise DagmanError("DEVICE", f"devices {devices}", problem, f"give devices {started}, or start one process")
    try:
        engine = Fabric(
            accelerator=kind,
            devices=devices,
            strategy="ddp" if devices > 1 else "auto",
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            plugins=None if launcher else [LightningEnvironment()],
        )
        engine.launch()
    except (ValueError, RuntimeError) as error:
        if not launcher:
            raise
        why = str(error).strip().splitlines()[0]
        advice = f"ask {launcher} for one machine and as many processes as devices"
        raise DagmanError("DEVICE", launcher, f"what it started cannot work together ({why})", advice) from error
    return engine


def _launched(devices: int) -> tuple[str, int]:
    """Who started this process as one of several that share a work, and how many; no name where nobody did.

    Tasks of `srun` with one device each are works of their own; so is what the first process of a work does alone.
    """
    alone = devices == 1 and torch.distributed.is_available() and torch.distributed.is_initialized()
    if "TORCHELASTIC_RUN_ID" in os.environ and not alone:
        return "torchrun", int(os.environ["LOCAL_WORLD_SIZE"])
    if devices > 1 and (tasks := os.environ.get("SLURM_STEP_NUM_TASKS", "1")) != "1":
        return "srun", int(tasks)
    return "", 1


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


def batches(
    engine: Fabric, dataset: Dataset[Any], order: Sampler[int], collate: Any, *, batch: int, workers: int
) -> Iterator[Any]:
    """Batches on the device, in the order of `order` whatever the number of workers.

    Raises:
        DagmanError: What a sample raises, in whichever process it is read; `E-READER`, exit code 75, where reading
            stops for a reason of its own, such as a process that was killed.
    """
    processes: dict[str, Any] = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dagman.ct.datasets"])
        processes = {"multiprocessing_context": context, "prefetch_factor": AHEAD, "worker_init_fn": _leave_signals}
    loader = DataLoader(
        _Told(dataset),
        batch_size=batch,
        sampler=order,
        collate_fn=_ToldCollate(collate),
        num_workers=workers,
        pin_memory=engine.device.type == "cuda",
        **processes,
    )
    try:
        for given in engine.setup_dataloaders(loader, use_distributed_sampler=False):
            if isinstance(given, DagmanError):
                raise given
            yield given
    except DagmanError:
        raise
    except (RuntimeError, OSError, EOFError) as error:
        if _is_memory(error) or not (workers or isinstance(error, OSError)):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        advice = "see to what it names, then run the same command to continue"
        raise DagmanError("READER", "data", f"reading stopped ({why})", advice, exit_code=ExitCode.STOPPED) from error


class _Told(Dataset[Any]):
    """Samples, or the coded errors that stand in their place: PyTorch makes others of what a process raises."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, sample: int) -> Any:
        try:
            return self.dataset[sample]
        except DagmanError as error:
            return error


class _ToldCollate:
    """Samples as one batch, or the first coded error among them."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        errors = [sample for sample in samples if isinstance(sample, DagmanError)]
        return errors[0] if errors else self.collate(samples)


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
        if not _is_memory(error):
            raise
        raise _memory_error(error, advice) from error


def _is_memory(error: Exception) -> bool:
    """Also where a process that reads has met it: PyTorch makes a RuntimeError of all that one raises."""
    said = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "Unable to allocate", "MemoryError")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in said)


def _memory_error(error: Exception, advice: str) -> DagmanError:
    first = (str(error).splitlines() or ["MemoryError"])[0]
    return DagmanError("MEMORY", "training", f"ran out of memory ({first})", advice, exit_code=ExitCode.RESOURCES)


@contextlib.contextmanager
def company_guard() -> Iterator[None]:
    """Turn the loss of another process of a run into `E-PROCESS`, exit code 6: most often it ran out of memory."""
    try:
        yield
    except RuntimeError as error:
        why = (str(error).strip().splitlines() or [""])[0]
        if "gloo/transport" not in why and "ncclRemoteError" not in str(error):
            raise
        advice = "see what it said, or the system's log of killed processes, then run the same command to continue"
        plain = re.sub(r"^\[\S+\] | This is typically.*", "", why).strip(" .")
        problem = f"another process of the run ended ({plain})"
        raise DagmanError("PROCESS", "training", problem, advice, exit_code=ExitCode.RESOURCES) from error


def all_finite(values: Sequence[float]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(math.isfinite(value) for value in values)


def mean_over_ranks(engine: Fabric, values: Tensor) -> Tensor:
    """The mean over all processes; one NaN anywhere is a NaN everywhere."""
    if engine.world_size == 1:
        return values
    reduced: Tensor = engine.all_reduce(values, reduce_op="mean")
    return reduced
