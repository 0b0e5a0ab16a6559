"""Write the tables of README and docs from `benchmarks/results/*.json`; no figure is typed by hand.

A document marks a table with `<!-- table: NAME -->` and `<!-- end -->`; `make docs` fills what stands between.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("learning", "uses", "classification", "segmentation", "performance")),
)
READINGS = {
    "image_error_ratio": "image error / that of predicting each view's visible mean",
    "pooled_spread": "spread of the pooled features",
    "aitd_teacher_entropy": "teacher entropy of [CLS] / ln K",
    "attention_entropy": "attention entropy / ln N",
    "attention_peak": "attention peak, times uniform",
    "ampd_image_nats": "nats about the image in the teacher's targets for cells",
    "ampd_position_nats": "nats about the cell's place in them",
    "gitd_image_nats": "nats about the image in its pooled targets",
}


NOT_YET = "No run has finished yet."


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


def step() -> str:
    """Whole pretraining steps beside MONAI's Swin put together plainly."""
    result = load("step")
    case = ("crop", "batch", "precision", "allocator")
    bases = {tuple(row[name] for name in case): row for row in result["rows"] if row["variant"] == "monai"}
    body = []
    for row in result["rows"]:
        base = bases.get(tuple(row[name] for name in case))
        columns = ("seconds_median", "cpu_seconds", "peak_mib")
        ratios = [number(base[name] / row[name]) if base else "" for name in columns]
        places = [str(row["crop"]), str(row["batch"]), row["precision"], row["allocator"], row["variant"]]
        figures = [number(row["seconds_median"]), number(row["cpu_seconds"]), number(row["peak_mib"], 0)]
        body.append([*places, *figures, *ratios])
    header = [*("crop", "pairs", "precision", "allocator", "variant", "s a step", "CPU s", "peak MiB")]
    header += ["monai / this: time", "CPU", "memory"]
    fewest = min(row["steps"] for row in result["rows"])
    note = f"Medians of at least {fewest} steps taken in turns; load of the machine {result['machine']['load']}"
    return rows(header, body) + f"\n\n{note}. {machine(result)}."


def step_parts() -> str:
    """Where the time of a step goes."""
    found = [row for row in load("step")["rows"] if row.get("parts")]
    body = [
        [
            *(f"{row['crop']}, {row['batch']}, {row['precision']}, {row['allocator']}", row["variant"]),
            *(f"{100 * share:.0f} %" for share in row["parts"].values()),
        ]
        for row in found
    ]
    return rows(["crop, pairs, precision, allocator", "variant", *found[0]["parts"]], body)


def measured(name: str) -> dict[str, Any] | None:
    """A result file that may not be there yet."""
    return load(name) if (RESULTS / f"{name}.json").exists() else None


def input_rates() -> str:
    """Crops a second, preparing beside MONAI, and waiting."""
    result = measured("input")
    if result is None:
        return NOT_YET
    taken = [
        [f"{row['processes']} loader processes", f"{row['crops_a_second']:.0f} crops a second"]
        for row in result["crops"]
    ]
    prepared = [
        [
            f"{row['scan']}, {row['slices']} slices to 2 mm",
            f"{row['antialiased']:.2f} s anti-aliased, {row['linear']:.2f} s linear, {row['monai']:.2f} s by MONAI",
        ]
        for row in result.get("preparing", [])
    ]
    waited = [[f"`dagman-tiny` without a batch, {name}", f"{share:.2%}"] for name, share in result["waiting"].items()]
    note = f"Views of 128^3 of volumes of 300^3 for the crops; load of the machine {result['machine']['load']}"
    return rows(["what", "measured"], [*taken, *prepared, *waited]) + f"\n\n{note}. {machine(result)}."


def scaling() -> str:
    """What a sample costs as everything around it grows."""
    result = measured("scaling")
    if result is None:
        return NOT_YET
    body = []
    for point in result["points"]:
        if point["quantity"] == "volumes":
            told = f"{point['pair_ms']:.2f} ms a pair of crops, {point['open_ms']:.0f} ms to open the store"
        else:
            told = f"{point['seconds_a_pair']:.3f} s a pair, {point['seconds_a_step']:.2f} s a step"
        body.append([point["quantity"], str(point["value"]), told])
    note = f"load of the machine {result['machine']['load']}. {machine(result)}."
    return rows(["what grows", "to", "costs"], body) + f"\n\nMedians; {note}"


def tour() -> str:
    """What the verbs print."""
    return f"```\n{(RESULTS / 'tour.txt').read_text()}```"


NOT_RUN = "No run has finished yet."
LAST_ROWS = 2
"""Points of a thinned curve that stand for its end: about the last sixth of the steps."""
QUESTIONS = {
    "organ": "which of 8 organs",
    "malignancy": "malignant nodule or not",
    "nodule": "a nodule in the crop or not",
    "tumour": "tumour or not",
    "side": "left or right",
    "upright": "upright or upside down",
}


def learning(pattern: str, *, name: str | None = None) -> list[dict[str, Any]]:
    """Results of `benchmarks/learning_curve.py`, those of one name where it is given."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "learning").glob(pattern))]
    return [result for result in found if name in (None, result["name"])]


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


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or nothing where the run has none."""
    return "" if value is None else f"{value:.{digits}f}"


def corpora() -> dict[str, list[dict[str, Any]]]:
    """The finished runs of `dagman-tiny`, all seeds of each corpus."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in learning("*-tiny-seed*.json", name="tiny"):
        if result["probes"] and result["probes"][-1]["step"] == result["steps"]:
            found.setdefault(result["corpus"], []).append(result)
    return found


def learning_reach() -> str:
    """What the runs came to, beside what was aimed at."""
    wanted = {
        "image error / visible mean": ("image_error_ratio", "below .6"),
        "AITD / ln K": ("aitd_loss_ratio", "below .9"),
        "AMPD / ln K": ("ampd_loss_ratio", "below .9"),
        "GITD / ln K": ("gitd_loss_ratio", "below .9"),
        "nats about the image in [CLS] targets": ("aitd_image_nats", "more than place: 0"),
        "nats about the image in patch targets": ("ampd_image_nats", "more than place"),
        "nats about the place in patch targets": ("ampd_position_nats", ""),
        "nats about the image in pooled targets": ("gitd_image_nats", "more than place: 0"),
        "guiding attention, entropy / ln N": ("attention_entropy", "below .97"),
        "clean attention, largest / mean": ("clean_attention_peak", ""),
        "spread of pooled features": ("pooled_spread", "not near 0"),
        "spread of cells": ("tokens_spread", "not near 0"),
    }
    results = [result for some in corpora().values() for result in some]
    ends = [end_of(result) for result in results]
    body = [
        [meaning, target, *(number(end.get(column), 3) for end in ends)] for meaning, (column, target) in wanted.items()
    ]
    for structure in ("organs", "heart", "aorta", "nodule", "tumour", "nodule of one CT"):
        gains = [result["probes"][-1]["attention"].get(structure) for result in results]
        cells = [gain_of(gain) if gain else "" for gain in gains]
        aim = "2 on organs or nodules" if structure == "organs" else ""
        body.append([f"attention / volume on: {structure}", aim, *cells])
    body.append(["steps", "", *(str(result["steps"]) for result in results)])
    body.append(
        ["minutes", "", *(number(end["seconds"] * r["steps"] / 60, 0) for r, end in zip(results, ends, strict=True))]
    )
    header = ["", "aim", *(f"{result['corpus']}, seed {result['seed']}" for result in results)]
    return rows(header, body) + f"\n\nOne thread a run, two runs side by side. {machine(results[0])}."


def gain_of(gain: dict[str, float]) -> str:
    """A share of attention over that of the volume, with its interval where there are several volumes."""
    interval_of = f" ({gain['low']:.2f} to {gain['high']:.2f})" if "low" in gain else ""
    return f"{gain['gain']:.2f}{interval_of}"


def asked(table: list[dict[str, Any]], question: str, kind: str, labels: int | None) -> dict[str, Any] | None:
    """The row of a question in a table of probes."""
    wanted = (question, kind, labels)
    return next((row for row in table if (row["question"], row["features"], row["labels"]) == wanted), None)


def mean_auc(found: list[dict[str, Any] | None]) -> str:
    """The mean AUC of some rows."""
    values = [row["auc"]["value"] for row in found if row]
    return number(sum(values) / len(values), 3) if values else ""


def learning_probes() -> str:
    """Probes at the end of the runs, beside the untrained encoder and raw voxels, all features together."""
    body = []
    for corpus, results in corpora().items():
        for question, meaning in QUESTIONS.items():
            for labels in (8, 32, None):
                ends = [asked(result["probes"][-1]["rows"], question, "all", labels) for result in results]
                bases = [
                    mean_auc([asked(result["baselines"][name], question, "all", labels) for result in results])
                    for name in ("untrained", "voxels")
                ]
                gained = [interval(row["above untrained"]) if row else "" for row in ends]
                if any(gained):
                    shown = str(labels) if labels else "all"
                    body.append([corpus, meaning, shown, mean_auc(ends), *bases, *gained])
    seeds = max(len(results) for results in corpora().values())
    gains = [f"above untrained, seed {seed}" for seed in range(seeds)]
    body = [row + [""] * (6 + seeds - len(row)) for row in body]
    return rows(["pretrained on", "question", "labels", "pretrained", "untrained", "raw voxels", *gains], body)


def learning_claims() -> str:
    """In how many seeds the pretrained encoder lies above the untrained one, and below, intervals apart; 32 labels."""
    body = []
    for question, meaning in QUESTIONS.items():
        cells = []
        for results in corpora().values():
            found = [asked(result["probes"][-1]["rows"], question, "all", 32) for result in results]
            gains = [row["above untrained"] for row in found if row and row["above untrained"]["low"] is not None]
            above, below = sum(gain["low"] > 0 for gain in gains), sum(gain["high"] < 0 for gain in gains)
            mean = sum(gain["value"] for gain in gains) / len(gains)
            said = [f"{count} {word}" for count, word in ((above, "above"), (below, "below")) if count]
            cells.append(f"{mean:+.3f}; {', '.join(said) or 'none apart'} of {len(gains)}")
        body.append([meaning, *cells])
    return rows(["32 labels", *(f"pretrained on {corpus}" for corpus in corpora())], body)


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


def learning_heads() -> str:
    """How the attention heads of a run changed on the way: first seed of each corpus with answers on the way."""
    body = []
    for corpus, results in corpora().items():
        result = max(results, key=lambda one: len(one["probes"]))
        looks = [("0", result["untrained_heads"]), *((str(one["step"]), one["heads"]) for one in result["probes"])]
        for step, heads in looks:
            spread = [
                f"{math.log(len(head['distance_mm'])) - head['distance_entropy']:.4f} / {head['row_entropy']:.3f}"
                for head in heads
            ]
            body.append([f"{corpus}, seed {result['seed']}", step, *spread])
        places = [head["place"] for head in result["untrained_heads"]]
    return rows(["pretrained on", "step", *places], body)


def learning_look() -> str:
    """What is logged on the way, means over the seeds and their range where they differ."""
    columns = {
        "image_error_ratio": 2,
        "aitd_loss_ratio": 2,
        "ampd_loss_ratio": 2,
        "gitd_loss_ratio": 2,
        "pooled_spread": 2,
        "tokens_spread": 2,
        "attention_entropy": 3,
        "hidden_dropped_excess": 2,
    }
    body = []
    for corpus, results in corpora().items():
        for column, digits in columns.items():
            cells = []
            for step in (1, 100, 300, 1000):
                points = [min(result["curve"], key=lambda point: abs(point["step"] - step)) for result in results]
                values = [with_ratios(result, point).get(column) for result, point in zip(results, points, strict=True)]
                there = [value for value in values if value is not None]
                low, high = (number(pick(there), digits) for pick in (min, max)) if there else ("", "")
                cells.append(low if low == high else f"{low} to {high}")
            body.append([corpus, f"`{column}`", *cells])
    return rows(["trained on", "", "step 1", "100", "300", "1000"], body)


def with_ratios(result: dict[str, Any], point: dict[str, float]) -> dict[str, float]:
    """A point of a curve with its losses over ln K, those of AMPD over the views that are hidden."""
    method = result["config"]["method"]
    most = math.log(method["heads"]["num_prototypes"])
    shares = {"aitd": 1.0, "gitd": 1.0, "ampd": method["hidden"]["probability"]}
    ratios = {f"{term}_loss_ratio": point[term] / share / most for term, share in shares.items() if term in point}
    return point | ratios


def learning_factors() -> str:
    """One factor at a time."""
    columns = {
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
    results = sorted(learning("*-factor-*.json"), key=lambda result: result["name"] != "factor-as-it-is")
    body = []
    for result in results:
        end = end_of(result)
        settings = {name: value for name, value in result["settings"].items() if value != "bf16"}
        changed = ", ".join(f"{name.split('.', 1)[1]} {value}" for name, value in settings.items())
        shown = [number(end.get(column), 3 if column == "attention_entropy" else 2) for column in columns.values()]
        body.append([result["name"].removeprefix("factor-"), changed, *shown])
    if not results:
        return "No run has finished yet."
    first = results[0]
    told = f"{first['steps']} steps on {first['volumes']} volumes ({first['corpus']}), seed {first['seed']}"
    return rows(["factor", "value", *columns], body) + f"\n\n{told}. {machine(first)}."


def learning_methods() -> str:
    """The compared methods at their tiny size: how they ended, what they gained, what a step costs."""
    costs = {}
    if (RESULTS / "recipes.json").exists():
        costs = {row["recipe"]: row["over_dagman"] for row in load("recipes")["rows"]}
    found: dict[str, list[dict[str, Any]]] = {}
    for result in learning("real-*-tiny-seed*.json"):
        if result["probes"] and result["probes"][-1]["step"] == result["steps"]:
            found.setdefault(result["config"]["recipe"], []).append(result)
    body = []
    for recipe in [*found, *(name for name in costs if name not in found)]:
        runs = found.get(recipe, [])
        ends = [end_of(run) for run in runs]
        columns = ("image_error_ratio", "pooled_spread", "aitd_loss_ratio", "ampd_loss_ratio", "gitd_loss_ratio")
        shown = [_mean([end[column] for end in ends if column in end]) for column in columns]
        gains = []
        for question in ("organ", "malignancy", "tumour", "side"):
            rows_of = [asked(run["probes"][-1]["rows"], question, "all", 32) for run in runs]
            gains.append("; ".join(interval(row["above untrained"]) for row in rows_of if row))
        steps = ", ".join(str(run["steps"]) for run in runs)
        body.append([recipe, steps or "not run yet", number(costs.get(recipe)), *shown, *gains])
    header = ["recipe", "steps", "cost of a step / dagman-tiny", "image error", "spread", "AITD", "AMPD", "GITD"]
    return rows(
        [*header, *(f"{question}: above untrained" for question in ("organ", "malignancy", "tumour", "side"))], body
    )


def _mean(values: list[float]) -> str:
    return number(sum(values) / len(values)) if values else ""


def used(part: str) -> dict[str, Any] | None:
    """A result of `benchmarks/uses_look.py`."""
    path = RESULTS / "uses" / f"look-{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


def uses_cluster() -> str:
    """Organs in clusters."""
    result, body, told = used("cluster"), [], []
    if result is None:
        return NOT_RUN
    names = ("map_intra", "map_inter", "map_ratio", "ratio", "silhouette", "knn")
    for corpus, found in result["corpora"].items():
        body += [[corpus, row["features"], *(interval(row[name]) or "n/a" for name in names)] for row in found["rows"]]
        told.append(
            f"{corpus}: {found['crops']} crops of {found['structures']} structures, {len(found['classes'])} classes, "
            f"patients: {found['patients']}"
        )
    header = ["crops of", "features", "map: intra", "inter", "intra / inter", "features: intra / inter", "silhouette"]
    return rows([*header, "5-NN accuracy"], body) + f"\n\n{'; '.join(told)}. {machine(result)}."


def uses_attention() -> str:
    """Attention on masks."""
    result = used("attention")
    if result is None:
        return NOT_RUN
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
        return NOT_RUN
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
        return NOT_RUN
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import uses_segment as sarcomas

    first = found[0]
    about = f"{first['steps']} steps of {first['crop']}^3 crops, {first['precision']}, {first['device']}"
    return f"{sarcomas.table(first['steps'], first['seed'])}\n\n{about}."


STARTS = {
    "probe": "linear probe",
    "random probe": "linear probe, untrained encoder",
    "fine-tuned": "fine-tuned",
    "scratch": "the same network from scratch",
    "resnet50": "ResNet-50 from scratch",
}


def uses_classify() -> str:
    """Classification of STS and Adrenal: each start, the median of its seeds."""
    found = [json.loads(path.read_text()) for path in sorted((RESULTS / "uses").glob("classify-*.json"))]
    if not found:
        return NOT_RUN
    titles = {"sts": "lung metastasis (STS)", "adrenal": "Adrenal 28"}
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
            scores = [interval(middle["result"][score]) for score in ("auc", "balanced_accuracy", "brier")]
            body.append([title, name, counts, scores[0], spread, *scores[1:], str(saw), f"{middle['minutes']:g}"])
    header = [
        "study",
        "",
        "cases tested",
        "AUC (median seed)",
        "all seeds",
        "balanced accuracy",
        "Brier",
        "seen in pretraining",
    ]
    return rows([*header, "minutes"], body) + f"\n\n{machine(found[0])}."


TABLES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "learning-factors": learning_factors,
    "learning-heads": learning_heads,
    "learning-look": learning_look,
    "learning-methods": learning_methods,
    "learning-parts": learning_parts,
    "learning-probes": learning_probes,
    "learning-reach": learning_reach,
    "demo-training": demo_training,
    "step": step,
    "step-parts": step_parts,
    "store": store,
    "tour": tour,
    "uses-attention": uses_attention,
    "learning-claims": learning_claims,
    "input": input_rates,
    "scaling": scaling,
    "uses-classify": uses_classify,
    "uses-cluster": uses_cluster,
    "uses-diversity": uses_diversity,
    "uses-segment": uses_segment,
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
