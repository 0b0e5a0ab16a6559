"""Prove and time the GPU path: benchmarks/gpu.sh calls this, with little but torch, Triton and dagman installed.

Numerics of every kernel against float64 on the CPU; every kernel's time beside what the card's measured matrix
product and copy would need for its work; whole steps (teacher and student on both views, AdamW, EMA) of crops of
64^3, 96^3 and 128^3. A sample is a pair of views. Rows are ordered so that the most telling come first; what does
not fit into the minutes given is named at the end. With `--only` the other parts of the file stay as they are.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

TARGETS = "targets on an H200, 128^3, bf16: 4 ms a sample, 5 times the MONAI-like composition, 1.5 GB a sample"
DEVICE = "cuda"
NEEDED = ("torch", "triton", "numpy", "jaxtyping", "lightning_fabric")
WHERE_SECONDS = 45
"""Kept of the time for the part that says where it goes."""
PAPER_STAGES = ((48, 4, 2), (96, 4, 4), (192, 8, 8), (384, 16, 16))
"""Width and heads of a stage's blocks, and voxels a side of one of its tokens."""


def missing() -> list[str]:
    """One line for each thing that this machine lacks."""
    lines = [f"missing: {name} (pip install {name})" for name in NEEDED if importlib.util.find_spec(name) is None]
    if not lines:
        import torch

        if not torch.cuda.is_available():
            lines.append(f"missing: a CUDA device that torch {torch.__version__} sees")
    return lines


def milliseconds(run: Callable[[], object], seconds: float = 0.5) -> float:
    """Median time of a call by device events, after a warm-up."""
    import torch

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end or len(times) < 5:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """What the card does at best here: bfloat16 products and copies."""
    import torch

    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return {
        "matmul_tflops": 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9,
        "copy_tbs": 2 * 2**30 / milliseconds(lambda: target.copy_(source)) / 1e9,
    }


def distance(found: Any, exact: Any) -> float:
    """Relative, by the norm."""
    return ((found.detach().double().cpu() - exact).norm() / exact.norm()).item()


def proofs() -> Iterator[dict[str, Any]]:
    """Largest relative errors of outputs and gradients of a block of each kind, against float64 on the CPU."""
    import torch
    from torch import nn

    from dagman.nets import gpu
    from dagman.nets.stage import WindowBlock

    grids = [(2, 8, 8, 12), (1, 6, 5, 9), (2, 2, 3, 4)]
    for width, heads in [(24, 2), (48, 4), (96, 4), (192, 8)]:
        for kind in (torch.float32, torch.bfloat16):
            worst = {"out": 0.0, "gradient": 0.0, "plain_gradient": 0.0}
            for number, (batch, *grid) in enumerate(grids):
                torch.manual_seed(number)
                block = WindowBlock(
                    width, num_heads=heads, window=4, shift=2 * (number % 3 > 0), mlp_ratio=4.0, drop_path=0.0
                )
                for name, parameter in block.named_parameters():
                    if "norm" in name or "bias" in name:
                        nn.init.normal_(parameter)
                x, probe = torch.randn(2, batch, *grid, width).to(kind).float()
                exact, y = copy.deepcopy(block).double(), x.double().requires_grad_()
                expected = exact(y)
                wanted = torch.autograd.grad((expected * probe).sum(), [y, *exact.parameters()])
                block = block.to(DEVICE)
                for path in ("plain", "triton"):
                    y = x.to(DEVICE).to(kind).requires_grad_()
                    autocast = torch.autocast(DEVICE, torch.bfloat16, enabled=kind == torch.bfloat16)
                    with gpu.forced(path), autocast:
                        found = block(y)
                    gradients = torch.autograd.grad((found * probe.to(DEVICE)).sum(), [y, *block.parameters()])
                    errors = [distance(*pair) for pair in zip(gradients, wanted, strict=True)]
                    if path == "triton":
                        worst["out"] = max(worst["out"], distance(found, expected))
                        worst["gradient"] = max(worst["gradient"], *errors)
                    else:
                        worst["plain_gradient"] = max(worst["plain_gradient"], *errors)
            # bfloat16: 1 % and 2 %, or what the plain path reaches where small maps make more impossible
            limits = (1e-6, 1e-5) if kind == torch.float32 else (1e-2, max(2e-2, 1.5 * worst["plain_gradient"]))
            holds = worst["out"] <= limits[0] and worst["gradient"] <= limits[1]
            yield {"width": width, "type": str(kind)[6:], **worst, "limits": limits, "holds": holds}


def kernel_times(ceiling: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Each half of a block and the attention alone on the maps of two views of 128^3, and their share of the card."""
    import torch

    from dagman.nets import gpu
    from dagman.nets.stage import WindowBlock

    for width, heads, side in PAPER_STAGES:
        grid = (128 // side,) * 3
        block = WindowBlock(width, num_heads=heads, window=4, shift=2, mlp_ratio=4.0, drop_path=0.0).to(DEVICE)
        x = torch.randn(2, *grid, width, device=DEVICE, dtype=torch.bfloat16)
        tokens, attn, mlp = 2 * grid[0] ** 3, block.attn, block.mlp
        n = attn.tokens(grid)
        qkv = torch.randn(2, *grid, 3 * width, device=DEVICE, dtype=torch.bfloat16)
        where = {"window": 4, "shift": 2}
        pieces: dict[str, tuple[Callable[[Any], Any], Any, float, float]] = {
            # name: call, input, elements moved a token and width at least, products a token
            "attention": (
                lambda y, attn=attn, n=n, where=where: gpu.window_attention(y, attn.qkv.bias, attn.bias(n), **where),
                *(qkv, 4, 4 * n * width),
            ),
        }
        if gpu.fuses(x, 4 * width):
            pieces["attention half"] = (
                lambda y, block=block, attn=attn, n=n, where=where: gpu.attention_half(
                    y, block.norm1, attn.qkv, attn.bias(n), attn.proj, kept=None, **where
                ),
                *(x, 2, 8 * width**2 + 4 * n * width),
            )
            pieces["MLP half"] = (
                lambda y, block=block, mlp=mlp: gpu.mlp_half(y, block.norm2, mlp.linear1, mlp.linear2, None),
                *(x, 2, 16 * width**2),
            )
        pieces["block"] = (block, x, 4, 24 * width**2 + 4 * n * width)
        pieces["block, plain"] = pieces["block"]
        for name, (call, given, moved, products) in pieces.items():
            least = max(tokens * moved * width * 2 / ceiling["copy_tbs"], tokens * products / ceiling["matmul_tflops"])
            given = given.clone().requires_grad_()  # noqa: PLW2901
            path = "plain" if "plain" in name else None
            with torch.autocast(DEVICE, torch.bfloat16), gpu.forced(path):
                with torch.no_grad():
                    forward = milliseconds(lambda: call(given), 0.2)  # noqa: B023
                probe = torch.randn_like(call(given))
                both = milliseconds(lambda: call(given).backward(probe), 0.2)  # noqa: B023
            yield {
                "piece": name, "width": width, "forward_ms": forward, "both_ms": both,
                "forward_share": least / 1e9 / forward, "both_share": 3 * least / 1e9 / both,
            }  # fmt: skip


def tuning() -> Iterator[dict[str, Any]]:
    """Both halves of the fused blocks with other numbers of warps and stages than the kernels are launched with."""
    import torch

    from dagman.nets.gpu import tiles
    from dagman.nets.stage import WindowBlock

    launch = tiles.launch
    for width, heads, side in PAPER_STAGES[:2]:
        block = WindowBlock(width, num_heads=heads, window=4, shift=2, mlp_ratio=4.0, drop_path=0.0).to(DEVICE)
        x = torch.randn(2, *(128 // side,) * 3, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for warps, stages in [(4, 1), (4, 2), (4, 3), (8, 1), (8, 2), (8, 3)]:
            times: dict[str, list[float]] = {}

            def watched(kernel: Any, *args: Any, **options: Any) -> None:
                def run() -> None:
                    launch(kernel, *args, **{**options, "warps": warps, "stages": stages})  # noqa: B023

                name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
                times.setdefault(name, []).append(milliseconds(run, 0.05))  # noqa: B023

            row: dict[str, Any] = {"width": width, "warps": warps, "stages": stages}
            try:
                with torch.autocast(DEVICE, torch.bfloat16), mock.patch.object(tiles, "launch", watched):
                    block(x).sum().backward()
            except Exception as problem:  # a card's shared memory may not do
                row["problem"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:120]
            yield row | {name: sum(each) for name, each in times.items()}


VARIANTS = ("MONAI-like", "plain", "fast", "fast + graphs", "fast + compile", "fast + compile + graphs")
COMPOSED = "fast, halves fused for the teacher alone"
PARTS = ("proofs", "kernels", "watching", "steps", "where", "tuning")
"""In this order: a launch that a card refuses in tuning takes the process's device along."""


def plan() -> list[tuple[int, int, str, str]]:
    """Crop, batch, type and variant, the most telling first."""
    order = [VARIANTS[each] for each in (2, 3, 0, 1)]
    first = [(128, batch, "bf16", name) for batch in (2, 1, 4) for name in order]
    second = [
        (128, 2, "bf16", COMPOSED),
        (128, 2, "bf16", VARIANTS[4]),
        *((side, 1, "bf16", VARIANTS[5]) for side in (128, 64)),
    ]
    third = [(side, b, "bf16", name) for side in (64, 96) for b in (1, 4, 2) for name in VARIANTS[:4]]
    last = [(side, b, "float32", name) for side in (128, 64, 96) for b in (1, 4, 2) for name in VARIANTS[:3]]
    return first + second + third + last


def step_of(side: int, batch: int, kind: str, variant: str) -> tuple[Callable[[], Any], contextlib.ExitStack]:
    """One training step of the paper's method on noise, and what to close after it."""
    import torch

    from dagman.nets import launches
    from dagman.nets.swin import SwinConfig
    from dagman.pretext.codistill import CoDistillation, Knobs
    from dagman.pretext.method import MethodConfig
    from dagman.train import engine
    from dagman.types import Views

    torch.manual_seed(0)
    around = contextlib.ExitStack()
    stage = {} if side > 32 else {"attention": None}
    module = (
        CoDistillation(SwinConfig(**stage), MethodConfig(), mean_intensity=0.4, crop=(side,) * 3).to(DEVICE).train()
    )
    naive = variant == "MONAI-like"
    optimizer = torch.optim.AdamW(
        module.student.parameters(), lr=1e-4, fused=not naive, foreach=None if naive else False
    )
    u, v = torch.rand(2, batch, 1, side, side, side, device=DEVICE)
    views = Views(u, v, torch.arange(batch), torch.zeros(batch, device=DEVICE))
    knobs, draws = Knobs(0.05, 0.05, attended=True), torch.Generator().manual_seed(0)
    if naive:
        import gpu_plain

        around.enter_context(gpu_plain.monai_like())
    elif variant in ("plain", COMPOSED):
        from dagman.nets import gpu

        fits = gpu.fuses
        alone = mock.patch.object(gpu, "fuses", lambda x, hidden: not torch.is_grad_enabled() and fits(x, hidden))
        around.enter_context(gpu.forced("plain") if variant == "plain" else alone)
    if "compile" in variant:
        launches.compile_rest(module)
    if "graphs" in variant:
        images, cells = torch.cat([u, v]), torch.zeros(2 * batch, (side // 16) ** 3, dtype=torch.bool, device=DEVICE)
        type_ = torch.bfloat16 if kind == "bf16" else None
        given = {"final_only": module.final_only, "autocast": type_}
        around.callback(launches.record(module.student.encoder, images, hidden=cells, **given))
        around.callback(launches.record(module.teacher.encoder, images, dropped=cells, **given))

    def step() -> Any:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=kind == "bf16"):
            outcome = module(views, knobs, draws)
        outcome.losses.total.backward()
        if naive:
            torch.nn.utils.clip_grad_norm_(module.student.parameters(), 3.0)
        else:
            engine.clip(optimizer, 3.0)
        optimizer.step()
        module.update_teacher(0.996)
        module.move_centers(outcome.means)
        optimizer.zero_grad(set_to_none=True)
        return outcome.losses.total

    return step, around


def timed_step(side: int, batch: int, kind: str, variant: str) -> dict[str, Any]:
    """Time and memory of a step; losses of the first steps show that variants learn alike."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    row: dict[str, Any] = {"side": side, "batch": batch, "type": kind, "variant": variant}
    try:
        step, around = step_of(side, batch, kind, variant)
        with around:
            losses = [step().item() for _ in range(3)]
            ms = milliseconds(step, 1.0)
            wall = time.monotonic()
            for _ in range(5):
                step()
            torch.cuda.synchronize()
            wall = (time.monotonic() - wall) / 5 * 1000
        peak = torch.cuda.max_memory_allocated() / batch / 1e9
        row |= {"ms_a_sample": ms / batch, "wall_ms_a_sample": wall / batch, "peak_gb_a_sample": peak, "losses": losses}
    except Exception as problem:
        row["problem"] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
    return row


def diagnostics_time() -> dict[str, float]:
    """What watching the features costs each step of one pair of 128^3."""
    import torch

    from dagman.pretext import diagnostics
    from dagman.types import Features

    tokens, pooled = torch.randn(2, 512, 384, device=DEVICE), torch.randn(2, 768, device=DEVICE)
    features = Features(tokens, tokens[:, 0], tokens[:, :, 0], pooled, ())
    return {"diagnostics_ms": milliseconds(lambda: diagnostics.of_features(features), 0.3)}


def where() -> Iterator[dict[str, Any]]:
    """Where the time of a fast step goes: the device's time and launches of each kernel, and of all, beside the clock.

    A step whose kernels take much less than the clock says waits for the host, which launches them.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    for side, batch in ((128, 2), (64, 4)):
        step, around = step_of(side, batch, "bf16", "fast")
        with around:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
            began = time.monotonic()
            step()
            torch.cuda.synchronize()
            wall = 1000 * (time.monotonic() - began)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
                step()
                torch.cuda.synchronize()
        kernels = [one for one in seen.key_averages() if one.device_type == torch.autograd.DeviceType.CUDA]
        kernels.sort(key=lambda one: -one.self_device_time_total)
        about = {"side": side, "batch": batch}
        total = sum(one.self_device_time_total for one in kernels) / 1000
        yield about | {"kernel": "all", "ms": total, "launches": sum(one.count for one in kernels), "wall_ms": wall}
        for one in kernels[:25]:
            yield about | {"kernel": one.key[:80], "ms": one.self_device_time_total / 1000, "launches": one.count}


def show(row: dict[str, Any]) -> None:
    """A line of the table."""
    print(
        "  ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
    )


def main() -> int:
    """Run all, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="stop starting rows after so long")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS[:-1], help="parts to run; all but tuning")
    parser.add_argument("--json", type=Path, help="where to write; default benchmarks/results/gpu/<card>.json")
    options = parser.parse_args()
    lacks = missing()
    if lacks:
        print("\n".join(lacks))
        return 2
    import torch
    import triton

    deadline, card = time.monotonic() + 60 * options.minutes, torch.cuda.get_device_name()
    out = options.json or Path("benchmarks/results/gpu") / f"{card.lower().replace(' ', '-')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    found |= {"date": time.strftime("%Y-%m-%d"), "card": card}
    found |= {"torch": torch.__version__, "triton": triton.__version__}
    found["ceilings"] = ceilings()
    show(found)
    left = []
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "proofs": proofs,
        "kernels": lambda: kernel_times(found["ceilings"]),
        "watching": lambda: iter([diagnostics_time()]),
        "steps": lambda: (
            timed_step(*row) for row in plan() if time.monotonic() < deadline - WHERE_SECONDS or left.append(row)
        ),
        "where": where,
        "tuning": tuning,
    }
    for name in (part for part in PARTS if part in options.only):
        print(f"\n{name}")
        found[name] = []
        try:
            for row in parts[name]():
                show(row)
                found[name].append(row)
                out.write_text(json.dumps(found, indent=1) + "\n")
                if name != "steps" and time.monotonic() > deadline:
                    raise TimeoutError(f"{options.minutes:g} minutes are over")
        except Exception as problem:
            found[name].append({"problem": f"{type(problem).__name__}: {problem}"[:400]})
            print(found[name][-1]["problem"])
    if "steps" in options.only:
        found["not_reached"] = left
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{TARGETS}\nnot reached in {options.minutes:g} minutes: {len(left)} rows\nwritten: {out}")
    return 0 if all(row.get("holds") for row in found.get("proofs", [])) else 1


if __name__ == "__main__":
    sys.exit(main())
