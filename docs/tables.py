"""Write the tables of README and docs from `benchmarks/results/*.json`; no figure is typed by hand.

A document marks a table with `<!-- table: NAME -->` and `<!-- end -->`; `make docs` fills what stands between.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "learning.md")
READINGS = {
    "image_error_ratio": "image error / that of predicting each view's visible mean",
    "amip": "AMIP",
    "ampd": "AMPD (ln K is 6.238)",
    "aitd": "AITD",
    "gitd": "GITD",
    "pooled_spread": "spread of the pooled features",
    "cls_spread": "spread of the [CLS] tokens",
    "tokens_spread": "spread of the cell tokens",
    "tokens_effective_rank": "effective rank of the cell tokens",
    "aitd_teacher_entropy": "teacher entropy of [CLS] / ln K",
    "ampd_teacher_entropy": "teacher entropy of the cells / ln K",
    "gitd_teacher_entropy": "teacher entropy of the pooled features / ln K",
    "attention_entropy": "attention entropy / ln N",
    "attention_peak": "attention peak, times uniform",
}


def load(name: str) -> dict[str, Any]:
    """One result file."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def rows(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def interval(estimate: dict[str, Any] | None) -> str:
    """A score with its 95 % interval."""
    if not estimate or estimate["value"] is None:
        return ""
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def machine(result: dict[str, Any]) -> str:
    """Date and machine, as a sentence under a table."""
    where = result["machine"]
    return f"{result['date']}, {where.get('cpu') or where['processor']}, {where.get('cores') or where['threads']} cores"


def demo() -> str:
    """The probe of `make demo`."""
    result = load("demo")
    body = [
        [
            row["features"],
            interval(row["auc"]),
            interval(row["sensitivity"]),
            interval(row["specificity"]),
            interval(row["first_minus_this"]),
        ]
        for row in result["probe"]
    ]
    first = result["probe"][0]
    note = (
        f"Malignant or benign nodule, {first['cases']} phantoms of {first['patients']} patients, "
        f"{first['folds']} folds by patient, {result['training']['steps']} steps of pretraining. {machine(result)}."
    )
    return rows(["features", "AUC", "sensitivity", "specificity", "AUC of pretrained minus this"], body) + "\n\n" + note


def demo_training() -> str:
    """How the demo's pretraining ended."""
    training = load("demo")["training"]
    names = [name for name in READINGS if name in training]
    return rows(
        ["at the end of the demo's pretraining", ""], [[READINGS[name], f"{training[name]:.3f}"] for name in names]
    )


def real_probes() -> str:
    """Probes on real CTs."""
    result = load("real_data")
    body = [
        [
            name,
            f"{found['crop']}^3",
            f"{found[kind]['cases']} ({found[kind]['positive']})",
            kind,
            interval(found[kind]["auc"]),
            interval(found[kind]["pretrained_minus_this"]),
        ]
        for name, found in result["probes"].items()
        for kind in ("pretrained", "untrained", "raw voxels")
    ]
    header = ["probe", "crop", "cases (positive)", "features", "AUC", "pretrained minus this"]
    return rows(header, body) + f"\n\n{machine(result)}."


def real_training() -> str:
    """Start and end of a pretraining on real CTs."""
    result = load("real_data")
    training = result["training"]
    body = [
        [meaning, f"{training['first'][name]:.3f}", f"{training['last'][name]:.3f}"]
        for name, meaning in READINGS.items()
        if name in training["first"]
    ]
    note = (
        f"`dagman-tiny`, {training['steps']} steps of {training['seconds_per_step_median']:.2f} s (median) on "
        f"{result['cases']} CTs; peak memory {result['peak_mib']['pretrain'] / 1024:.1f} GiB. "
        f"{machine(result)}."
    )
    return rows(["", "first twentieth", "last twentieth"], body) + "\n\n" + note


def store() -> str:
    """Reading a random crop from each kind of storage."""
    result = load("store")
    names = [row["storage"] for row in result["volumes"][0]["storages"]]
    body = []
    for index, name in enumerate(names):
        found = [volume["storages"][index] for volume in result["volumes"]]
        times = " to ".join(f"{pick(row['crop_ms'] for row in found):.1f}" for pick in (min, max))
        sizes = " to ".join(f"{pick(row['mib'] for row in found):.1f}" for pick in (min, max))
        body.append([name, times, sizes])
    note = f"{len(result['volumes'])} real CTs at 2 mm, medians of random 128^3 crops. {machine(result)}."
    return rows(["storage", "ms a crop", "MiB a volume"], body) + "\n\n" + note


def tour() -> str:
    """What the verbs print."""
    return f"```\n{(RESULTS / 'tour.txt').read_text()}```"


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "demo-training": demo_training,
    "real-probes": real_probes,
    "real-training": real_training,
    "store": store,
    "tour": tour,
}


def filled(text: str) -> str:
    """A document with its tables written anew."""
    return re.sub(
        r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
        print(f"wrote {document.relative_to(ROOT)}")
