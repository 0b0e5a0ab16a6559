"""The families: what is varied, the paper's numbers, and each member as a whole point of the space of methods."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dagman import config as configs
from dagman import recipes
from dagman.config import unknown
from dagman.errors import DagmanError
from dagman.nets.swin import SwinConfig
from dagman.pretext.hiding import floor_count
from dagman.pretext.method import HidingConfig, LossWeights, check_fit
from dagman.train.settings import PretrainConfig

TERMS = ("amip", "ampd", "aitd", "gitd")
BASES = ("dagman-swin", "dagman-vit", "dagman-tiny", "dagman-vit-tiny")
"""Recipes that an ablation takes apart."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One member of a family: a whole point of the space of methods, taken from a DAGMaN recipe."""

    name: str
    losses: tuple[str, ...] = TERMS
    """Terms that keep the base's weight; the others weigh 0."""
    hidden: Literal["attended", "random"] = "attended"
    """What is hidden from the student."""
    noisy: bool = True
    """Whether the teacher loses the base's share of cells, or none."""
    stage: int | None = None
    """Of semantic attention; the base's where None."""
    recipe: str | None = None
    """Method and encoder in place of the base's, such as `smit-vit`; its size is the base's."""
    paper: Mapping[str, float] = field(default_factory=dict)
    """What the paper reports of it."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A family: what is varied, and where the paper does the same."""

    title: str
    source: str
    note: str
    """What else must be known to read it."""
    variants: tuple[Variant, ...]
    elsewhere: tuple[str, ...] = ()
    """What the paper measures and no comparison here does, and the verb that does."""
    pictures: tuple[Literal["clusters", "maps"], ...] = ()
    """What the paper shows beside, and this comparison where it is asked for."""


FINE_TUNED, PROBED = "AUC, malignancy, fine-tuned", "AUC, malignancy, linear probe"
DICE_TUNED, DICE_PROBED = "Dice, nodules, fine-tuned", "Dice, nodules, linear probe"


def _table_2(probed: float, fine_tuned: float, intra: Sequence[float], inter: Sequence[float]) -> dict[str, float]:
    distances = dict(
        zip(("intra-cluster", "intra-cluster SD", "inter-cluster", "inter-cluster SD"), (*intra, *inter), strict=True)
    )
    return {PROBED: probed, FINE_TUNED: fine_tuned} | {
        f"cluster distance, {name}": one for name, one in distances.items()
    }


AXES: dict[str, Axis] = {
    "losses": Axis(
        title="Losses",
        source="Table 1",
        note="A term that is not ticked weighs 0; the others weigh what the recipe says.",
        variants=(
            Variant(name="AMIP", losses=("amip",), paper={FINE_TUNED: 0.859}),
            Variant(name="AMIP + AMPD", losses=("amip", "ampd"), paper={FINE_TUNED: 0.869}),
            Variant(name="AMIP + AMPD + AITD", losses=("amip", "ampd", "aitd"), paper={FINE_TUNED: 0.878}),
            Variant(name="without AMPD", losses=("amip", "aitd", "gitd"), paper={FINE_TUNED: 0.865}),
            Variant(name="without AMIP", losses=("ampd", "aitd", "gitd"), paper={FINE_TUNED: 0.829}),
            Variant(name="all four", paper={FINE_TUNED: 0.895}),
        ),
    ),
    "hiding": Axis(
        pictures=("clusters",),
        title="Attended hiding and the noisy teacher",
        source="Figure 4",
        note="Random hiding takes all of its share, attended hiding leaves out its hints: see hidden cells.",
        variants=(
            Variant(name="random", hidden="random", noisy=False),
            Variant(name="attended", noisy=False),
            Variant(name="random, noisy teacher", hidden="random"),
            Variant(name="attended, noisy teacher"),
        ),
    ),
    "stage": Axis(
        pictures=("clusters", "maps"),
        title="Stage of semantic attention",
        source="Section 4.6, figures 6, 8 and 9",
        note="The cell size changes with the stage, to 4, 8, 16 and 32 voxels a side, and with it how many cells are "
        "hidden and shown as hints. The paper prints 'second highest AUC of 0.7 for stage #4 with FT' among Dice "
        "scores: it stands in a column of its own.",
        elsewhere=("Dice of nodules (`dagman segment train`)",),
        variants=(
            Variant(name="stage 1", stage=1),
            Variant(name="stage 2", stage=2),
            Variant(name="stage 3", stage=3, paper={DICE_TUNED: 0.9, DICE_PROBED: 0.7}),
            Variant(name="stage 4", stage=4, paper={"Dice, printed as AUC, fine-tuned": 0.7}),
        ),
    ),
    "encoder": Axis(
        pictures=("clusters",),
        title="Encoder and hiding",
        source="Table 2",
        note="SMIT hides all of its random share and DAGMaN its attended share less hints: see hidden cells. SMIT has "
        "a clean teacher and no AITD; on the Swin also no semantic attention, no [CLS], and GITD on stage 3. Swin and "
        "ViT differ in size and in the features that are probed.",
        variants=(
            Variant(name="SMIT, ViT", recipe="smit-vit", paper=_table_2(0.643, 0.816, (1.30, 0.51), (6.44, 5.27))),
            Variant(name="DAGMaN, ViT", recipe="dagman-vit", paper=_table_2(0.662, 0.847, (1.15, 0.41), (6.59, 4.60))),
            Variant(name="SMIT, Swin", recipe="smit-swin", paper=_table_2(0.629, 0.859, (1.53, 0.45), (3.73, 2.74))),
            Variant(
                name="DAGMaN, Swin", recipe="dagman-swin", paper=_table_2(0.642, 0.895, (1.28, 0.57), (5.93, 3.30))
            ),
        ),
    ),
    "methods": Axis(
        title="Methods",
        source="Section 4.2",
        note="Each is its recipe, at the base's size, length and settings. They hide different shares, at random, in "
        "blocks or by attention: see hidden cells. Losses that a method does not have have no column; SMIT's Swin has "
        "no [CLS]. Swin and ViT differ in size and in the features that are probed.",
        pictures=("clusters", "maps"),
        variants=tuple(Variant(name=name, recipe=name) for name in recipes.METHODS),
    ),
}
"""The paper's numbers are of its Swin, but for the ViTs of Table 2; of the methods it gives figures only."""


def members_of(axis: str, base: PretrainConfig, settings: Mapping[str, str] | None = None) -> dict[str, PretrainConfig]:
    """The members of a family by name, each the base with what the axis replaces.

    Args:
        axis: A name of `AXES`.
        base: The DAGMaN recipe that is taken apart, with its length and settings.
        settings: Those settings, for members that start from a recipe of their own.

    Raises:
        DagmanError: `E-AXIS` for an unknown axis; `E-RECIPE` for a base that is not DAGMaN, or settings that make a
            member something else than its name says; `E-CONFIG` or `E-CROP` where a value does not fit.
    """
    if axis not in AXES:
        raise unknown("AXIS", axis, list(AXES))
    if base.recipe not in BASES:
        problem = "is not DAGMaN, which is what an ablation takes apart"
        raise DagmanError("RECIPE", base.recipe, problem, f"give {', '.join(BASES[:-1])} or {BASES[-1]}")
    _check_point(base, recipes.get(base.recipe))
    if axis == "stage" and not isinstance(base.encoder, SwinConfig):
        problem = "is a ViT, which has no stages; an ablation of stages takes DAGMaN's Swin apart"
        raise DagmanError("RECIPE", base.recipe, problem, "give dagman-swin or dagman-tiny, or another axis")
    found = {variant.name: _member(variant, base, settings or {}) for variant in AXES[axis].variants}
    for member in found.values():
        check_fit(member.encoder, member.method)
    return found


def _member(variant: Variant, base: PretrainConfig, settings: Mapping[str, str]) -> PretrainConfig:
    if variant.recipe:
        own = recipes.get(variant.recipe + "-tiny" * base.recipe.endswith("-tiny"))
        if own.recipe == base.recipe:
            return base
        long = recipes.with_length(own, base.optimisation.steps, base.optimisation.epochs)
        try:
            given = configs.override(long, dict(settings))
        except DagmanError as error:
            problem = f"{error.problem} in {own.recipe}, a member of this axis"
            raise DagmanError(
                error.code, error.subject, problem, "leave it out: settings are those of all members"
            ) from None
        _check_point(given, own)
        return given
    method, encoder = base.method, base.encoder
    if variant.stage and isinstance(encoder, SwinConfig) and encoder.attention:
        encoder = replace(encoder, attention=replace(encoder.attention, stage=variant.stage))
    weights = {term: getattr(method.losses, term) if term in variant.losses else 0.0 for term in TERMS}
    method = replace(
        method,
        losses=LossWeights(**weights),
        hidden=replace(method.hidden, kind=variant.hidden),
        dropped_ratio=method.dropped_ratio if variant.noisy else 0.0,
    )
    return replace(base, encoder=encoder, method=method)


def _check_point(given: PretrainConfig, own: PretrainConfig) -> None:
    """Refuse settings that make a recipe another method or encoder than its name says."""
    lines = configs.difference(_point(own), _point(given))
    if lines:
        problem = f"is another method or encoder with these settings ({'; '.join(lines)})"
        raise DagmanError("RECIPE", own.recipe, problem, "leave them out: an ablation takes DAGMaN apart by itself")


def _point(config: PretrainConfig) -> dict[str, Any]:
    """What makes a method and its encoder what its name says, sizes and shares aside."""
    method, hidden = config.method, config.method.hidden
    return {
        "encoder": config.encoder.kind,
        "semantic attention or [CLS]": config.encoder.has_cls,
        "hidden": hidden.kind,
        "hints": hidden.hints != "none" and hidden.hint_ratio > 0,
        "hiding": hidden.ratio > 0 and hidden.probability > 0,
        "noisy teacher": method.dropped_ratio > 0,
        **{term: getattr(method.losses, term) > 0 for term in TERMS},
        "pooled stage": method.pooled_stage,
    }


def facts(member: PretrainConfig, spacing_mm: float) -> dict[str, object]:
    """What a member is, for its row: recipe, losses that count, cells of a view, and how many are hidden and shown.

    Args:
        member: Of a family.
        spacing_mm: Side of a voxel.

    Returns:
        Name of a column to its value: `cell_mm` is a cell's side in mm; `hidden cells` are those of a view that is
        hidden, `hints` those of the highest attention that it shows.
    """
    hidden, cells = member.method.hidden, math.prod(member.encoder.grid(member.data.crop))
    return {
        "recipe": member.recipe,
        **{term.upper(): "x" if getattr(member.method.losses, term) else "" for term in TERMS},
        "cells": cells,
        "cell_mm": member.encoder.cell_side * spacing_mm,
        "hidden cells": hidden.most(cells, attended=True),
        "hints": _hints(hidden, cells),
    }


def _hints(hidden: HidingConfig, cells: int) -> int:
    if hidden.kind != "attended" or hidden.hints == "none":
        return 0
    return floor_count(hidden.hint_ratio * (hidden.ratio if hidden.hints == "attmask" else 1), cells)


def papers(axis: str, base: PretrainConfig) -> dict[str, Mapping[str, float]]:
    """Variant to what the paper reports of it; nothing where the base is a ViT and the paper's is a Swin."""
    same = axis == "encoder" or isinstance(base.encoder, SwinConfig)
    return {variant.name: variant.paper if same else {} for variant in AXES[axis].variants}
