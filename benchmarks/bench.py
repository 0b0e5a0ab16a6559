"""All that `make bench` measures, piece by piece: meant for a quarter of an hour on two cores without other work.

    python benchmarks/bench.py [--data FOLDER_OF_CTS] [--series FOLDER_OF_DICOM]

Each piece writes its JSON into `benchmarks/results/`, and `bench.json` there says how long each took. Steps are of one
pair of 64^3; rows of other crops and batches stay as they were measured. Where the results there are of another kind of
processor, those of this one go to a folder of their own, and into a table of their own. Without `--data` the storages
are compared on noise; without `--series` no scan is prepared beside MONAI.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP = ("step.py", "--crops", "64", "--batches", "1", "--parts")


def pieces(data: Path | None, series: Path | None, *, bf16: bool) -> dict[str, tuple[str, list[str]]]:
    """What each piece runs, and the JSON it writes; without bf16 where a processor has no instructions for it."""
    storages = ["store.py", "--crops", "20", *(["--data", str(data)] if data else [])]
    rates = [
        "input.py",
        "--pairs",
        "100",
        "--rounds",
        "3",
        "--steps",
        "10",
        *(["--series", str(series)] if series else []),
    ]
    kind = "bf16" if bf16 else "float32"
    found = {
        "storages": ("store", storages),
        "targets": ("targets", ["targets.py", "--crops", "64", "--rounds", "5"]),
        "steps in float32": ("step", [*STEP, "--rounds", "3", "--precisions", "float32", "--allocators", "tuned"]),
        "more steps": ("step", [*STEP, "--rounds", "3", "--precisions", kind, "--allocators", "default"]),
        "the ladder": ("step", [*STEP, "--rounds", "2", "--precisions", kind, "--allocators", "tuned", "--ladder"]),
        "input": ("input", rates),
        "scaling": ("scaling", ["scaling.py", "--steps", "5"]),
    }
    left_out = () if bf16 else ("targets", "steps in float32")
    return {name: piece for name, piece in found.items() if name not in left_out}


def place_for(results: Path, processor: str) -> Path:
    """`results`, or a folder below it where those are of another processor."""
    kept = results / "step.json"
    if not kept.exists() or json.loads(kept.read_text())["machine"]["processor"] == processor:
        return results
    return results / "others" / re.sub(r"\W+", "-", processor.lower()).strip("-")


def main() -> None:
    """Run every piece, then say how long all took."""
    import torch

    from dagman import files
    from dagman.run import describe_environment
    from dagman.train import engine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CTs to compare storages on")
    parser.add_argument("--series", type=Path, help="folder of DICOM series to prepare beside MONAI")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the JSON goes")
    options = parser.parse_args()
    here = describe_environment()["versions"]
    results = place_for(options.results, here["processor"])
    results.mkdir(parents=True, exist_ok=True)
    if results != options.results:
        print(f"{options.results} is of another processor: results go to {results}", flush=True)
    bf16 = not engine.slow_bf16(torch.device("cpu"), "bf16")
    took = {}
    for name, (written, command) in pieces(options.data, options.series, bf16=bf16).items():
        print(f"\n{name}", flush=True)
        started = time.monotonic()
        script, *flags = command
        if written == "scaling":  # points that it holds would not be measured again
            (results / "scaling.json").unlink(missing_ok=True)
        place = ["--json", str(results / f"{written}.json")]
        subprocess.run([sys.executable, str(HERE / script), *flags, *place], check=True)
        took[name] = round(time.monotonic() - started)
        print(f"{name}: {took[name]} s", flush=True)
    found = {"date": time.strftime("%Y-%m-%d"), "machine": here, "seconds": took}
    files.write_json(results / "bench.json", found)
    print(f"\nall: {sum(took.values()) / 60:.0f} min")


if __name__ == "__main__":
    main()
