"""What was aimed at on CPUs: our step in bf16 beside MONAI's in float32, in turns, so that a busy machine hits both.

    python benchmarks/targets.py [--crops 64 96 128] [--rounds 5] [--json benchmarks/results/targets.json]

MONAI's parts run under the allocator as it comes, then under that which `dagman pretrain` gives itself; ours under the
latter. A pair of processes at a time: at 128^3 both together hold 16 GiB. Sittings differ by more than steps do, so the
file keeps the last ten.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from step import ALLOCATORS, Child, kept_rows, over, take_turns

SITTINGS = 10
"""Kept of each crop and allocator."""


def measure(crop: int, allocator: str, rounds: int) -> dict[str, Any]:
    """One pair: medians of each, and the median of the rounds' ratios."""
    children = {
        "monai": Child("monai", allocator, (crop, 1, "float32"), None),
        "fast": Child("fast", "tuned", (crop, 1, "bf16"), None),
    }
    steps: dict[str, list[dict[str, Any]]] = {}
    try:
        take_turns(children, steps, rounds)
    finally:
        for child in children.values():
            child.close()
    row: dict[str, Any] = {"crop": crop, "allocator": allocator, "steps": rounds}
    for variant, taken in steps.items():
        row[variant] = {
            "seconds_median": statistics.median(step["seconds"] for step in taken),
            "peak_mib": max(step["peak_mib"] for step in taken),
        }
    found = over(steps["monai"], steps["fast"])
    return row | {"times": found["seconds"], "cpu_times": found["cpu_seconds"]}


def main() -> None:
    """Measure, print, and write the rows."""
    from dagman import files
    from dagman.run import describe_environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "targets.json")
    options = parser.parse_args()
    here = describe_environment()["versions"]
    stamp = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": f"{here['processor']}, {here['threads']} threads"}
    for crop in options.crops:
        for allocator in ALLOCATORS:
            row = measure(crop, allocator, options.rounds) | stamp
            memory = row["fast"]["peak_mib"] / row["monai"]["peak_mib"]
            print(
                f"{crop}^3, {allocator}: MONAI {row['monai']['seconds_median']:.2f} s, ours "
                f"{row['fast']['seconds_median']:.2f} s, {row['times']:.1f} times (CPU {row['cpu_times']:.1f}); "
                f"memory {memory:.2f}",
                flush=True,
            )
            rows = kept_rows(options.json, stamp["machine"])
            same = [one for one in rows if (one["crop"], one["allocator"]) == (crop, allocator)]
            rows = [one for one in rows if one not in same] + [*same, row][-SITTINGS:]
            rows.sort(key=lambda one: (one["crop"], one["allocator"], one["date"]))
            files.write_json(options.json, {"date": stamp["date"], "machine": here, "rows": rows})


if __name__ == "__main__":
    main()
