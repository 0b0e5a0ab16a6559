"""What every recipe is made of, at the paper's size and at the tiny one: `docs/paper-to-code.md`."""

import torch
from common import rows

from dagman import recipes
from dagman.nets.encoder import build
from dagman.pretext.codistill import CoDistillation

TERMS = ("amip", "ampd", "aitd", "gitd")


def contract() -> str:
    """Shapes and parameters of every recipe, built on the meta device."""
    names = sorted(recipes.RECIPES.keys(), key=lambda name: (name.endswith("tiny"), name))
    return rows(
        ["recipe", "crop", "cells", "tokens", "final", "[CLS], attention", "encoder", "student", "teacher", "terms"],
        [_row(name) for name in names],
    )


def _row(name: str) -> list[str]:
    recipe = recipes.get(name)
    with torch.device("meta"):
        module = CoDistillation(recipe.encoder, recipe.method, mean_intensity=0.4, crop=recipe.data.crop)
        features = build(recipe.encoder).eval()(torch.empty(1, 1, *recipe.data.crop))
    return [
        f"`{name}`",
        " x ".join(map(str, recipe.data.crop)),
        " x ".join(map(str, recipe.encoder.grid(recipe.data.crop))),
        " x ".join(map(str, features.tokens.shape[1:])),
        str(features.pooled.shape[1]),
        "none" if features.cls is None else "yes",
        _millions(module.student.encoder),
        _millions(module.student),
        _millions(module.teacher),
        " ".join(term.upper() for term in TERMS if getattr(recipe.method.losses, term)),
    ]


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M"
