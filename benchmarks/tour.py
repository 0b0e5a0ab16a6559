"""Run the README's tour on a folder of CTs and keep what it printed in `benchmarks/results/tour.txt`.

    python benchmarks/tour.py --data FOLDER_OF_CTS

Twenty steps of pretraining: enough to show what the verbs say, not to learn.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

COMMANDS = (
    "check SCANS",
    "prepare -i SCANS -o prepared",
    "pretrain dagman-tiny --data prepared -o runs/first --steps 20",
    "embed --weights runs/first -i prepared -o features.csv",
    "export --to monai --weights runs/first -o swin.safetensors",
)


def main() -> None:
    """Run and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    scans = parser.parse_args().data.resolve()
    lines = []
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "SCANS").symlink_to(scans)
        for command in COMMANDS:
            dagman = [str(Path(sys.executable).with_name("dagman")), *command.split()]
            done = subprocess.run(
                dagman, cwd=work, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            lines += [f"$ dagman {command}", *done.stdout.splitlines(), ""]
    path = Path(__file__).parent / "results" / "tour.txt"
    path.write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
