"""Compiles the kernels for CPUs beside their sources, where there is a compiler; the package works without.

`pip install` runs it; `python hatch_build.py` compiles again after a change.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand, outside a build
    BuildHookInterface = object

FOLDER = Path(__file__).parent / "src" / "dagman" / "nets"
LEVELS = {
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    "avx512": ("-march=x86-64-v4",),
    "avx2": ("-march=x86-64-v3",),
}
"""The processor decides at run time which of them is loaded, and whether the first may use matrix tiles (AMX)."""
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp")


def compile_kernels() -> list[Path]:
    """Compile for each level of the instruction set; what was compiled. Says once why nothing was.

    What was compiled before from the same sources stays until it is replaced: it may be in use.
    """
    for old in FOLDER.glob("*kernel*.so"):
        if _digest() not in old.name:
            old.unlink()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or platform.machine() != "x86_64" or compiler is None:
        print("dagman: no C++ compiler for Linux on x86-64 found; all will run in PyTorch alone", file=sys.stderr)
        return []
    return [library for name, level in LEVELS.items() if (library := _compile(compiler.split(), name, level))]


def _compile(compiler: list[str], name: str, level: tuple[str, ...]) -> Path | None:
    """One library of all kernels; None, with the reason, where that fails."""
    sources = sorted(FOLDER.glob("*_kernel.cpp"))
    library = FOLDER / f"kernels.{name}.{_digest()}.so"  # as `dagman.nets.kernel` asks for
    fresh = library.with_suffix(".new")
    compiled = {source: source.with_suffix(f".{name}.o") for source in sources}
    # Linked without -fopenmp: the functions of OpenMP come from the one library that PyTorch has loaded.
    commands = [
        *([*compiler, *FLAGS, *level, "-mtune=native", "-c", source, "-o", to] for source, to in compiled.items()),
        [*compiler, "-shared", *compiled.values(), "-o", fresh],
    ]
    try:
        for command in commands:
            subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        fresh.replace(library)
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()[-500:]
        print(f"dagman: no {name} kernels, all will run in PyTorch alone: {why}", file=sys.stderr)
        return None
    finally:
        for to in [fresh, *compiled.values()]:
            to.unlink(missing_ok=True)
    return library


def _digest() -> str:
    """What tells libraries of these sources from those of others."""
    text = b"".join(path.read_bytes() for end in ("*_kernel.cpp", "*.h") for path in sorted(FOLDER.glob(end)))
    return hashlib.sha256(text).hexdigest()[:12]


class KernelHook(BuildHookInterface):  # type: ignore[misc]
    """Takes the compiled kernels into the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile before the wheel is put together."""
        if self.target_name == "wheel" and compile_kernels():
            build_data["artifacts"].append("src/dagman/nets/*.so")
            build_data.update(pure_python=False, infer_tag=True)


if __name__ == "__main__":
    print(*compile_kernels(), sep="\n")
