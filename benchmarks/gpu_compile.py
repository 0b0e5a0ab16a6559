"""Compile every kernel for a GPU that is not there, and say what it takes: registers, stack, shared memory.

    PYTHONPATH=src python benchmarks/gpu_compile.py [--arch 90] [--widths 48 96 192]

The interpreter proves what kernels compute, but takes what the compiler refuses. Exits 1 where a kernel takes more
shared memory than the card has.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dagman.nets.gpu import attention, half, rows, tiles

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Most shared memory of a block (CUDA C++ Programming Guide, compute capabilities)."""
STAGE_WIDTHS = {48: 4, 96: 4, 192: 8, 384: 16}
"""Heads by width, as in the paper."""
SINGLE = {"gamma", "beta", "bias", "kept"}
"""Pointers to float32 whatever products are made of, beside sums over programs."""


def sums(name: str) -> bool:
    """Whether a pointer is to what programs sum in float32."""
    return name.startswith("sum_") or name in {
        "of_bias", "of_pad", "of_weight1", "of_bias1", "of_weight2", "of_gamma", "of_beta",
    }  # fmt: skip


def launches(width: int, heads: int, kind: str) -> list[tuple[Any, dict[str, Any], int]]:
    """Kernels that blocks of that width use, their sizes and their warps."""
    head_width = width // heads
    sizes: dict[str, Any] = {
        **tiles.windows(2, (64, 63, 64), 4, 2).options,
        "PADDED": True,
        "H": heads,
        "D": head_width,
        "DP": tiles.tile(head_width),
        "CP": tiles.tile(width),
        "C": width,
        "HIDDEN": 4 * width,
        "HP": 64,
        "M": tiles.ROWS,
        "K": 4 * width,
        "KP": 64,
        "DROPS": True,
        "EPS": 1e-5,
        "SCALE": head_width**-0.5,
        "PRECISION": "tf32x3" if kind == "fp32" else "tf32",
    }
    wide = tiles.warps(width)
    found = [(attention._forward, sizes, 4), (attention._backward, sizes, 4)]
    if width <= 96 and kind == "bf16":
        found += [(half._forward, sizes, wide), (half._backward, sizes, 8), (rows._forward, sizes, wide)]
        found += [(rows._hidden_backward, sizes, 8), (rows._norm_backward, sizes, wide)]
    return found


def compiled(kernel: Any, sizes: dict[str, Any], warps: int, kind: str, arch: int) -> dict[str, Any]:
    """What a kernel takes."""
    constants, signature, scalars = {}, {}, ("count", "X", "Y", "Z", "rows", "each")
    for name, parameter in zip(kernel.arg_names, kernel.params, strict=True):
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", sizes[name]
        else:
            signature[name] = "i32" if name in scalars else "*fp32" if name in SINGLE or sums(name) else f"*{kind}"
    aligned = {
        (at,): [["tt.divisibility", 16]] for at, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": warps, "num_stages": 1},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared_kib": made.metadata.shared / 1024}


def main() -> int:
    """Print a line for each kernel."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_KIB))
    parser.add_argument("--widths", type=int, nargs="+", default=[48, 96, 192], choices=sorted(STAGE_WIDTHS))
    options = parser.parse_args()
    fits = True
    for kind in ("bf16", "fp32"):
        for width in options.widths:
            for kernel, sizes, warps in launches(width, STAGE_WIDTHS[width], kind):
                name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
                row = compiled(kernel, sizes, warps, kind, options.arch)
                fits &= row["shared_kib"] <= SHARED_KIB[options.arch]
                told = "  ".join(f"{what} {value:g}" for what, value in row.items())
                print(f"{name:24} width {width:3} {kind} warps {warps}  {told}", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
