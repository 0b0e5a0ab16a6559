"""Tables of the recorded runs of `dagman-tiny`: `docs/learning.md`, `docs/learning-factors.md`."""

import functools
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import NOT_YET, RESULTS, interval, load, machine, number, rows

LOOKED_AT = (1, 100, 300, 600, 1000)
LAST_ROWS = 2
"""Points of a thinned curve that stand for its end: about the last fifth of the steps."""
CURVES = {
    "image_error_ratio": 2,
    "aitd_loss_ratio": 2,
    "ampd_loss_ratio": 2,
    "gitd_loss_ratio": 2,
    "pooled_spread": 2,
    "tokens_spread": 2,
    **{f"level{level}_spread": 2 for level in range(5)},
    "attention_entropy": 3,
    "hidden_dropped_excess": 2,
    "grad_norm": 1,
}
"""Columns of `metrics.jsonl` that a user may lay theirs beside, and digits."""
EXAMINED = {
    **{f"{term}_image_nats": 2 for term in ("aitd", "ampd", "gitd")},
    "ampd_position_nats": 2,
    "tokens_effective_rank": 1,
    "level4_effective_rank": 1,
}
"""Of these, what is examined every so many steps, and the ranks that alarms watch."""
STOPS = (0, 100, 300, 600, 1000)
"""Steps at which the recorded runs were asked."""

QUESTIONS = {
    "organ": "phantoms: which of 8 organs",
    "malignancy": "phantoms: malignant nodule or benign",
    "nodule": "phantoms: a nodule in the crop or none",
    "tumour": "CTs that the real runs saw: tumour or a place like it",
    "side": "CTs that the real runs saw: left or right",
}
BASELINES = {
    "voxels": "8^3 voxels",
    "histogram": "histogram",
    "shells": "shells",
}


def learning(pattern: str, *, name: str | None = None) -> list[dict[str, Any]]:
    """Results of `benchmarks/learning_curve.py`, those of one name where it is given."""
    found = [_recorded(path) for path in sorted((RESULTS / "learning").glob(pattern))]
    return [result for result in found if name in (None, result["name"])]


@functools.cache
def _recorded(path: Path) -> dict[str, Any]:
    """A result file, which many tables ask for."""
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def end_of(result: dict[str, Any]) -> dict[str, float]:
    """What a run's curve came to: means over its last points, the losses over ln K of views that are hidden."""
    points = result["curve"][-LAST_ROWS:]
    names = {name for point in points for name in point}
    found = {
        name: sum(some) / len(some)
        for name in names
        if (some := [point[name] for point in points if point.get(name) is not None])
    }
    return with_ratios(result, found)


def corpora() -> dict[str, list[dict[str, Any]]]:
    """The finished runs of `dagman-tiny`, all seeds of each corpus."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in learning("*-tiny-seed*.json", name="tiny"):
        if "untrained" in result and result["probes"][-1]["step"] == result["steps"]:
            found.setdefault(result["corpus"], []).append(result)
    for corpus, results in found.items():
        for what in ("crops", "patients", "untrained", "baselines", "chance"):
            if any(result[what] != results[0][what] for result in results):
                raise ValueError(f"the seeds on {corpus} were not asked the same: their {what} differ")
    return found


def of_runs(table: Callable[[], str]) -> Callable[[], str]:
    """A table about the runs of `corpora`, once there are any."""

    @functools.wraps(table)
    def told() -> str:
        return table() if corpora() else NOT_YET

    return told


@of_runs
def learning_reach() -> str:
    """What the runs came to, beside what was aimed at."""
    wanted = {
        "image error / visible mean": ("image_error_ratio", "below .6"),
        "AITD / ln K": ("aitd_loss_ratio", "below .9"),
        "AMPD / ln K": ("ampd_loss_ratio", "below .9"),
        "GITD / ln K": ("gitd_loss_ratio", "below .9"),
        "nats about the image in [CLS] targets": ("aitd_image_nats", "not testable as measured"),
        "of them, at most ln 4: places of one volume": ("aitd_within_nats", ""),
        "nats about the image in patch targets": ("ampd_image_nats", "more than place"),
        "nats about the place in patch targets": ("ampd_position_nats", ""),
        "nats about the image in pooled targets": ("gitd_image_nats", "not testable as measured"),
        "of them, at most ln 4: places of one volume, pooled": ("gitd_within_nats", ""),
        "guiding attention, entropy / ln N": ("attention_entropy", "below .97"),
        "clean attention, largest / mean": ("clean_attention_peak", ""),
        "spread of pooled features": ("pooled_spread", "not near 0"),
        "spread of cells": ("tokens_spread", "not near 0"),
        "effective rank of pooled features (of 32)": ("pooled_effective_rank", "far from 1"),
        "effective rank of cells (of 128)": ("tokens_effective_rank", "far from 1"),
    }
    results = [result for some in corpora().values() for result in some]
    firsts, ends = [result["curve"][0] for result in results], [end_of(result) for result in results]
    body = [
        [meaning, target, *(from_to(*ends_of, column, target) for ends_of in zip(firsts, ends, strict=True))]
        for meaning, (column, target) in wanted.items()
    ]
    body.append(["steps", "", *(str(result["steps"]) for result in results)])
    body.append(["minutes", "", *(number(minutes(result), 0) for result in results)])
    header = ["", "aim", *(f"{result['corpus']}, seed {result['seed']}" for result in results)]
    told = (
        "Each cell: at the first step, then at the end (mean of the last two points of the curve, about a fifth); bold "
        "misses the aim"
    )
    return rows(header, body) + f"\n\n{told}. One thread a run, two runs side by side. {machine(results[0])}."


def minutes(result: dict[str, Any]) -> float:
    """Of training; a point of the curve is the mean of the steps since the last."""
    steps = [0, *(point["step"] for point in result["curve"])]
    spans = [after - before for before, after in itertools.pairwise(steps)]
    return sum(span * point["seconds"] for span, point in zip(spans, result["curve"], strict=True)) / 60


def from_to(first: dict[str, float], end: dict[str, float], column: str, target: str) -> str:
    """A figure at the first step and at the end; bold where it misses a target that is a limit."""
    digits = 3 if column == "attention_entropy" else 2
    before, after = (number(part.get(column), digits) for part in (first, end))
    missed = target.startswith("below") and end[column] >= float(target.removeprefix("below"))
    return ", ".join(said for said in (before, f"**{after}**" if missed else after) if said)


def asked(table: list[dict[str, Any]], question: str, kind: str, labels: int | None) -> dict[str, Any] | None:
    """The row of a question in a table of probes."""
    wanted = (question, kind, labels)
    return next((row for row in table if (row["question"], row["features"], row["labels"]) == wanted), None)


def mean_auc(found: list[dict[str, Any] | None]) -> str:
    """The mean AUC of some rows."""
    values = [row["auc"]["value"] for row in found if row]
    return number(sum(values) / len(values), 3) if values else ""


def range_of(values: list[float], digits: int) -> str:
    """Lowest to highest, or one figure where they are the same."""
    low, high = (number(pick(values), digits) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def gain(estimate: dict[str, Any]) -> str:
    """A difference with its interval."""
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


def said_together(corpus: str, question: str, labels: int | None, beside: str = "untrained") -> str:
    """What the seeds of a corpus say together: `benchmarks/learning_together.py`."""
    wanted = (corpus, question, labels)
    found = load("learning-together")["rows"]
    (row,) = [row for row in found if (row["corpus"], row["question"], row["labels"]) == wanted]
    return gain(row[beside])


@of_runs
def learning_probes() -> str:
    """Probes at the end of the runs, beside untrained encoders and what needs no network, all features together."""
    body = []
    seeds = max(len(results) for results in corpora().values())
    for corpus, results in corpora().items():
        tables, first = [result["probes"][-1]["rows"] for result in results], results[0]
        for question, meaning in QUESTIONS.items():
            for labels in (8, 32, None):
                ends = [asked(table, question, "all", labels) for table in tables]
                networks = mean_auc([asked(table, question, "all", labels) for table in first["untrained"]])
                bases = [mean_auc([asked(first["baselines"][name], question, "all", labels)]) for name in BASELINES]
                above = [interval(row["above untrained"]) if row else "" for row in ends]
                others = [said_together(corpus, question, labels, name) for name in ("voxels", "histogram")]
                luck = _chance(first, question, labels)
                row = [corpus, meaning, str(labels or "all"), mean_auc(ends), networks, *bases, luck, *others, *above]
                body.append(row + [""] * (seeds - len(above)))
    first = next(iter(corpora().values()))[0]
    told = "; ".join(
        f"{meaning}: {first['crops'][question]:,} crops of {first['patients'][question]} "
        f"{'pairs of patients' if question == 'malignancy' else 'patients'}"
        for question, meaning in QUESTIONS.items()
        if question in first["crops"]
    )
    header = ["pretrained on", "question", "labels", "pretrained", "untrained", *BASELINES.values(), "chance"]
    header += ["above voxels", "above histogram", *(f"above untrained, seed {seed}" for seed in range(seeds))]
    return rows(header, body) + f"\n\n{told}."


def _chance(result: dict[str, Any], question: str, labels: int | None) -> str:
    """Where 95 of 100 AUCs lie when labels are drawn again."""
    (row,) = [row for row in result["chance"] if (row["question"], row["labels"]) == (question, labels)]
    return f"{row['low']:.2f} to {row['high']:.2f}"


def gained(tables: list[list[dict[str, Any]]], question: str) -> str:
    """Mean gain over untrained encoders with 32 labels, and in how many tables its interval lies apart from 0."""
    found = [asked(table, question, "all", 32) for table in tables]
    return apart([row["above untrained"] for row in found if row and row["above untrained"]["low"] is not None])


def apart(gains: list[dict[str, Any]]) -> str:
    """Mean of some differences, and how many of their intervals lie apart from 0."""
    if not gains:
        return ""
    above, below = sum(gain["low"] > 0 for gain in gains), sum(gain["high"] < 0 for gain in gains)
    mean = sum(gain["value"] for gain in gains) / len(gains)
    said = [f"{count} {word}" for count, word in ((above, "above"), (below, "below")) if count]
    return f"{mean:+.3f}; {', '.join(said) or 'none apart'} of {len(gains)}"


@of_runs
def learning_claims() -> str:
    """How far the pretrained encoders lie above untrained ones: one interval for the seeds of each corpus."""
    told = [(corpus, labels) for corpus in corpora() for labels in (8, 32, None)]
    body = [
        [meaning, *(said_together(corpus, question, labels) for corpus, labels in told)]
        for question, meaning in QUESTIONS.items()
    ]
    return rows(["pretrained on", *(f"{corpus}, {labels or 'all'} labels" for corpus, labels in told)], body)


@of_runs
def learning_short() -> str:
    """The same with 32 labels alone, beside what untrained encoders and a histogram come to."""
    body, found = [], corpora()
    for name, meaning in QUESTIONS.items():
        first = next(iter(found.values()))[0]
        base = [mean_auc([asked(table, name, "all", 32) for table in first["untrained"]])]
        base.append(mean_auc([asked(first["baselines"]["histogram"], name, "all", 32)]))
        body.append([meaning, *base, *(said_together(corpus, name, 32) for corpus in found)])
    header = [f"pretrained on {corpus}: above untrained" for corpus in found]
    return rows(["AUC, 32 labels", "untrained", "histogram of intensities", *header], body)


@of_runs
def learning_null() -> str:
    """How untrained encoders compare with each other: what no training gives, measured as gains are."""
    tables, body = next(iter(corpora().values()))[0]["untrained"], []
    for question, meaning in QUESTIONS.items():
        cells = []
        for labels in (8, 32, None):
            found = [row for table in tables if (row := asked(table, question, "all", labels))]
            values = [row["auc"]["value"] for row in found]
            far = sum(row["above untrained"]["low"] > 0 or row["above untrained"]["high"] < 0 for row in found)
            cells.append(f"{min(values):.3f} to {max(values):.3f}; {far} apart of {len(found)}" if found else "")
        body.append([meaning, *cells])
    return rows(["AUC of untrained encoders", "8 labels", "32 labels", "all"], body)


@of_runs
def learning_when() -> str:
    """The same on the way, at the steps that all seeds were probed at."""
    body, every = [], set()
    found: dict[tuple[str, str], dict[int, str]] = {}
    for corpus, results in corpora().items():
        at = [{probe["step"]: probe["rows"] for probe in result["probes"]} for result in results]
        for step in sorted(set.intersection(*(set(one) for one in at))):
            every.add(step)
            for question in QUESTIONS:
                found.setdefault((corpus, question), {})[step] = gained([one[step] for one in at], question)
    for (corpus, question), cells in found.items():
        body.append([corpus, QUESTIONS[question], *(cells.get(step, "") for step in sorted(every))])
    return rows(["pretrained on", "32 labels", *(f"step {step}" for step in sorted(every))], body)


@of_runs
def learning_parts() -> str:
    """How much each kind of features gained over the untrained encoder's, 32 labels: mean and range over the seeds."""
    body = []
    for corpus, results in corpora().items():
        for question, meaning in QUESTIONS.items():
            cells = []
            for kind in ("pooled", "cells", "cls", "all"):
                found = [asked(result["probes"][-1]["rows"], question, kind, 32) for result in results]
                gains = [row["above untrained"]["value"] for row in found if row]
                cells.append(
                    f"{sum(gains) / len(gains):+.3f} ({min(gains):+.3f} to {max(gains):+.3f})" if gains else ""
                )
            body.append([corpus, meaning, *cells])
    return rows(["pretrained on", "question", "pooled", "mean cell", "[CLS]", "all"], body)


@of_runs
def learning_heads() -> str:
    """How the attention heads changed on the way: of each corpus the seed that was asked most often, else the first."""
    body = []
    for corpus, results in corpora().items():
        result = max(results, key=lambda one: len(one["probes"]))
        for step, heads in ((str(one["step"]), one["heads"]) for one in result["probes"]):
            spread = [
                f"{math.log(len(head['distance_mm'])) - head['distance_entropy']:.4f} / {head['row_entropy']:.3f}"
                for head in heads
            ]
            body.append([f"{corpus}, seed {result['seed']}", step, *spread])
        places = [head["place"] for head in result["probes"][0]["heads"]]
    return rows(["pretrained on", "step", *places], body)


@of_runs
def learning_look() -> str:
    """What is logged on the way, lowest to highest of the seeds."""
    body = []
    for corpus, results in corpora().items():
        for column, digits in (CURVES | EXAMINED).items():
            cells = []
            for step in LOOKED_AT:
                if step > min(result["steps"] for result in results):
                    cells.append("")
                    continue
                values = [logged(result, column, step) for result in results]
                there = [value for value in values if value is not None]
                cells.append(range_of(there, digits) if there else "")
            body.append([corpus, f"`{column}`", *cells])
    lengths = {corpus: results[0]["steps"] for corpus, results in corpora().items()}
    trained = [[f"{row[0]}, {lengths[row[0]]} steps", *row[1:]] for row in body]
    return rows(["trained on", "", *(f"step {step}" for step in LOOKED_AT)], trained)


def learning_far() -> str:
    """A run ten times as long: what is logged at the steps that it was asked at, and what its features gained."""
    runs = learning("real-long-10k-seed*.json", name="long-10k")
    if not runs:
        return NOT_YET
    result, body = runs[0], []
    steps = [probe["step"] for probe in result["probes"]]
    for column, digits in (CURVES | EXAMINED).items():
        body.append([f"`{column}`", *(number(logged(result, column, step), digits) for step in steps)])
    for question, meaning in QUESTIONS.items():
        found = [asked(probe["rows"], question, "all", 32) for probe in result["probes"]]
        cells = [interval(row["above untrained"]) if row else "" for row in found]
        body.append([f"{meaning}: above untrained, 32 labels", *cells])
    settings = result["config"]["optimisation"]
    told = f"One seed, {settings['batch_size']} pairs a step in {settings['precision']}, "
    told += f"{minutes(result) / 60:.1f} hours of training"
    header = ["", *(f"step {step:,}" if step else "step 1 (probes: 0)" for step in steps)]
    return rows(header, body) + f"\n\n{told}. {machine(result)}."


def logged(result: dict[str, Any], column: str, step: int) -> float | None:
    """What a run logged nearest to a step; steps between examinations do not log all."""
    points = [with_ratios(result, point) for point in result["curve"]]
    there = [point for point in points if point.get(column) is not None]
    return min(there, key=lambda point: abs(point["step"] - step))[column] if there else None


def with_ratios(result: dict[str, Any], point: dict[str, float]) -> dict[str, float]:
    """A point of a curve with its losses over ln K, those of AMPD over the views that are hidden, as runs log them."""
    method = result["config"]["method"]
    most = math.log(method["heads"]["num_prototypes"])
    shares = {"aitd": 1.0, "gitd": 1.0, "ampd": method["hidden"]["probability"]}
    ratios = {f"{term}_loss_ratio": point[term] / share / most for term, share in shares.items() if term in point}
    return ratios | point
