"""All that `make bench` measures, piece by piece: meant for a quarter of an hour on two cores without other work.

    python benchmarks/bench.py [--data FOLDER_OF_CTS] [--series FOLDER_OF_DICOM]

Each piece writes its JSON into `benchmarks/results/`, and `bench.json` there says how long each took. Steps are of one
pair of 64^3; rows of other crops and batches stay as they were measured. Without `--data` the storages are compared on
noise; without `--series` no scan is prepared beside MONAI.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP = ("step.py", "--crops", "64", "--batches", "1", "--parts")


def pieces(data: Path | None, series: Path | None) -> dict[str, tuple[str, list[str]]]:
    """What each piece runs, and the JSON it writes."""
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
    return {
        "storages": ("store", storages),
        "targets": ("targets", ["targets.py", "--crops", "64", "--rounds", "5"]),
        "steps in float32": ("step", [*STEP, "--rounds", "3", "--precisions", "float32", "--allocators", "tuned"]),
        "steps in bf16": ("step", [*STEP, "--rounds", "3", "--precisions", "bf16", "--allocators", "default"]),
        "the ladder": ("step", [*STEP, "--rounds", "2", "--precisions", "bf16", "--allocators", "tuned", "--ladder"]),
        "input": ("input", rates),
        "scaling": ("scaling", ["scaling.py", "--steps", "5"]),
    }


def main() -> None:
    """Run every piece, then say how long all took."""
    from dagman import files
    from dagman.run import describe_environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CTs to compare storages on")
    parser.add_argument("--series", type=Path, help="folder of DICOM series to prepare beside MONAI")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the JSON goes")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    took = {}
    for name, (written, command) in pieces(options.data, options.series).items():
        print(f"\n{name}", flush=True)
        started = time.monotonic()
        script, *flags = command
        if written == "scaling":  # points that it holds would not be measured again
            (options.results / "scaling.json").unlink(missing_ok=True)
        place = ["--json", str(options.results / f"{written}.json")]
        subprocess.run([sys.executable, str(HERE / script), *flags, *place], check=True)
        took[name] = round(time.monotonic() - started)
        print(f"{name}: {took[name]} s", flush=True)
    found = {"date": time.strftime("%Y-%m-%d"), "machine": describe_environment()["versions"], "seconds": took}
    files.write_json(options.results / "bench.json", found)
    print(f"\nall: {sum(took.values()) / 60:.0f} min")


if __name__ == "__main__":
    main()
