"""Tables that lay settings and methods side by side: `docs/learning.md`."""

import math
import re
import sys
from typing import Any

import scipy.stats
from common import NOT_YET, RESULTS, ROOT, interval, load, machine, measured, number, rows
from learning import asked, end_of, gained, learning, mean_auc, range_of

COLUMNS = {
    "image error": "image_error_ratio",
    "AMPD / ln K": "ampd_loss_ratio",
    "AITD / ln K": "aitd_loss_ratio",
    "GITD / ln K": "gitd_loss_ratio",
    "image nats: cells": "ampd_image_nats",
    "place nats: cells": "ampd_position_nats",
    "[CLS]": "aitd_image_nats",
    "pooled": "gitd_image_nats",
    "attention": "attention_entropy",
    "hidden and dropped / chance": "hidden_dropped_excess",
    "spread": "pooled_spread",
}
"""What short runs are told apart by."""
QUESTIONS = ("organ", "malignancy", "tumour", "side", "nodule")
"""That every method is asked."""


LONG = {"tiny": "the recipe", "long-paper-weights": "weights .1 of AMPD, AITD and GITD (paper)"}
LONG |= {"long-learned-token": "a learned hidden token (the authors' code)"}


def learning_long() -> str:
    """Settings at the length at which the recipe works, 1,000 steps on the real CTs."""
    columns = {"image error": "image_error_ratio", "AMPD / ln K": "ampd_loss_ratio", "AITD / ln K": "aitd_loss_ratio"}
    columns |= {"GITD / ln K": "gitd_loss_ratio", "attention": "attention_entropy", "spread": "pooled_spread"}
    body = []
    for name, meaning in LONG.items():
        for result in learning("real-*-seed*.json", name=name):
            if result["steps"] != 1000 or not result["probes"][-1]["rows"]:
                continue
            end, table = end_of(result), result["probes"][-1]["rows"]
            gains = [gained([table], question) for question in QUESTIONS]
            shown = [number(end[column], 3 if column == "attention_entropy" else 2) for column in columns.values()]
            body.append([meaning, str(result["seed"]), *shown, *(gain.removesuffix(" of 1") for gain in gains)])
    header = ["what", "seed", *columns, *(f"{question}: gain" for question in QUESTIONS)]
    return rows(header, body) if body else NOT_YET


def learning_older() -> str:
    """Longer runs of the recipe as it was: a learned hidden token, bf16."""
    columns = {"image error": "image_error_ratio", "AMPD / ln K": "ampd_loss_ratio", "AITD / ln K": "aitd_loss_ratio"}
    columns |= {"GITD / ln K": "gitd_loss_ratio", "attention": "attention_entropy", "spread": "pooled_spread"}
    body = []
    for result in learning("*-learned-token-seed*.json", name="learned-token"):
        end = end_of(result)
        shown = [number(end[column], 3 if column == "attention_entropy" else 2) for column in columns.values()]
        organ = asked(result["probes"][-1]["rows"], "organ", "all", 32)
        more = interval(organ["above untrained"]) if organ else ""
        body.append([result["corpus"], str(result["seed"]), str(result["steps"]), *shown, more])
    header = ["trained on", "seed", "steps", *columns, "organ, 32 labels: above one untrained encoder"]
    return rows(header, body) if body else NOT_YET


def learning_factors() -> str:
    """One factor at a time."""
    results = sorted(learning("*-factor-*.json"), key=lambda result: result["name"] != "factor-as-it-is")
    several = {result["name"] for result in results if result["seed"]}
    same = [end_of(result) for result in results if result["name"] in ("factor-as-it-is", "factor-float32")]
    body = []
    for result in results:
        end = end_of(result)
        settings = {name: value for name, value in result["settings"].items() if value not in ("bf16", "learned")}
        changed = _changed(settings)
        if result["altered"]:
            changed = ", ".join([changed, altered(result["altered"])]).removeprefix(", ")
        shown = [apart(end, same, column, 3 if column == "attention_entropy" else 2) for column in COLUMNS.values()]
        seed = f", seed {result['seed']}" if result["name"] in several else ""
        body.append([result["name"].removeprefix("factor-") + seed, changed, *shown])
    if not results:
        return NOT_YET
    first = results[0]
    told = (
        f"{first['steps']} steps on {first['volumes']} volumes ({first['corpus']}), seed 0 where no other is named, in "
        "bf16 (but `float32`), with a learned hidden token (but `zero-hidden-token`)"
    )
    others = [row for row in body if not row[0].startswith(("as-it-is", "float32", "zero-hidden-token"))]
    figures = [cell for row in others for cell in row[2:] if cell]
    marked = sum("**" in cell for cell in figures)
    bold = (
        "bold: outside the 95 % interval for one run more like `as-it-is` and `float32` "
        f"({marked} of {len(figures)} figures but those of `zero-hidden-token`, where {len(figures) // 20} would be by "
        "chance alone)"
    )
    return rows(["factor", "value", *COLUMNS], body) + f"\n\n{told}; {bold}. {machine(first)}."


def _changed(settings: dict[str, str]) -> str:
    return ", ".join(f"{name.split('.', 1)[1]} {value}" for name, value in settings.items())


def learning_today() -> str:
    """One factor at a time of the recipe as it is, with a probe at the end: mean and range over the seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in learning("*-today-*.json"):
        found.setdefault(result["name"].removeprefix("today-"), []).append(result)
    body = []
    for name, runs in sorted(found.items(), key=lambda item: item[0] != "as-it-is"):
        ends = [end_of(run) for run in runs]
        shown = [
            range_of(values, 3 if column == "attention_entropy" else 2) if values else ""
            for column in COLUMNS.values()
            for values in [[end[column] for end in ends if column in end]]
        ]
        gains = [asked(run["probes"][-1]["rows"], "organ", "all", 32) for run in runs]
        above = [gain["above untrained"] for gain in gains if gain]
        apart_of = sum(one["low"] > 0 for one in above), sum(one["high"] < 0 for one in above)
        told = range_of([one["value"] for one in above], 3)
        told += "".join(f" ({count}{sign})" for count, sign in zip(apart_of, "+-", strict=True) if count)
        body.append([name, _changed(runs[0]["settings"]), str(len(runs)), *shown, told])
    if not body:
        return NOT_YET
    first = next(iter(found.values()))[0]
    told = (
        f"{first['steps']} steps on {first['volumes']} volumes ({first['corpus']}), lowest to highest of the seeds; of "
        "how many the interval lies above (+) or below (-) 0"
    )
    header = ["factor", "value", "seeds", *COLUMNS, "organ, 32 labels: above untrained"]
    return rows(header, body) + f"\n\n{told}. {machine(first)}."


def apart(end: dict[str, float], same: list[dict[str, float]], column: str, digits: int) -> str:
    """A figure; bold outside the 95 % prediction interval of the runs that differ in seed or rounding alone."""
    value, others = number(end.get(column), digits), [one[column] for one in same]
    mean, many = sum(others) / len(others), len(others)
    spread = math.sqrt(sum((other - mean) ** 2 for other in others) / (many - 1) * (1 + 1 / many))
    far = value and abs(end[column] - mean) > scipy.stats.t.ppf(0.975, many - 1) * spread + 0.5 * 10**-digits
    return f"**{value}**" if far else value


def altered(name: str) -> str:
    """What a change that is no setting does, in the words of the benchmark."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from learning_alterations import ALTERATIONS

    said = (ALTERATIONS[name].__doc__ or name).strip().rstrip(".")
    return said[0].lower() + said[1:]


def _methods() -> dict[str, list[dict[str, Any]]]:
    """Name to the runs of a recipe and a length that came to their end: `benchmarks/learning_methods.py`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in learning("real-*-tiny*-seed*.json"):
        if result["probes"] and result["probes"][-1]["step"] == result["steps"]:
            found.setdefault(result["name"], []).append(result)
    return found


def learning_methods() -> str:
    """The compared methods at their tiny size: how they ended, what they gained, what a step costs."""
    costs = {}
    if (RESULTS / "recipes.json").exists():
        costs = {row["recipe"]: row["over_dagman"] for row in load("recipes")["rows"]}
    found = _methods()
    body = []
    for name in [*found, *(name for name in costs if name not in found)]:
        runs = found.get(name, [])
        recipe = runs[0]["config"]["recipe"] if runs else name
        ends = [end_of(run) for run in runs]
        ends = [end | {"last level": end[max(levels)]} if (levels := _ranks(end)) else end for end in ends]
        columns = (
            "image_error_ratio",
            "pooled_spread",
            "last level",
            "attention_entropy",
            "aitd_loss_ratio",
            "ampd_loss_ratio",
            "gitd_loss_ratio",
        )
        shown = [_mean([end[column] for end in ends if column in end]) for column in columns]
        gains = []
        for question in QUESTIONS:
            rows_of = [asked(run["probes"][-1]["rows"], question, "all", 32) for run in runs]
            gains.append(_gain([row["above untrained"] for row in rows_of if row]))
        steps = ", ".join(sorted({str(run["steps"]) for run in runs}))
        body.append([recipe, steps or "not run yet", str(len(runs)), number(costs.get(recipe)), *shown, *gains])
    if not body:
        return NOT_YET
    header = ["recipe", "steps", "seeds", "cost of a step / dagman-tiny", "image error", "spread", "rank"]
    header += ["attention", "AITD", "AMPD", "GITD"]
    first = next(iter(found.values()))[0]
    told = (
        "Means over the seeds; rank: of the last level. Gains: AUC with 32 labels above the untrained encoder, the "
        "lowest and highest end of the seeds' 95 % intervals, and how many of these lie above (+) or below (-) 0. "
        f"{first['volumes']} volumes. {machine(first)}."
    )
    return rows([*header, *(f"{question}: gain" for question in QUESTIONS)], body) + "\n\n" + told


def _ranks(end: dict[str, float]) -> list[str]:
    """Columns of the effective rank at each level: a ViT has fewer."""
    return [name for name in end if re.fullmatch(r"level\d_effective_rank", name)]


def learning_methods_auc() -> str:
    """What the encoders score, and how that stands to raw voxels."""
    found = _methods()
    if not found:
        return NOT_YET
    body = []
    for runs in found.values():
        cells = []
        for question in QUESTIONS:
            rows_of = [row for run in runs if (row := asked(run["probes"][-1]["rows"], question, "all", 32))]
            less = _gain([row["above voxels"] for row in rows_of])
            tables = [table for run in runs for table in run["untrained"]]
            plain = mean_auc([asked(table, question, "all", 32) for table in tables])
            mean = sum(row["auc"]["value"] for row in rows_of) / len(rows_of)
            cells.append(f"{mean:.3f}; untrained {plain}; {less}")
        body.append([f"{runs[0]['config']['recipe']}, {runs[0]['steps']} steps", *cells])
    for name, rows_of_all in next(iter(found.values()))[0]["baselines"].items():
        estimates = [asked(rows_of_all, question, "all", 32) for question in QUESTIONS]
        body.append([name, *(interval(row["auc"]) if row else "" for row in estimates)])
    told = (
        "AUC with 32 labels, mean over the seeds; that of untrained encoders of this kind; the difference from raw "
        "voxels, told as gains above. The last rows need no network; their intervals are over patients."
    )
    return rows(["features", *QUESTIONS], body) + "\n\n" + told


def _gain(estimates: list[dict[str, Any]]) -> str:
    """Mean gain over seeds, the lowest and highest end of their intervals, and how many lie above and below 0."""
    if not estimates:
        return ""
    mean = sum(one["value"] for one in estimates) / len(estimates)
    above, below = sum(one["low"] > 0 for one in estimates), sum(one["high"] < 0 for one in estimates)
    low, high = min(one["low"] for one in estimates), max(one["high"] for one in estimates)
    return (
        f"{mean:+.3f} ({low:+.2f} to {high:+.2f})" + (f" {above}+" if above else "") + (f" {below}-" if below else "")
    )


def learning_broken() -> str:
    """What the learning test says of changes that stop the learning."""
    found = measured("learning-broken")
    if found is None:
        return NOT_YET
    body = [
        [row["what"], str(row["seed"]), f"red: {row['by']}" if row["red"] else "green", str(row["seconds"])]
        for row in found["rows"]
    ]
    return rows(["change", "seed", "the test", "seconds"], body) + f"\n\n{machine(found)}."


def _mean(values: list[float]) -> str:
    return number(sum(values) / len(values)) if values else ""
