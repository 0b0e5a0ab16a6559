"""Tables of `dagman ablate`: `docs/ablation.md`."""

import csv
from pathlib import Path

from common import NOT_YET, RESULTS, number, rows

FOLDER = RESULTS / "ablation"
MEASURES = {
    "hidden": ("hidden_ratio", 2),
    "image error": ("image_error_ratio", 2),
    "attention": ("clean_attention_entropy", 3),
    "spread": ("pooled_spread", 2),
    "stage 4": ("stage 4: distance_entropy_ratio", 4),
    "semantic attention": ("semantic attention: distance_entropy_ratio", 4),
}


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a table, without the note on its first line."""
    with path.open(newline="") as stream:
        next(stream)
        return list(csv.DictReader(stream))


def span(row: dict[str, str] | None, digits: int) -> str:
    """Mean over the seeds, and the lowest and highest of several."""
    if row is None or not row["mean"]:
        return ""
    mean = number(float(row["mean"]), digits)
    if int(row["seeds"]) < 2:
        return mean
    return f"{mean} ({number(float(row['lowest']), digits)} to {number(float(row['highest']), digits)})"


def table(axis: str) -> str:
    """One line a member of the family, the paper's number last."""
    if not (FOLDER / f"{axis}-summary.csv").exists():
        return NOT_YET
    summary = {(row["measure"], row["variant"]): row for row in read(FOLDER / f"{axis}-summary.csv")}
    runs = read(FOLDER / f"{axis}.csv")
    reported = {row["variant"]: row for row in runs}
    papers = [name for name in runs[0] if name.startswith("paper")]
    tuned = {"AUC fine-tuned": ("fine-tuned AUC", 3)} if any("fine-tuned AUC" in key for key in summary) else {}
    measures, body = tuned | MEASURES, []
    for variant in [name for measure, name in summary if measure == "probe AUC"]:
        probed = summary["probe AUC", variant]
        less = ""
        if probed["minus full: mean"]:
            less = f"{float(probed['minus full: mean']):+.3f}"
            if probed["minus full: low"]:
                less += f" ({float(probed['minus full: low']):+.3f} to {float(probed['minus full: high']):+.3f})"
        shown = [span(summary.get((name, variant)), digits) for name, digits in measures.values()]
        said = [reported.get(variant, {}).get(name) or "" for name in papers]
        body.append([variant, probed["seeds"], span(probed, 3), less, *shown, *said])
    header = ["variant", "seeds", "AUC here", "less the full method (95 % over patients)", *measures, *papers]
    return rows(header, body)


PLACES = ("stage 1", "stage 2", "semantic attention", "stage 3", "stage 4")
HEADS = {"distance_entropy_ratio": "entropy of distances", "row_entropy": "entropy of rows"}
EFFECTS = {
    "attended less random": (("attended", "random"), ("attended, noisy teacher", "random, noisy teacher")),
    "noisy less clean": (("random, noisy teacher", "random"), ("attended, noisy teacher", "attended")),
}


def diversity() -> str:
    """What attended hiding and the noisy teacher do to the heads, seed by seed: means over the other factor."""
    if not (FOLDER / "hiding.csv").exists():
        return NOT_YET
    runs = {(row["variant"], row["seed"]): row for row in read(FOLDER / "hiding.csv") if row["status"] == "scored"}
    members = {name for pairs in EFFECTS.values() for pair in pairs for name in pair}
    seeds = sorted({seed for _, seed in runs if all((name, seed) in runs for name in members)})
    body = []
    for place in PLACES:
        for measure, meaning in HEADS.items():
            cells = []
            for pairs in EFFECTS.values():
                found = [
                    sum(
                        float(runs[one, seed][f"{place}: {measure}"]) - float(runs[other, seed][f"{place}: {measure}"])
                        for one, other in pairs
                    )
                    / len(pairs)
                    for seed in seeds
                ]
                alike = "all below 0" if max(found) < 0 else "all above 0" if min(found) > 0 else ""
                cells += [" ".join(f"{value:+.4f}" for value in found), alike]
            body.append([place, meaning, *cells])
    header = ["place", "how much"]
    for name in EFFECTS:
        header += [f"{name}, by seed", ""]
    return rows(header, body)


CLUSTERS = {
    "map: intra": ("map: distance within a class", 2),
    "map: inter": ("map: distance between classes", 2),
    "map: intra / inter": ("map: within / between", 3),
    "map: silhouette": ("map: silhouette", 3),
    "features: intra / inter": ("features: within / between", 3),
    "features: silhouette": ("features: silhouette", 3),
    "5-NN accuracy": ("5-NN accuracy among other patients", 3),
}
PAPERS = ("paper: cluster distance, intra-cluster", "paper: cluster distance, inter-cluster")


def clusters() -> str:
    """Figures 4c and 9, the distances of Table 2: crops of organs laid out by each member, means over its seeds."""
    body = []
    for axis in ("hiding", "encoder", "stage"):
        found = {(row["measure"], row["variant"]): row for row in read(FOLDER / f"{axis}-summary.csv")}
        reported = {row["variant"]: row for row in read(FOLDER / f"{axis}.csv")}
        for variant in [name for measure, name in found if measure == CLUSTERS["map: intra"][0]]:
            shown = [span(found.get((measure, variant)), digits) for measure, digits in CLUSTERS.values()]
            said = [reported.get(variant, {}).get(name) or "" for name in PAPERS]
            body.append([axis, variant, *shown, *said])
    header = ["axis", "variant", *CLUSTERS, "paper, map: intra", "paper, map: inter"]
    return rows(header, body) if body else NOT_YET


def hiding() -> str:
    """Figure 4."""
    return table("hiding")


def losses() -> str:
    """Table 1."""
    return table("losses")


def encoder() -> str:
    """Table 2."""
    return table("encoder")


def stage() -> str:
    """Figures 6, 8 and 9."""
    return table("stage")
