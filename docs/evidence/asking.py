"""Tables of what the encoders of learning curves were asked apart: attention, pairs, halves of the scans."""

import math
from typing import Any

import scipy.optimize
from common import NOT_YET, load, machine, measured, number, rows
from learning import BASELINES, QUESTIONS, STOPS, apart, asked, corpora, end_of, gain, learning, of_runs


@of_runs
def learning_attention() -> str:
    """Share of attention over share of volume on each structure, on the way: mean over the seeds, and their range."""
    body, every, shares = [], set(), load("learning-shares")["shares"]
    for corpus, results in corpora().items():
        at = [{probe["step"]: probe["attention"] for probe in result["probes"]} for result in results]
        steps = sorted(set.intersection(*(set(one) for one in at)))
        every |= set(steps)
        for structure in at[0][0]:
            found = {step: [one[step][structure] for one in at] for step in steps}
            if found[0][0]["volumes"] == 1:
                continue  # two crops of one volume tell nothing
            cells = [_spread([gain["gain"] for gain in found[step]]) if step in found else "" for step in STOPS]
            end, share = found[steps[-1]], shares[corpus][structure]
            ends = [" ".join(f"{gain[word]:.2f}" for gain in end) for word in ("low", "high", "elsewhere")]
            most = [_most(share, end_of(result)["attention_entropy"], _cells(result)) for result in results]
            bound = [f"{share:.2f}", " ".join(f"{value:.2f}" for value in most), f"{_most(share, 0.97, 64):.2f}"]
            body.append([corpus, structure, f"{end[0]['volumes']:.0f}", *cells, *ends, *bound])
    header = ["pretrained on", "attention / volume on", "volumes", *(f"step {step}" for step in STOPS)]
    header += ["95 % from, by seed", "to", "of the other crop", "share of the crop", "most, so even", "most, at .97"]
    return rows(header, body)


def _cells(result: dict[str, Any]) -> int:
    config = result["config"]
    side = 2 ** (config["encoder"]["attention"]["stage"] + 1)
    return int(math.prod(length // side for length in config["data"]["crop"]))


def _most(share: float, evenness: float, cells: int) -> float:
    """The most that attention of this evenness can gain on what fills such a share of the crop.

    Attention p over N cells that gathers m on a share a has KL(p || uniform) of at least that of (m, 1 - m) to
    (a, 1 - a), the data-processing inequality; the left side is (1 - evenness) ln N.
    """
    told = (1 - evenness) * math.log(cells)

    def least(gathered: float) -> float:
        rest = (1 - gathered) * math.log((1 - gathered) / (1 - share)) if gathered < 1 else 0.0
        return gathered * math.log(gathered / share) + rest

    if least(1.0) <= told:
        return 1 / share
    return float(scipy.optimize.brentq(lambda gathered: least(gathered) - told, share, 1.0)) / share


def _spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def learning_pairs() -> str:
    """What a student of AITD and GITD agrees with: its own place, its volume, or all alike."""
    result = measured("learning-pairs")
    if not result:
        return NOT_YET
    words = ("own pair", "another pair of the volume", "another volume", "own place first", "own volume first")
    body = [
        [f"{row['corpus']}, seed {row['seed']}", name.upper(), *(number(row[name][word], 2) for word in words)]
        for row in result["rows"]
        for name in ("aitd", "gitd")
    ]
    header = ["run", "loss", "own place", "another place of the volume", "another volume"]
    told = f"{result['batches']} batches of 16 new pairs, cut from 4 volumes of the run. {machine(result)}."
    return rows([*header, "own place first of 4 (chance .25)", "own volume first of 4 (.25)"], body) + f"\n\n{told}"


def learning_half() -> str:
    """The question of tumours in two halves of the scans, of runs that saw all and of runs that left one out."""
    result, body = measured("learning-control"), []
    if not result:
        return NOT_YET
    titles = {"tumour seen": "both kinds of runs saw", "tumour unseen": "one kind of runs left out"}
    for question, meaning in titles.items():
        for row in result["rows"]:
            if row["question"] == question:
                untrained = number(sum(row["untrained"]) / len(row["untrained"]), 3)
                bases = [number(row["baselines"][way]["value"], 3) for way in BASELINES]
                gains = [gain(row["together"][kind]) for kind in ("saw all", "left half out")]
                more = gain(row["saw all above left half out"])
                labels = str(row["labels"] or "all")
                body.append([meaning, str(row["patients"]), labels, untrained, *bases, *gains, more])
    header = ["half of the scans that", "patients", "labels", "untrained", *BASELINES.values()]
    header += ["saw all: above untrained", "left half out: above untrained", "saw all less left half out"]
    return rows(header, body) + f"\n\n1000 steps, three seeds of each kind. {machine(result)}."


SIDE = {
    "dagman-tiny": "the recipe",
    "side-pooled-3": "pooled features of stage 3 distilled, and not of stage 4",
    "side-no-aitd": "without AITD",
    "side-no-sa": "without AITD and semantic attention, hiding at random",
    "smit-swin-tiny": "SMIT: the same without noise, and pooled features of stage 3",
}
"""From the recipe to the one compared method whose features tell sides better, in steps."""


def learning_side() -> str:
    """Left or right of the body, from the recipe to SMIT: each kind of feature above untrained ones."""
    kinds, body = {"pooled": "pooled", "cells": "mean cell", "cls": "[CLS]", "all": "all"}, []
    for name, meaning in SIDE.items():
        for result in learning("real-*-seed0.json", name=name):
            found = [asked(result["probes"][-1]["rows"], "side", kind, 32) for kind in kinds]
            body.append(
                [meaning, str(result["steps"]), *(gain(row["above untrained"]) if row else "" for row in found)]
            )
    return rows(["one seed, 32 labels", "steps", *kinds.values()], body)


def learning_levels() -> str:
    """A nodule or none, told from each level by itself, over the whole crop and in its middle."""
    result, body = measured("learning-levels"), []
    if not result:
        return NOT_YET
    found: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        found.setdefault((row["features"], row["labels"]), []).append(row)
    trained_on = list(dict.fromkeys(row["corpus"] for row in result["rows"]))
    for features in dict.fromkeys(row["features"] for row in result["rows"]):
        whole = found.get((features.removesuffix(", middle"), 32), [])
        if features.endswith(", middle") and [row["auc"] for row in whole] == [
            row["auc"] for row in found[features, 32]
        ]:
            continue  # a level of two tokens a side is its middle
        cells = []
        for labels in (32, None):
            rows_of = found[features, labels]
            cells.append(number(rows_of[0]["untrained"], 3))
            cells += [
                apart([row["above untrained"] for row in rows_of if row["corpus"] == name]) for name in trained_on
            ]
        body.append([features, *cells])
    header = [
        f"{labels} labels: {what}"
        for labels in (32, "all")
        for what in ("untrained", *(f"{name}, above it" for name in trained_on))
    ]
    return (
        rows(["features", *header], body)
        + f"\n\nThree seeds; levels of two tokens a side have no other middle. {machine(result)}."
    )


@of_runs
def learning_answer() -> str:
    """Yes or no: whether three seeds together, trained on real CTs, tell more than what costs nothing; 32 labels."""
    found = {(row["corpus"], row["question"], row["labels"]): row for row in load("learning-together")["rows"]}
    body = []
    for question, meaning in QUESTIONS.items():
        row = found["real", question, 32]
        body.append(
            [meaning, number(row["untrained"]["first"], 2), *(verdict(row[name]) for name in ("untrained", *BASELINES))]
        )
    header = [
        "32 labels, pretrained on real CTs",
        "AUC",
        "more than untrained encoders?",
        *(f"than {name}?" for name in BASELINES),
    ]
    return rows(header, body)


def verdict(estimate: dict[str, Any]) -> str:
    """Yes or no where the interval lies apart from 0, and the difference."""
    said = "**yes**" if estimate["low"] > 0 else "**less**" if estimate["high"] < 0 else "not apart"
    return f"{said}: {estimate['value']:+.2f} ({estimate['low']:+.2f} to {estimate['high']:+.2f})"


@of_runs
def learning_size() -> str:
    """What runs on fewer and more scans gained, on scans that none of them saw; 32 labels and all."""
    found = {(row["corpus"], row["question"], row["labels"]): row for row in load("learning-together")["rows"]}
    sizes = {"half": "32 real CTs", "real": "52 real CTs", "phantoms": "160 phantoms"}
    body = []
    for corpus, meaning in sizes.items():
        if (corpus, "organ", 32) not in found:
            return NOT_YET
        asked_of = [
            found[corpus, question, labels] for question in ("organ", "malignancy", "nodule") for labels in (32, None)
        ]
        body.append([meaning, str(asked_of[0]["steps"]), *(gain(row["untrained"]) for row in asked_of)])
    header = [
        f"{question}, {labels} labels" for question in ("organ", "malignancy", "nodule") for labels in (32, "all")
    ]
    return rows(["pretrained on", "steps", *header], body)
