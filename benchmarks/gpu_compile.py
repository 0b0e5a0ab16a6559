"""Compile every kernel for a GPU that is not there, and say what it takes: registers, stack, shared memory.

    PYTHONPATH=src python benchmarks/gpu_compile.py [--arch 90] [--widths 48 96 192]

Blocks of the paper's widths, with its heads and with the widest that the kernels take, run forward and backward up to
each launch, which only compiles: with the arguments, types, sizes and stages of a real one on such a card. The
interpreter proves what kernels compute, but takes what the compiler refuses. Exits 1 where a kernel takes more shared
memory than the card has.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dagman.nets import gpu
from dagman.nets.gpu import tiles
from dagman.nets.stage import WindowBlock

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Most shared memory of a block (CUDA C++ Programming Guide, compute capabilities)."""
HEADS = {48: 4, 96: 4, 192: 8, 384: 16}
"""Of the paper's blocks, by width."""


class AbsentCard:
    """What Triton asks a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """The card to compile for."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, _: int) -> int:
        """The default one."""
        return 0


def usage(binary: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {word.lower(): int(re.search(rf"{word}:(\d+)", told)[1]) for word in ("REG", "STACK")}


def compiled(width: int, heads: int, kind: torch.dtype, stages: int) -> list[dict[str, Any]]:
    """A row for each kernel of a block, forward and backward, on a map that windows reach over."""
    rows = []

    def compile_only(kernel: Any, number: int, _: Any, *args: Any, warps: int = 4, **sizes: Any) -> None:
        made = kernel.warmup(*args, grid=(number,), num_warps=warps, num_stages=stages, **sizes)
        name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
        shared = made.metadata.shared / 1024
        rows.append({"kernel": name, "warps": warps, **usage(made.asm["cubin"]), "shared_kib": shared})

    on_card = "tf32x3" if kind == torch.float32 else "tf32"
    block = WindowBlock(width, num_heads=heads, window=4, shift=2, mlp_ratio=4.0, drop_path=0.1).train()
    x = torch.randn(1, 8, 8, 6, width).to(kind).requires_grad_()
    with (
        mock.patch.object(tiles, "launch", compile_only),
        mock.patch.object(tiles, "precision", return_value=on_card),
        mock.patch.object(gpu, "fuses", lambda y, _: y.shape[-1] <= 96 and kind == torch.bfloat16),
        gpu.forced("triton"),
        torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16),
    ):
        out = block(x)
        out.sum().backward()
    return rows


def main() -> int:
    """Print a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_KIB))
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 96, 192], choices=sorted(HEADS))
    options = parser.parse_args()
    driver.set_active(AbsentCard(options.arch))
    fits, stages = True, tiles.stages(1024 * SHARED_KIB[options.arch])
    blocks = [(width, heads) for width in options.widths for heads in (HEADS[width], -(-width // gpu.MOST_HEAD_WIDTH))]
    for kind in (torch.bfloat16, torch.float32):
        for width, heads in blocks:
            for row in compiled(width, heads, kind, stages):
                fits &= row["shared_kib"] <= SHARED_KIB[options.arch]
                shown = "  ".join(f"{name} {value}" for name, value in row.items())
                print(f"width {width:3}  heads {heads:2}  {str(kind)[6:]:8}  stages {stages}  {shown}")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
