"""Draw the figures of README and docs from `benchmarks/results/learning/*.json`; `make docs` runs this."""

import json
from typing import Any

from common import ROOT
from learning import QUESTIONS, asked, corpora, with_ratios
from matplotlib.figure import Figure

from dagman.figures import image, learning, progress

RESULTS = ROOT / "benchmarks" / "results"


def scaling(result: dict[str, Any]) -> bytes:
    """What a sample costs against each quantity: level where nothing grows faster than the work."""
    panels = {
        "crop": ("side of the crop, voxels", "microseconds a voxel"),
        "batch": ("pairs of views a step", "seconds a pair"),
        "volumes": ("volumes of the store", "milliseconds a pair of crops"),
        "workers": ("loader processes", "seconds a pair"),
        "ranks": ("ranks (gloo)", "seconds a pair"),
    }
    figure = Figure(figsize=(15, 3.4), dpi=80, layout="constrained")
    for axes, (quantity, (across, up)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        points = [point for point in result["points"] if point["quantity"] == quantity]
        values = [point["value"] for point in points]
        costs = [point["pair_ms" if quantity == "volumes" else "seconds_a_pair"] for point in points]
        if quantity == "crop":
            costs = [1e6 * cost / (2 * side**3) for cost, side in zip(costs, values, strict=True)]
        axes.plot(values, costs, marker="o")
        axes.set(xlabel=across, ylabel=up, ylim=(0, 1.25 * max(costs, default=1)))
        if quantity in ("batch", "volumes"):
            axes.set_xscale("log", base=2 if quantity == "batch" else 10)
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    return image.png(figure)


def run(result: dict[str, Any]) -> bytes:
    """The panels of a run, the probe's with the organs of phantoms told from 32 labels.

    Balancing takes the shared centers of [CLS] and pooled targets away: their sizes, once logged, say nothing.
    """
    points = [with_ratios(result, point) for point in result["curve"]]
    for point in points:
        for term in ("aitd", "gitd"):
            point.pop(f"{term}_center_size", None)
    for probe in result["probes"]:
        row = asked(probe["rows"], "organ", "all", 32)
        if row:
            ends = {f"probe_{end}": row["auc"][end] for end in ("low", "high")}
            points.append({"step": max(1, probe["step"]), "probe_auc": row["auc"]["value"], **ends})
    pairs = result["config"]["optimisation"]["batch_size"]
    about = f"{result['volumes']} {result['corpus']}, seed {result['seed']}, {pairs} pairs of crops a step"
    return progress.png(sorted(points, key=lambda point: point["step"]), f"dagman-tiny on {about}")


def main() -> None:
    """Draw what there are results for."""
    if (RESULTS / "scaling.json").exists():
        (ROOT / "docs" / "scaling.png").write_bytes(scaling(json.loads((RESULTS / "scaling.json").read_text())))
        print("wrote docs/scaling.png")
    for corpus, found in corpora().items():
        told = {question: title for question, title in QUESTIONS.items() if question in found[0]["crops"]}
        pictures = {
            f"learning-probes-{corpus}.png": learning.png(found, told),
            f"learning-run-{corpus}.png": run(found[0]),
        }
        for name, picture in pictures.items():
            (ROOT / "docs" / name).write_bytes(picture)
            print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
