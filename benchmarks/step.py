"""Time and memory of whole pretraining steps of the paper's recipe, beside MONAI's Swin put together plainly.

Each variant runs in a process of its own; their steps alternate, so that whatever else the machine does hits all alike.

    python benchmarks/step.py --crops 64 96 --rounds 5 --json benchmarks/results/step.json
    python benchmarks/step.py --ladder          # one part of the fast path taken away at a time
    python benchmarks/step.py --smit ~/SMIT     # beside the published step, checked out by you
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import rungs
from rungs import PLAIN, RUNGS

ALLOCATORS = ("default", "tuned")
WARM_UP = 2
AT_ONCE = 5
"""Rungs of the ladder whose processes live side by side."""
PARTS = {
    "window attention": ("WindowKernel", "bmm", "softmax", "scaled_dot", "flash"),
    "matrix products": ("aten::mm", "addmm", "mkldnn_linear", "MlpKernel"),
    "between products": ("layer_norm", "gelu", "Residual", "BiasGelu"),
    "copies": ("copy_", "index_select", "aten::cat", "fill_", "roll", "index"),
    "convolutions": ("conv",),
    "optimizer and teacher": ("adamw", "lerp", "foreach", "linalg_vector_norm", "aten::dot"),
}


class Ours:
    """A step of a recipe as `train.pretrain` takes it."""

    def __init__(self, recipe: Any, crop: int, *, checkpointing: bool) -> None:
        from dagman.nets.encoder import checkpoint_blocks
        from dagman.pretext.codistill import CoDistillation, Knobs
        from dagman.train import engine

        self.module = CoDistillation(recipe.encoder, recipe.method, mean_intensity=0.4, crop=(crop,) * 3).train()
        if checkpointing:
            checkpoint_blocks(self.module.student.encoder)
        self.optimizer = engine.adamw(self.module)
        self.knobs = Knobs(0.04, 0.04, attended=True)

    def step(self, views: Any, number: int, *, bf16: bool) -> float:
        """Forward, backward, optimizer, teacher, centers; the loss."""
        import torch

        from dagman.train import engine

        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            outcome = self.module(views, self.knobs, torch.Generator().manual_seed(number))
        outcome.losses.total.backward()
        engine.clip(self.optimizer, 3.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.module.update_teacher(0.99)
        self.module.move_centers(outcome.means)
        return float(outcome.losses.total.item())


def stepper(variant: str, crop: int, smit: str | None) -> Any:
    """What takes the steps of a variant."""
    from dagman import recipes

    recipe = recipes.get("dagman-swin")
    if variant == "monai":
        from plain import PlainStep

        return PlainStep(recipe.encoder, recipe.method, crop)
    if variant == "smit":
        from published import PublishedStep

        return PublishedStep(Path(str(smit)), crop)
    removed = list(PLAIN) if variant == "plain" else [name for name in RUNGS if variant == f"fast without {name}"]
    for name in removed:
        RUNGS[name](rungs.replace)
    return Ours(recipe, crop, checkpointing=variant == "fast with checkpointing")


def serve(variant: str, crop: int, batch: int, precision: str, smit: str | None) -> None:
    """A child: takes a step for each line of standard input and answers with what it took, as JSON."""
    import contextlib

    import torch

    from dagman.train import engine
    from dagman.types import Views

    torch.manual_seed(0)
    taker = stepper(variant, crop, smit)
    images = torch.rand(2, batch, 1, crop, crop, crop)
    views = Views(images[0], images[1], torch.arange(batch), torch.zeros(batch))
    ours = variant not in ("monai", "smit")
    with engine.flushed_denormals() if ours else contextlib.nullcontext():
        for number, line in enumerate(sys.stdin):
            wall, cpu = time.perf_counter(), time.process_time()
            if line.strip() == "profile":
                with torch.profiler.profile() as record:
                    taker.step(views, number, bf16=precision == "bf16")
                found: dict[str, Any] = {"parts": shares(record)}
            else:
                loss = taker.step(views, number, bf16=precision == "bf16")
                found = {"loss": loss, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            found["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps(found), flush=True)


def shares(record: Any) -> dict[str, float]:
    """Share of the time of each part of a step."""
    found = dict.fromkeys([*PARTS, "other"], 0.0)
    for event in record.key_averages():
        name = next((part for part, words in PARTS.items() if any(w in event.key for w in words)), "other")
        found[name] += event.self_cpu_time_total
    total = sum(found.values())
    return {name: value / total for name, value in found.items()}


class Child:
    """A process that takes the steps of one variant."""

    def __init__(self, variant: str, allocator: str, case: tuple[int, int, str], smit: str | None) -> None:
        from dagman.cli import KEEP_MEMORY

        environment = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
        environment |= KEEP_MEMORY if allocator == "tuned" else {}
        command = [sys.executable, __file__, "--serve", variant, *map(str, case), *([smit] if smit else [])]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, word: str = "step") -> dict[str, Any]:
        """Have one step taken."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a step failed: {self.process.args}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def measure(variants: list[str], allocator: str, case: tuple[int, int, str], options: Any) -> list[dict[str, Any]]:
    """Rows of some variants; a few at a time, and `fast` beside all, as each holds its memory."""
    ladder = [variant for variant in variants if variant.startswith("fast ")]
    others = [variant for variant in variants if variant not in ladder]
    groups = [others, *(["fast", *ladder[start : start + AT_ONCE]] for start in range(0, len(ladder), AT_ONCE))]
    steps: dict[str, list[dict[str, Any]]] = {}
    parts: dict[str, dict[str, float]] = {}
    beside: dict[str, dict[str, float]] = {}
    for group in filter(None, groups):
        children = {variant: Child(variant, allocator, case, options.smit) for variant in group}
        together: dict[str, list[dict[str, Any]]] = {}
        try:
            take_turns(children, together, options.rounds)
            if options.parts and group is others:
                parts = {variant: child.ask("profile")["parts"] for variant, child in children.items()}
        finally:
            for child in children.values():
                child.close()
        for variant, taken in together.items():
            steps.setdefault(variant, []).extend(taken)
            if "fast" in together and variant != "fast":
                beside[variant] = over(taken, together["fast"])
    crop, batch, precision = case
    rows = []
    for variant, taken in steps.items():
        row: dict[str, Any] = {"crop": crop, "batch": batch, "precision": precision, "variant": variant}
        row |= {"allocator": allocator, "steps": len(taken)}
        row["seconds_median"] = statistics.median(step["seconds"] for step in taken)
        row["seconds_least"] = min(step["seconds"] for step in taken)
        row["cpu_seconds"] = statistics.median(step["cpu_seconds"] for step in taken)
        row["peak_mib"] = max(step["peak_mib"] for step in taken)
        row |= {"over_fast": beside[variant]} if variant in beside else {}
        rows.append(row | ({"parts": parts[variant]} if variant in parts else {}))
    return rows


def over(steps: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as much as others took in the same rounds: medians."""
    pairs = list(zip(steps, others, strict=True))
    return {
        kind: statistics.median(one[kind] / other[kind] for one, other in pairs)
        for kind in ("seconds", "cpu_seconds", "peak_mib")
    }


def take_turns(children: dict[str, Child], steps: dict[str, list[dict[str, Any]]], rounds: int) -> None:
    """Add a step of each child to `steps`, round by round; the first two warm up: both still ask for new memory."""
    for number in range(WARM_UP + rounds):
        for variant, child in children.items():
            taken = child.ask()
            if number >= WARM_UP:
                steps.setdefault(variant, []).append(taken)


def show(rows: list[dict[str, Any]]) -> None:
    """One line a row, with how many times longer than `fast` it took."""
    fast = next((row for row in rows if row["variant"] == "fast"), rows[0])
    for row in rows:
        ratios = [row[name] / fast[name] for name in ("seconds_median", "cpu_seconds", "peak_mib")]
        print(
            f"{row['crop']:4d} x{row['batch']} {row['precision']:8s}{row['allocator']:8s} {row['variant']:32s}"
            f"{row['seconds_median']:8.2f} s (x{ratios[0]:.2f}) {row['cpu_seconds']:8.2f} CPU s (x{ratios[1]:.2f}) "
            f"{row['peak_mib']:8.0f} MiB (x{ratios[2]:.2f})",
            flush=True,
        )
        for part, share in (row.get("parts") or {}).items():
            print(f"       {part:24s}{100 * share:5.1f} %")


def kept_rows(path: Path, machine: str) -> list[dict[str, Any]]:
    """What a file holds, all of this machine: ratios between machines say nothing."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    if others := {row["machine"] for row in rows} - {machine}:
        raise SystemExit(f"{path} holds rows of {', '.join(sorted(others))}; give another file for {machine}")
    return rows


def main() -> None:
    """Measure, print, and write the rows if asked to."""
    from dagman import files
    from dagman.run import describe_environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"], choices=["float32", "bf16"])
    parser.add_argument("--allocators", nargs="+", default=ALLOCATORS, choices=ALLOCATORS)
    parser.add_argument("--variants", nargs="+", default=["monai", "plain", "fast"])
    parser.add_argument("--ladder", action="store_true", help="also the fast path without each of its parts")
    parser.add_argument("--parts", action="store_true", help="also where the time goes, by the profiler")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smit", help="a checkout of the published SMIT, to be timed too")
    parser.add_argument("--json", type=Path, help="where to write the rows; those of other cases there are kept")
    options = parser.parse_args()
    variants = [*options.variants, *(["smit"] if options.smit else [])]
    variants += [*(f"fast without {name}" for name in RUNGS), "fast with checkpointing"] if options.ladder else []
    cases = [(crop, batch, kind) for crop in options.crops for batch in options.batches for kind in options.precisions]
    here = describe_environment()["versions"]
    stamp = {"date": time.strftime("%Y-%m-%d"), "machine": f"{here['processor']}, {here['threads']} threads"}
    for case in cases:
        for allocator in options.allocators:
            rows = [row | stamp for row in measure(variants, allocator, case, options)]
            show(rows)
            if options.json:
                key = ("crop", "batch", "precision", "variant", "allocator")
                kept = kept_rows(options.json, stamp["machine"])
                new = {tuple(row[name] for name in key) for row in rows}
                rows = [row for row in kept if tuple(row[name] for name in key) not in new] + rows
                versions = describe_environment()["versions"] | {"load": round(os.getloadavg()[0], 1)}
                files.write_json(options.json, {"date": time.strftime("%Y-%m-%d"), "machine": versions, "rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6] if len(sys.argv) > 6 else None)
    else:
        main()
