"""How much of a crop each structure fills where the learning curve asks what attention meets there.

    python benchmarks/learning_shares.py --work WORK [--json benchmarks/results/learning-shares.json]

Attention of a given evenness cannot gather more than so much on a structure that fills a large part of the crop:
`docs/evidence/learning.py` computes the bound from these shares.
"""

import argparse
import time
from pathlib import Path

import numpy as np

import learning_cases as cases
import learning_curve as curve
from dagman import files
from dagman.run import describe_environment

SIDE = 32


def main() -> None:
    """Measure, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="that of `learning_curve.py`")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "learning-shares.json")
    given = parser.parse_args()
    stores = {
        "phantoms": cases.phantom_store(given.work / "phantoms_160", 160),
        "real": cases.real_store(given.data, given.work),
    }
    shares = {}
    for corpus, store in stores.items():
        met: dict[str, list[float]] = {}
        for name, _, truth in curve.looks(store, SIDE):
            met.setdefault(name, []).extend(truth.mean(axis=(1, 2, 3)).tolist())
        shares[corpus] = {name: round(float(np.mean(values)), 4) for name, values in met.items()}
    result = {"shares": shares, "date": time.strftime("%Y-%m-%d"), "machine": describe_environment()["versions"]}
    files.write_json(given.json, result)
    print(f"{shares}\nwrote {given.json}")


if __name__ == "__main__":
    main()
