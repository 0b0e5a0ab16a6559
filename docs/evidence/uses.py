"""Tables about what an encoder is for: `docs/uses.md`."""

import json
import sys
from typing import Any

import numpy as np
from common import NOT_YET, RESULTS, ROOT, interval, machine, number, rows

from dagman.tasks import predictions
from dagman.tasks.predictions import Predictions

STARTS = {
    "probe": "linear probe",
    "random probe": "linear probe, untrained encoder",
    "fine-tuned": "fine-tuned, starting as the probe",
    "fine-tuned random head": "fine-tuned, linear layer at random",
    "scratch": "the same network from scratch",
    "resnet50": "ResNet-50 from scratch",
}
UNTRAINED = {"probe": "random probe", "fine-tuned": "scratch"}
"""What a pretrained start is held against: the same without pretraining."""


def used(part: str) -> dict[str, Any] | None:
    """A result of `benchmarks/uses_look.py`."""
    path = RESULTS / "uses" / f"look-{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


def uses_cluster() -> str:
    """Organs in clusters."""
    result, body, told = used("cluster"), [], []
    if result is None:
        return NOT_YET
    names = ("map_intra", "map_inter", "map_ratio", "ratio", "silhouette", "knn")
    for corpus, found in result["corpora"].items():
        body += [[corpus, row["features"], *(interval(row[name]) or "n/a" for name in names)] for row in found["rows"]]
        told.append(
            f"{corpus}: {found['crops']} crops of {found['structures']} structures, {len(found['classes'])} classes, "
            f"patients: {found['patients']}"
        )
    header = [
        "crops of",
        "features",
        "map: intra",
        "inter",
        "intra / inter",
        "features: intra / inter",
        "features: silhouette",
    ]
    return rows([*header, "5-NN accuracy"], body) + f"\n\n{'; '.join(told)}. {machine(result)}."


def uses_attention() -> str:
    """Attention on masks."""
    result = used("attention")
    if result is None:
        return NOT_YET
    body = [
        [
            question,
            row["weights"],
            str(row["cases_with_gain"]),
            interval(row["gain"]) or "n/a",
            interval(row.get("gain_above_first")),
        ]
        for question, found in result["questions"].items()
        for row in found["rows"]
    ]
    refused = [case for found in result["questions"].values() for case in found["refused"]]
    note = f" Refused: {', '.join(refused)}." if refused else ""
    header = ["masks", "weights", "cases", "gain", "above the first weights"]
    return rows(header, body) + f"\n\n{machine(result)}.{note}"


def uses_diversity() -> str:
    """Heads by stage."""
    result = used("diversity")
    if result is None:
        return NOT_YET
    names = ("distance_mm", "distance_entropy_ratio", "row_entropy")
    body = [
        [row["weights"], row["place"], str(row["heads"]), *(interval(row[name]) or "n/a" for name in names)]
        for row in result["rows"]
    ]
    header = ["weights", "place", "heads", "distance, mm", "entropy of distances / ln heads", "entropy of rows / most"]
    return rows(header, body) + f"\n\n{result['crops']} crops. {machine(result)}."


def uses_segment() -> str:
    """Segmentation of STS: each start."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "uses").glob("segment-sts-*.json"))]
    if not found:
        return NOT_YET
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import uses_segment as sarcomas

    first = found[0]
    folds = len({each["fold"] for each in found if each["start"] == "pretrained" and each["fraction"] == 1})
    about = f"{folds} of 3 folds, one seed; {first['steps']} steps of {first['crop']}^3 crops, {first['precision']}, "
    about += f"{first['device']}"
    return f"{sarcomas.table(first['steps'], first['seed'])}\n\n{about}."


def _gain(found: list[dict[str, Any]], study: str, start: str, other: str) -> str:
    """AUC of one start less that of another, paired by case and seed; a start of one seed meets every one."""
    ours, theirs = (
        {one["seed"]: one for one in found if (one["study"], one["start"]) == (study, each)} for each in (start, other)
    )
    seeds = sorted(ours) if len(theirs) == 1 else sorted(ours.keys() & theirs.keys())
    pairs = [(_predictions(ours[seed]), _predictions(theirs.get(seed, next(iter(theirs.values()))))) for seed in seeds]
    return interval(vars(predictions.mean_difference(pairs))) if pairs else ""


def _predictions(result: dict[str, Any]) -> Predictions:
    stored = result["predictions"]
    arrays = {name: np.array(stored[name]) for name in ("groups", "labels", "fold", "probabilities")}
    words = {name: tuple(stored[name]) for name in ("case_ids", "names", "thresholds")}
    return Predictions(**arrays, **words, group_by=stored["group_by"], num_unlabelled=0)


def uses_classify() -> str:
    """Classification of STS and Adrenal: each start, the median of its seeds."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "uses").glob("classify-*.json"))]
    if not found:
        return NOT_YET
    titles = {"sts": "lung metastasis (STS)", "adrenal": "Adrenal 28 (binary shapes, no CT)"}
    body = []
    for study, title in titles.items():
        for start, name in STARTS.items():
            runs = [each for each in found if (each["study"], each["start"]) == (study, start)]
            if not runs:
                continue
            runs.sort(key=lambda each: each["result"]["auc"]["value"])
            middle, values = runs[(len(runs) - 1) // 2], [each["result"]["auc"]["value"] for each in runs]
            spread = ", ".join(number(value, 3) for value in values) if len(runs) > 1 else ""
            overlap = middle["result"]["pretraining_overlap"]
            saw = overlap["same_voxels"]["count"] + overlap["same_patient"]["count"] if overlap["known"] else "unknown"
            counts = f"{middle['result']['cases']} ({min(middle['result']['classes'].values())} of the rarer)"
            scored = _predictions(middle).scores
            scores = [interval(vars(scored[score])) for score in ("auc", "balanced_accuracy", "brier")]
            more = [
                _gain(found, study, start, UNTRAINED[start]) if start in UNTRAINED else "",
                _gain(found, study, "fine-tuned", start) if start != "fine-tuned" else "",
            ]
            body.append(
                [title, name, counts, scores[0], spread, *more, *scores[1:], str(saw), f"{middle['minutes']:g}"]
            )
    header = [
        "study",
        "",
        "cases tested",
        "AUC (median seed)",
        "all seeds",
        "less the same untrained",
        "fine-tuned less this",
        "balanced accuracy",
        "Brier",
        "seen in pretraining",
    ]
    return rows([*header, "minutes"], body) + f"\n\n{machine(found[0])}."
