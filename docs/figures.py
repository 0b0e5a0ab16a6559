"""Draw the figures of README and docs from `benchmarks/results/learning/*.json`; `make docs` runs this."""

import json
from pathlib import Path
from typing import Any

from tables import with_ratios

from dagman.figures import learning, progress

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning"
QUESTIONS = {
    "organ": "phantoms: which of 8 organs",
    "malignancy": "phantoms: malignant nodule or not",
    "nodule": "phantoms: a nodule in the crop or not",
    "tumour": "real CTs: tumour or not",
    "side": "real CTs: left or right",
    "upright": "real CTs: upright or upside down",
}


def runs(corpus: str, name: str = "tiny") -> list[dict[str, Any]]:
    """The results of all seeds that are finished."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{corpus}-{name}-seed*.json"))]
    return [result for result in found if result["probes"] and result["probes"][-1]["step"] == result["steps"]]


def main() -> None:
    """Draw what there are results for."""
    for corpus in ("phantoms", "real"):
        found = runs(corpus)
        if not found:
            continue
        asked = {question: title for question, title in QUESTIONS.items() if question in found[0]["crops"]}
        pictures = {
            f"learning-probes-{corpus}.png": learning.png(found, asked),
            f"learning-run-{corpus}.png": progress.png(
                [with_ratios(found[0], point) for point in found[0]["curve"]],
                f"dagman-tiny on {found[0]['volumes']} {corpus}, seed {found[0]['seed']}",
            ),
        }
        for name, picture in pictures.items():
            (ROOT / "docs" / name).write_bytes(picture)
            print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
