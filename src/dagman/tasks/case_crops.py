"""Crops of labelled cases to learn a classification from, gently altered."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from dagman.ct import crops
from dagman.ct.store import PreparedStore
from dagman.randomness import generator
from dagman.types import Preparation

SHIFT_RATIO = 0.125
"""Of a crop's side by which it may miss its place in training."""
JITTER_RATIO = 0.1


class CaseCrop(NamedTuple):
    """A crop of a case and its class, or a batch of them."""

    image: Float[Tensor, "*batch 1 x y z"]
    """In [0, 1]."""
    number: Int[Tensor, "*batch"]


class CaseCrops(Dataset[CaseCrop]):
    """A crop of a case and its class by global sample number, without end; a sample depends on the seed and its number.

    Every case is visited once before any is visited again. The crop is centred on the centroid of the case's mask where
    there is one, up to an eighth of its side off, and lies anywhere in the volume where there is none, in the middle of
    one no longer than the crop; it may be mirrored along each axis, and its intensities are scaled and shifted by up to
    a tenth.

    Args:
        store: The volumes.
        rows: Those to learn from.
        numbers: Their classes.
        preparation: Crop and window.
        seed: Of all draws.
        mirrored: Mirror crops; not where a class depends on the side of the body.
    """

    def __init__(
        self,
        store: PreparedStore,
        rows: Sequence[int],
        numbers: Sequence[int],
        preparation: Preparation,
        seed: int,
        *,
        mirrored: bool = True,
    ) -> None:
        self.mirrored = mirrored
        self.store, self.rows, self.numbers = store, tuple(rows), tuple(numbers)
        self.preparation, self.seed = preparation, seed

    def case(self, sample: int) -> int:
        """Which of the rows a sample shows, by its place among them."""
        epoch, place = divmod(sample, len(self.rows))
        return int(generator(self.seed, "classify.order", epoch).permutation(len(self.rows))[place])

    def __getitem__(self, sample: int) -> CaseCrop:
        chosen = self.case(sample)
        row, crop = self.rows[chosen], self.preparation.crop
        draws = generator(self.seed, "classify.crop", sample)
        corner = crops.near(self.store, row, crop, SHIFT_RATIO, draws)
        image = crops.window(self.store.hu(row, corner, crop), self.preparation.window_hu)
        if self.mirrored:
            image = np.flip(image, tuple(np.flatnonzero(draws.random(3) < 0.5).tolist()))
        scale, shift = draws.uniform(-JITTER_RATIO, JITTER_RATIO, 2).astype(np.float32)
        image = np.clip(image * (1 + scale) + shift, 0, 1)
        return CaseCrop(torch.from_numpy(np.ascontiguousarray(image))[None], torch.tensor(self.numbers[chosen]))
