"""A family of recipes trained on one prepared store, and one comparison of them beside the paper's.

Every run is a run folder like any other; what is finished is not done again, and a stop loses nothing.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dagman import config as configs
from dagman import files, recipes
from dagman.config import unknown
from dagman.ct import crops
from dagman.ct.store import PreparedStore
from dagman.figures import ablation as figure
from dagman.nets.weights import load_encoder
from dagman.pretext.method import check_fit
from dagman.run import Run
from dagman.tasks import diversity, watching
from dagman.tasks.embed import untrained
from dagman.tasks.table import write_rows
from dagman.train.job import Listener, split_rows
from dagman.train.pretrain import pretrain
from dagman.train.settings import PretrainConfig
from dagman.types import Preparation

Say = Callable[[str], None]
LAST_STEPS = 50
LOOKED_AT = 8
"""Crops on which the diversity of the attention heads is taken."""
METRICS = (
    "hidden_ratio",
    "image_error_ratio",
    "aitd_loss_ratio",
    "ampd_loss_ratio",
    "gitd_loss_ratio",
    "attention_entropy",
    "pooled_spread",
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One member of a family."""

    name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    """What replaces the recipe's values."""
    recipe: str | None = None
    """Method and encoder in place of the family's own, such as `smit-vit`; its size is the family's."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """What the paper reports of it."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A family: what is varied, and where the paper does the same."""

    title: str
    source: str
    note: str = ""
    """What else must be known to read it."""
    variants: tuple[Variant, ...]


def _without(*terms: str) -> dict[str, str]:
    return {f"method.losses.{term}": "0" for term in terms}


FINE_TUNED = "AUC, malignancy, fine-tuned"
RANDOM = {"method.hidden.kind": "random"}
CLEAN = {"method.dropped_ratio": "0"}
AXES: dict[str, Axis] = {
    "losses": Axis(
        title="Losses",
        source="Table 1",
        variants=(
            Variant(name="AMIP", settings=_without("ampd", "aitd", "gitd"), paper={FINE_TUNED: 0.859}),
            Variant(name="AMIP + AMPD", settings=_without("aitd", "gitd"), paper={FINE_TUNED: 0.869}),
            Variant(name="AMIP + AMPD + AITD", settings=_without("gitd"), paper={FINE_TUNED: 0.878}),
            Variant(name="without AMPD", settings=_without("ampd"), paper={FINE_TUNED: 0.865}),
            Variant(name="without AMIP", settings=_without("amip"), paper={FINE_TUNED: 0.829}),
            Variant(name="all four", paper={FINE_TUNED: 0.895}),
        ),
    ),
    "hiding": Axis(
        title="Attended hiding and the noisy teacher",
        source="Figure 4",
        note=" Random hiding takes all of its share, attended hiding leaves out its hints: see hidden_ratio.",
        variants=(
            Variant(name="random", settings=RANDOM | CLEAN),
            Variant(name="attended", settings=CLEAN),
            Variant(name="random, noisy teacher", settings=RANDOM),
            Variant(name="attended, noisy teacher"),
        ),
    ),
    "stage": Axis(
        title="Stage of semantic attention",
        source="Figures 6, 8 and 9",
        variants=tuple(
            Variant(name=f"stage {stage}", settings={"encoder.attention.stage": str(stage)}) for stage in (1, 2, 3, 4)
        ),
    ),
    "encoder": Axis(
        title="Encoder and hiding",
        source="Table 2",
        variants=(
            Variant(name="SMIT, ViT", recipe="smit-vit", paper={"AUC, linear probe": 0.643, FINE_TUNED: 0.816}),
            Variant(name="DAGMaN, ViT", recipe="dagman-vit", paper={"AUC, linear probe": 0.662, FINE_TUNED: 0.847}),
            Variant(name="SMIT, Swin", recipe="smit-swin", paper={"AUC, linear probe": 0.629, FINE_TUNED: 0.859}),
            Variant(name="DAGMaN, Swin", recipe="dagman-swin", paper={"AUC, linear probe": 0.642, FINE_TUNED: 0.895}),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What `ablate` wrote and whether all runs are finished."""

    table: Path
    picture: Path
    complete: bool


def family(axis: str, base: PretrainConfig, settings: Mapping[str, str] | None = None) -> dict[str, PretrainConfig]:
    """The members of a family by name, each the base with what the axis replaces.

    Args:
        axis: A name of `AXES`.
        base: The recipe that is varied, with its length and settings.
        settings: Those settings, for members that start from a recipe of their own.

    Raises:
        DagmanError: `E-AXIS` for an unknown axis; `E-CONFIG` or `E-RECIPE` where a value does not fit the base.
    """
    if axis not in AXES:
        raise unknown("AXIS", axis, list(AXES))
    small = base.recipe.endswith("-tiny")
    found = {}
    for variant in AXES[axis].variants:
        start = base
        if variant.recipe:
            start = recipes.get(variant.recipe + "-tiny" * small)
            start = recipes.with_length(start, base.optimisation.steps, base.optimisation.epochs)
            start = configs.override(start, dict(settings or {}))
        found[variant.name] = configs.override(start, dict(variant.settings))
    return found


def ablate(
    axis: str,
    base: PretrainConfig,
    store: PreparedStore,
    folder: Path,
    *,
    seeds: Sequence[int],
    device: Literal["cpu", "cuda"] | None = None,
    labelled: PreparedStore | None = None,
    settings: Mapping[str, str] | None = None,
    listener: Callable[[str], Listener],
    say: Say,
) -> Outputs:
    """Train what is missing of a family, score every run, and write one comparison.

    Args:
        axis: A name of `AXES`.
        base: The recipe that is varied, with its length.
        store: Volumes to train on.
        folder: Of the comparison; the runs are in `folder/runs`.
        seeds: Each member is trained once for each.
        device: Where to train.
        labelled: Cases with labels of two classes for a linear probe; no probe without.
        settings: What the base was given beside its recipe, as for `family`.
        listener: Makes the listener of a run from its name.
        say: Hears what is done.

    Raises:
        DagmanError: As `pretrain`; `E-AXIS`; before anything is trained, what a member's sizes are refused for.

    Reference:
        Tables 1 and 2, figures 4, 6, 8 and 9.
    """
    members, rows, complete = family(axis, base, settings), [], True
    for member in members.values():
        member.encoder.grid(member.data.crop)
        check_fit(member.encoder, member.method)
    if labelled is not None:
        spacing_mm = float(store.settings["spacing_mm"])
        watching.check(labelled, Preparation(spacing_mm=spacing_mm, crop=base.data.crop))
    planned = [(name, seed) for seed in seeds for name in members]
    for number, (name, seed) in enumerate(planned, 1):
        config = configs.override(members[name], {"optimisation.seed": str(seed)})
        run = folder / "runs" / f"{axis}-{_slug(name)}-seed{seed}"
        say(f"[{number}/{len(planned)}] {name}, seed {seed}: {run}")
        result = pretrain(config, store, run, device=device, listeners=[listener(name)])
        if result.status == "stopped":
            complete = False
            break
        rows.append({"variant": name, "seed": seed, **scores(run, store, labelled, device or _default_device())})
    table, picture = folder / f"{axis}.csv", folder / f"{axis}.png"
    if rows:
        write_table(axis, base, store, rows, table)
        files.write_bytes(picture, figure.png(rows, _papers(axis), title=heading(axis, base, store)))
    return Outputs(table=table, picture=picture, complete=complete)


def scores(run: Path, store: PreparedStore, labelled: PreparedStore | None, device: str) -> dict[str, Any]:
    """How a finished run ended: kept in its folder, so that it is not asked twice."""
    kept = run / "scores.json"
    asked = None if labelled is None else watching.identity(labelled)
    if kept.exists() and (found := json.loads(kept.read_text()))["labelled"] == asked:
        return dict(found["scores"])
    last = Run(run).metrics()[-LAST_STEPS:]
    values = {name: [row[name] for row in last if row.get(name) is not None] for name in METRICS}
    row: dict[str, Any] = {name: float(np.mean(some)) for name, some in values.items() if some}
    encoder = load_encoder(run).to(device)
    images = torch.from_numpy(_looked_at(store, encoder.preparation))[:, None].to(device)
    row["heads"] = {
        head.place: {
            "distance_mm": head.distance_mm.tolist(),
            "distance_entropy": head.distance_entropy,
            "row_entropy": head.row_entropy,
        }
        for head in diversity.heads(encoder, images)
    }
    if labelled is not None:
        for name, one in {"pretrained": encoder, "untrained": untrained(encoder)}.items():
            row[f"probe_{name}"] = vars(watching.probe(one, labelled, device=device))
    files.write_json(kept, {"labelled": asked, "scores": row})
    return row


def _looked_at(store: PreparedStore, preparation: Preparation) -> np.ndarray:
    """The middles of the first volumes, as the network sees them."""
    rows = split_rows(store)[0][:LOOKED_AT]
    hu = np.stack([crops.centred(store, row, preparation.crop, "centre") for row in rows])
    return crops.window(hu, preparation.window_hu)


def heading(axis: str, base: PretrainConfig, store: PreparedStore) -> str:
    """What was run, and how far that is from what the paper ran."""
    length = base.optimisation
    steps = f"{length.steps} steps" if length.steps else f"{length.epochs} epochs"
    return (
        f"{AXES[axis].title} ({AXES[axis].source}). Here: {base.recipe}, {len(split_rows(store)[0])} volumes, {steps}, "
        f"crops of {base.data.crop[0]} voxels. Paper: 10,412 CTs, 800 epochs, crops of 128 voxels, LIDC nodules; its "
        f"figures say which way to expect, not how much.{AXES[axis].note}"
    )


def write_table(
    axis: str, base: PretrainConfig, store: PreparedStore, rows: Sequence[Mapping[str, Any]], path: Path
) -> None:
    """One line a run, the paper's figures in columns of their own; the first line says what differs from the paper."""
    papers = _papers(axis)
    reported = sorted({name for paper in papers.values() for name in paper})
    places = sorted({place for row in rows for place in row["heads"]})
    probes = [name for name in ("probe_pretrained", "probe_untrained") if any(name in row for row in rows)]
    header = [
        *("variant", "seed", *METRICS),
        *(f"{place}: {what}" for place in places for what in ("distance entropy", "row entropy")),
        *(f"{name}{part}" for name in probes for part in (" AUC", " low", " high")),
        *(f"paper: {name}" for name in reported),
    ]
    body = []
    for row in rows:
        heads = [
            row["heads"].get(place, {}).get(key) for place in places for key in ("distance_entropy", "row_entropy")
        ]
        found = [row[name][part] for name in probes for part in ("value", "low", "high")]
        paper = [papers[row["variant"]].get(name) for name in reported]
        values = [row["variant"], row["seed"], *(row.get(name) for name in METRICS), *heads, *found, *paper]
        body.append(["" if value is None else value for value in values])
    write_rows(path, header, body, note=heading(axis, base, store))


def _papers(axis: str) -> dict[str, Mapping[str, float]]:
    return {variant.name: variant.paper for variant in AXES[axis].variants}


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())
