"""The encoder that a training with labels starts from."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dagman.cli.watching import require

if TYPE_CHECKING:
    from dagman.ct.store import PreparedStore
    from dagman.nets.encoder import Encoder


DEFAULT_RECIPE = "dagman-tiny"


def check_start(*, recipe: str | None, random: bool, layer_decay: float | None, whole: bool) -> None:
    """Refuse options that would do nothing.

    Args:
        recipe: As given.
        random: Whether the network starts from random weights, of a recipe's sizes.
        layer_decay: As given.
        whole: Whether a whole encoder learns.

    Raises:
        DagmanError: `E-USAGE`.
    """
    require(recipe is None or random, "--recipe", "is of `--weights none`", "leave it out, or start from `none`")
    require(layer_decay is None or whole, "--layer-decay", "is of an encoder that learns as a whole", "leave it out")


def starting_encoder(
    weights: Path | None,
    recipe: str | None,
    seed: int,
    store: "PreparedStore",
    crop: tuple[int, int, int] | None = None,
) -> "Encoder":
    """A pretrained encoder, or one with new random weights, to be compared with it.

    Args:
        weights: A run folder or .safetensors file; None for random weights.
        recipe: Whose sizes, window and crop a random one has (`dagman-tiny` where None); or a run folder, to be like
            its encoder in all but the weights.
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

    recipe = recipe or DEFAULT_RECIPE
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
