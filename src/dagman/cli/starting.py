"""The encoder that a training with labels starts from."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dagman.nets.encoder import Encoder


def starting_encoder(
    weights: Path | None, recipe: str, seed: int, crop: tuple[int, int, int] | None = None
) -> "Encoder":
    """A pretrained encoder, or one of a recipe's sizes with new random weights.

    Args:
        weights: A run folder or .safetensors file; None for random weights.
        recipe: Of the random ones.
        seed: Of the random ones.
        crop: Voxels (x, y, z) that the encoder shall be shown; its own where None.

    Raises:
        DagmanError: `E-WEIGHTS`; `E-CROP` for a crop it cannot divide; `E-CONFIG` for an unknown recipe.
    """
    from dagman import recipes
    from dagman.nets.encoder import new
    from dagman.nets.weights import load_encoder
    from dagman.types import Preparation

    if weights:
        encoder = load_encoder(weights)
    else:
        chosen = recipes.get(recipe)
        encoder = new(chosen.encoder, Preparation(window_hu=chosen.data.window_hu, crop=chosen.data.crop), seed)
    if crop:
        encoder.config.grid(crop)
        encoder.preparation = replace(encoder.preparation, crop=crop)
    return encoder
