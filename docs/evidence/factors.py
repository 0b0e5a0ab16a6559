"""Tables that lay settings and methods side by side: `docs/learning-factors.md`."""

import math
import re
import sys
from typing import Any

import scipy.stats
from common import NOT_YET, RESULTS, ROOT, interval, load, machine, measured, number, rows
from learning import QUESTIONS, asked, end_of, gain, gained, learning, mean_auc, range_of

sys.path.insert(0, str(ROOT / "benchmarks"))

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
LONGER = {"image error": "image_error_ratio", "AMPD / ln K": "ampd_loss_ratio", "AITD / ln K": "aitd_loss_ratio"}
LONGER |= {"GITD / ln K": "gitd_loss_ratio", "attention": "attention_entropy", "spread": "pooled_spread"}
"""What runs of 1,000 steps and more are told apart by."""
LONG = {"tiny": "the recipe", "long-paper-weights": "weights .1 of AMPD, AITD and GITD (paper)"}
LONG |= {"long-learned-token": "a learned hidden token (the authors' code)"}

LENGTH, SHORT = 1000, 300
"""Steps of the compared methods: as many as the curve of `dagman-tiny` needs, and too few."""


def learning_long() -> str:
    """Settings at the length at which the recipe works, 1,000 steps on the real CTs."""
    body = []
    for name, meaning in LONG.items():
        for result in learning("real-*-seed*.json", name=name):
            if result["steps"] != 1000 or not result["probes"][-1]["rows"]:
                continue
            end, table = end_of(result), result["probes"][-1]["rows"]
            gains = [gained([table], question) for question in QUESTIONS]
            shown = [number(end[column], _digits(column)) for column in LONGER.values()]
            body.append([meaning, str(result["seed"]), *shown, *(told.removesuffix(" of 1") for told in gains)])
    header = ["what", "seed", *LONGER, *(f"{question}: gain" for question in QUESTIONS)]
    return rows(header, body) if body else NOT_YET


def learning_older() -> str:
    """Longer runs of the recipe as it was: a learned hidden token, bf16."""
    body = []
    for result in learning("*-learned-token-seed*.json", name="learned-token"):
        end = end_of(result)
        shown = [number(end[column], _digits(column)) for column in LONGER.values()]
        organ = asked(result["probes"][-1]["rows"], "organ", "all", 32)
        more = interval(organ["above untrained"]) if organ else ""
        body.append([result["corpus"], str(result["seed"]), str(result["steps"]), *shown, more])
    header = ["trained on", "seed", "steps", *LONGER, "organ, 32 labels: above one untrained encoder"]
    return rows(header, body) if body else NOT_YET


def _digits(column: str) -> int:
    return 3 if column == "attention_entropy" else 2


def older() -> dict[str, list[dict[str, Any]]]:
    """Name of a factor to its runs of the recipe as it was."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in sorted(learning("*-factor-*.json"), key=lambda result: result["name"] != "factor-as-it-is"):
        found.setdefault(result["name"].removeprefix("factor-"), []).append(result)
    return found


def _alike(factors: dict[str, list[dict[str, Any]]]) -> list[dict[str, float]]:
    """How the runs of the recipe as it was ended that differ in seed or rounding alone."""
    return [end_of(result) for name in ("as-it-is", "float32") for result in factors[name]]


def set_apart(name: str) -> list[str]:
    """In which figures the runs with a factor of the older recipe leave the band of those without, all seeds."""
    factors = older()
    same, ends = _alike(factors), [end_of(result) for result in factors[name]]
    found = []
    for told, column in COLUMNS.items():
        values = [end[column] for end in ends if column in end]
        if values and all("**" in emboldened(end, same, column) for end in ends):
            found.append(f"{told} {range_of(values, _digits(column))}")
    return found


def learning_factors() -> str:
    """One factor at a time, of the recipe as it was."""
    factors = older()
    if not factors:
        return NOT_YET
    results, same = [result for runs in factors.values() for result in runs], _alike(factors)
    body = []
    for result in results:
        end = end_of(result)
        settings = {name: value for name, value in result["settings"].items() if value not in ("bf16", "learned")}
        changed = _changed(settings)
        if result["altered"]:
            changed = ", ".join([changed, altered(result["altered"])]).removeprefix(", ")
        shown = [emboldened(end, same, column) for column in COLUMNS.values()]
        name = result["name"].removeprefix("factor-")
        seed = f", seed {result['seed']}" if len(factors[name]) > 1 else ""
        body.append([name + seed, changed, *shown])
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


def today() -> dict[str, dict[int, dict[str, Any]]]:
    """Name of a factor to its runs of the recipe as it is, by seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for result in sorted(learning("*-today-*.json"), key=lambda result: result["name"] != "today-as-it-is"):
        found.setdefault(result["name"].removeprefix("today-"), {})[result["seed"]] = result
    return found


def learning_today() -> str:
    """One factor at a time of the recipe as it is, with a probe at the end: lowest to highest of the seeds."""
    from learning_factors import TODAY

    found, body = today(), []
    if not found:
        return NOT_YET
    for name, runs in found.items():
        ends = [end_of(run) for run in runs.values()]
        shown = [
            range_of(values, _digits(column)) if values else ""
            for column in COLUMNS.values()
            for values in [[end[column] for end in ends if column in end]]
        ]
        above = [_organ(run)["above untrained"] for run in runs.values()]
        apart_of = sum(one["low"] > 0 for one in above), sum(one["high"] < 0 for one in above)
        told = range_of([one["value"] for one in above], 3)
        told += "".join(f" ({count}{sign})" for count, sign in zip(apart_of, "+-", strict=True) if count)
        changed = _changed(next(iter(runs.values()))["settings"])
        body.append([name, changed, str(len(runs)), *shown, told, paired(name)])
    first = found["as-it-is"][0]
    made = [(f"{name}, seed {seed}", machine(run)) for name, runs in found.items() for seed, run in runs.items()]
    elsewhere = "".join(f"; {name}: {where}" for name, where in made if where != machine(first))
    told = (
        f"{first['steps']} steps on {first['volumes']} volumes ({first['corpus']}), lowest to highest of the seeds; of "
        "how many the interval lies above (+) or below (-) 0. Last column: mean of the differences between runs of one "
        f"seed, 95 % interval by Student's t; one seed has none. {machine(first)}{elsewhere}."
    )
    missing = [name for name in TODAY if name not in found]
    few = [name for name, runs in found.items() if len(runs) < len(found["as-it-is"])]
    told += f"\n\n**Not run**: {', '.join(f'`{name}`' for name in missing) or 'none'}. " if missing else "\n\n"
    told += f"**Of fewer seeds than the recipe**: {', '.join(f'`{name}`' for name in few) or 'none'}."
    header = ["factor", "value", "seeds", *COLUMNS, "organ, 32 labels: above untrained", "organ: above `as-it-is`"]
    return rows(header, body) + f"\n\n{told}"


def _organ(run: dict[str, Any]) -> Any:
    return asked(run["probes"][-1]["rows"], "organ", "all", 32)


def paired(name: str) -> str:
    """How far organs end above the recipe as it is, seed by seed."""
    runs, plain = today()[name], today()["as-it-is"]
    if name == "as-it-is":
        return ""
    less = [_organ(run)["auc"]["value"] - _organ(plain[seed])["auc"]["value"] for seed, run in runs.items()]
    mean, many = sum(less) / len(less), len(less)
    if many == 1:
        return f"{mean:+.3f}"
    error = math.sqrt(sum((one - mean) ** 2 for one in less) / (many - 1) / many)
    far = scipy.stats.t.ppf(0.975, many - 1) * error
    return gain({"value": mean, "low": mean - far, "high": mean + far})


def emboldened(end: dict[str, float], same: list[dict[str, float]], column: str) -> str:
    """A figure; bold outside the 95 % prediction interval of the runs that differ in seed or rounding alone."""
    digits = _digits(column)
    value, others = number(end.get(column), digits), [one[column] for one in same]
    mean, many = sum(others) / len(others), len(others)
    spread = math.sqrt(sum((other - mean) ** 2 for other in others) / (many - 1) * (1 + 1 / many))
    far = value and abs(end[column] - mean) > scipy.stats.t.ppf(0.975, many - 1) * spread + 0.5 * 10**-digits
    return f"**{value}**" if far else value


def altered(name: str) -> str:
    """What a change that is no setting does, in the words of the benchmark."""
    from learning_alterations import ALTERATIONS

    said = (ALTERATIONS[name].__doc__ or name).strip().rstrip(".")
    return said[0].lower() + said[1:]


def _methods(steps: int) -> dict[str, list[dict[str, Any]]]:
    """Recipe to its runs of this length that came to their end: `benchmarks/learning_methods.py`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in learning("real-*-tiny*-seed*.json"):
        if result["probes"] and result["probes"][-1]["step"] == result["steps"] == steps:
            found.setdefault(result["config"]["recipe"], []).append(result)
    return found


def learning_methods(steps: int = LENGTH) -> str:
    """The compared methods at their tiny size: how they ended, what they gained, what a step costs."""
    costs = {}
    if (RESULTS / "recipes.json").exists():
        costs = {row["recipe"]: row["over_dagman"] for row in load("recipes")["rows"]}
    found = _methods(steps)
    body = []
    for name in [*found, *(name for name in costs if name not in found)]:
        runs = found.get(name, [])
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
        body.append([name, str(len(runs) or "not run yet"), number(costs.get(name)), *shown, *gains])
    if not body:
        return NOT_YET
    header = ["recipe", "seeds", "cost of a step / dagman-tiny", "image error", "spread", "rank"]
    header += ["attention", "AITD", "AMPD", "GITD"]
    first = next(iter(found.values()))[0]
    told = (
        f"{steps} steps. Means over the seeds; rank: of the last level. Gains: AUC with 32 labels above the untrained "
        "encoder, the lowest and highest end of the seeds' 95 % intervals, and how many of these lie above (+) or "
        "below (-) 0. "
        f"{first['volumes']} volumes. {machine(first)}."
    )
    return rows([*header, *(f"{question}: gain" for question in QUESTIONS)], body) + "\n\n" + told


def _ranks(end: dict[str, float]) -> list[str]:
    """Columns of the effective rank at each level: a ViT has fewer."""
    return [name for name in end if re.fullmatch(r"level\d_effective_rank", name)]


def learning_methods_auc(steps: int = LENGTH) -> str:
    """What the encoders score, and how that stands to raw voxels."""
    found = _methods(steps)
    if not found:
        return NOT_YET
    body = []
    for name, runs in found.items():
        cells = []
        for question in QUESTIONS:
            rows_of = [row for run in runs if (row := asked(run["probes"][-1]["rows"], question, "all", 32))]
            less = _gain([row["above voxels"] for row in rows_of])
            tables = [table for run in runs for table in run["untrained"]]
            plain = mean_auc([asked(table, question, "all", 32) for table in tables])
            mean = sum(row["auc"]["value"] for row in rows_of) / len(rows_of)
            cells.append(f"{mean:.3f}; untrained {plain}; less voxels {less}")
        body.append([name, *cells])
    for name, rows_of_all in next(iter(found.values()))[0]["baselines"].items():
        estimates = [asked(rows_of_all, question, "all", 32) for question in QUESTIONS]
        body.append([name, *(interval(row["auc"]) if row else "" for row in estimates)])
    told = (
        f"{steps} steps. AUC with 32 labels, mean over the seeds; that of untrained encoders of this kind; and less "
        "that of raw voxels, told as gains above. The last rows need no network; their intervals are over patients."
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
    bands = {  # the test's name of a figure: what it is called here, with its band in `tests/train/test_learning.py`
        "image_error_ratio": "image error: .4 to .85",
        "pooled_spread": "pooled spread: .5 to .97",
        "cls_spread": "[CLS] spread: .5 to .97",
        "ampd_loss_ratio": "AMPD / ln K: below .85",
        "aitd_loss_ratio": "AITD / ln K: below .9",
        "attention_entropy": "attention: below .99",
        "aitd_image_nats": "nats of [CLS] targets: above 1.5",
    }
    body = []
    for row in found["rows"]:
        figures = [number(row["figures"][name], 3 if name == "attention_entropy" else 2) for name in bands]
        verdict = f"red: {row['by']}" if row["red"] else "green"
        body.append([row["what"], str(row["seed"]), verdict, *figures, str(row["seconds"])])
    return rows(["change", "seed", "the test", *bands.values(), "seconds"], body) + f"\n\n{machine(found)}."


def _mean(values: list[float]) -> str:
    return number(sum(values) / len(values)) if values else ""
