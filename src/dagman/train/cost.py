"""What a run will take, said before it takes it: sizes, memory, time, and what the paper's size would cost here."""

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from dagman.errors import duration
from dagman.nets.encoder import EncoderConfig
from dagman.nets.swin import SwinConfig
from dagman.nets.vit import ViTConfig
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.train.settings import PretrainConfig
from dagman.types import Views

PAPER_CROP = (128, 128, 128)
PAPER_EPOCHS = 800


def parameters(module: nn.Module | None) -> int:
    """Number of weights."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def size_line(module: CoDistillation) -> str:
    """Weights of the parts, and the memory that weights, gradients and optimizer will take."""
    encoder, heads, voxel = (
        parameters(part) for part in (module.student.encoder, module.student.heads, module.student.voxel_head)
    )
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    # Weight, gradient and two moments of AdamW for what is trained; the weight alone for the teacher.
    held = 4 * (4 * trained + parameters(module.teacher))
    return (
        f"encoder {encoder / 1e6:.2f} M parameters, voxel head {voxel / 1e6:.2f} M, "
        f"distillation heads {heads / 1e6:.2f} M; with teacher and optimizer {held / 2**30:.2f} GiB"
    )


def encoder_flops(encoder: EncoderConfig, crop: tuple[int, int, int]) -> float:
    """Floating-point operations of one forward pass of one view: two for each multiplication of a matrix product.

    Args:
        encoder: Sizes of the network.
        crop: Sides of the view in voxels (x, y, z).
    """
    if isinstance(encoder, ViTConfig):
        patch, width = encoder.patch_side**3, encoder.width
        tokens = math.prod(crop) // patch
        block = _block_flops(tokens + 1, width, tokens + 1, encoder.mlp_ratio)
        return 2.0 * tokens * patch * width + encoder.depth * block
    tokens, width = math.prod(crop) // 8, encoder.embed_dim
    flops = 2.0 * 8 * tokens * width
    for stage, depth in enumerate(encoder.depths, 1):
        flops += depth * _block_flops(tokens, width, encoder.window**3, encoder.mlp_ratio)
        tokens, width = tokens // 8, 2 * width
        flops += 2 * tokens * 4 * width * width
        if encoder.attention and encoder.attention.stage == stage:
            blocks = encoder.attention.num_blocks
            flops += blocks * _block_flops(tokens + 1, width, tokens + 1, encoder.attention.mlp_ratio)
    return flops


def _block_flops(tokens: int, width: int, attended: int, mlp_ratio: float) -> float:
    """A transformer block in which each token attends to `attended` others."""
    return 2 * tokens * width * ((4 + 2 * mlp_ratio) * width + 2 * attended)


class Measured(NamedTuple):
    """What one pair of views takes, forward and backward."""

    seconds: float
    base_gib: float
    """Memory before."""
    pair_gib: float
    """Memory on top of it."""
    machine_gib: float = math.inf
    """Memory there is, of the GPU or of this machine."""


def built(config: PretrainConfig, device: torch.device | str) -> CoDistillation:
    """The networks of a run with new weights, to be measured."""
    module = CoDistillation(config.encoder, config.method, mean_intensity=0.5, crop=config.data.crop)
    return module.to(device).train()


def measure(module: CoDistillation, config: PretrainConfig) -> Measured:
    """Time and memory of one pair of views of noise, after one pass to warm up.

    Small pairs are measured together, as many of a batch as fit in 64^3 voxels, and shared out. Leaves the module, its
    gradients and the random numbers as they were.
    """
    device = next(module.parameters()).device
    pairs = max(1, min(config.optimisation.batch_size, 64**3 // math.prod(config.data.crop)))
    images = torch.rand(2, pairs, 1, *config.data.crop, generator=torch.Generator().manual_seed(0)).to(device)
    views = Views(u=images[0], v=images[1], rows=torch.zeros(pairs, dtype=torch.long), padding=torch.zeros(pairs))
    seconds, base = 0.0, memory_gib(device)
    own = [device] if device.type == "cuda" else []
    for gpu in own:
        torch.cuda.reset_peak_memory_stats(gpu)
    with torch.random.fork_rng(devices=own):
        for _ in range(2):
            started = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.optimisation.precision == "bf16"):
                outcome = module(views, Knobs(0.04, 0.04, attended=True), torch.Generator().manual_seed(0))
            outcome.losses.total.backward()
            outcome.losses.total.item()  # waits for a GPU
            seconds = time.perf_counter() - started
            module.zero_grad(set_to_none=True)
    pair_gib = max(0.0, memory_gib(device, peak=True) - base) / pairs
    return Measured(seconds / pairs, base, pair_gib, _machine_gib(device))


def step_seconds(config: PretrainConfig, pair: Measured) -> float:
    """Seconds of an optimizer step, without an examination."""
    return pair.seconds * config.optimisation.batch_size * config.optimisation.accumulate


def time_line(config: PretrainConfig, pair: Measured, steps_left: int, num_volumes: int, devices: int) -> str:
    """Time and memory of a run, and what the paper's size, where it is another, would take on these volumes here.

    The extrapolation assumes that time grows with the floating-point operations of the encoder.

    Args:
        config: Settings of the run.
        pair: What one pair takes.
        steps_left: Optimizer steps to do.
        num_volumes: Volumes to train on.
        devices: Processes that share a step.
    """
    seconds = step_seconds(config, pair)
    needed = pair.base_gib + config.optimisation.batch_size * pair.pair_gib
    too_much = f", more than the {pair.machine_gib:.1f} GiB there are" if needed > pair.machine_gib else ""
    here = (
        f"about {_three_digits(seconds)} s a step, {duration(seconds * steps_left)} in all without examinations "
        f"(step 1, every {config.optimisation.examine_every}, the last), probes and pictures; "
        f"about {needed:.1f} GiB{too_much}"
    )
    paper_encoder, size = (
        (SwinConfig(), "embedding 48") if isinstance(config.encoder, SwinConfig) else (ViTConfig(), "width 768")
    )
    factor = encoder_flops(paper_encoder, PAPER_CROP) / encoder_flops(config.encoder, config.data.crop)
    if math.isclose(factor, 1):
        return here
    paper = pair.seconds * factor * num_volumes * PAPER_EPOCHS / devices
    return (
        f"{here}; the paper's size ({size}, crop 128^3, {PAPER_EPOCHS} epochs) on these {num_volumes} volumes would "
        f"take about {duration(paper)} here, if time grows with the encoder's operations ({_three_digits(factor)} "
        f"times as many a pair)"
    )


def _three_digits(value: float) -> str:
    """A number above 0 with three significant digits: 1200, 3.39, 0.0123."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(rounded)))}f}"


def memory_gib(device: torch.device, *, peak: bool = False) -> float:
    """Memory in use on a GPU, or by this process; at its peak until now, where asked."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)) / 2**30
    now = Path("/proc/self/statm")
    if peak or not now.exists():
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes / (2**30 if sys.platform == "darwin" else 2**20)
    return int(now.read_text().split()[1]) * resource.getpagesize() / 2**30


def _machine_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory) / 2**30
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([installed, *allowances(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]) / 2**30


def allowances(own: Path, root: Path) -> Iterator[int]:
    """Bytes that control groups grant this process: a container's, or a cluster job's, and those around it.

    Args:
        own: `/proc/self/cgroup`; there on Linux only.
        root: Where groups are mounted, of version 1 or 2.
    """
    for line in own.read_text().splitlines() if own.exists() else []:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if kinds else (root, "memory.max")
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            limit = folder / name
            if folder.is_relative_to(top) and limit.is_file() and (granted := limit.read_text().strip()).isdigit():
                yield int(granted)
