"""The encoder that a training with labels starts from."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dagman.ct.store import PreparedStore
    from dagman.nets.encoder import Encoder


def starting_encoder(
    weights: Path | None,
    recipe: str,
    seed: int,
    store: "PreparedStore",
    crop: tuple[int, int, int] | None = None,
) -> "Encoder":
    """A pretrained encoder, or one with new random weights, to be compared with it.

    Args:
        weights: A run folder or .safetensors file; None for random weights.
        recipe: Whose sizes, window and crop a random one has; or a run folder, to be like its encoder in all but the
            weights.
        seed: Of the random ones.
        store: Whose voxels one of a recipe is shown.
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
    elif Path(recipe).exists():
        like = load_encoder(Path(recipe))
        encoder = new(like.config, like.preparation, seed)
    else:
        chosen = recipes.get(recipe)
        preparation = Preparation(
            spacing_mm=float(store.settings["spacing_mm"]),
            resampling=store.settings["resampling"],
            window_hu=chosen.data.window_hu,
            crop=chosen.data.crop,
        )
        encoder = new(chosen.encoder, preparation, seed)
    if crop:
        encoder.config.grid(crop)
        encoder.preparation = replace(encoder.preparation, crop=crop)
    return encoder
