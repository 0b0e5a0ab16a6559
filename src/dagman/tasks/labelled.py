"""Crops with their label maps to learn a segmentation from: half of them on a labelled voxel, gently altered."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.utils.data import Dataset

from dagman.ct import crops
from dagman.ct.store import PreparedStore, Triple, padded_crop
from dagman.randomness import generator, torch_seed
from dagman.tasks.classes import Classes
from dagman.types import Preparation

TRIES = 100
"""Draws of a voxel of the background."""


class LabelledCrop(NamedTuple):
    """A crop, or a batch of them."""

    image: Float[Tensor, "*batch 1 x y z"]
    """In [0, 1] before it is altered."""
    numbers: Int[Tensor, "*batch 1 x y z"]
    """Class numbers, 0 the background."""


class LabelledCrops(Dataset[LabelledCrop]):
    """Crops by global sample number, without end; a sample depends on the seed and its number alone.

    Every case is visited once before any is visited again. Half of the crops are centred on a voxel of a class (each
    class of the case as likely as the others), half on one of the background; all of them where a mask is empty.

    Args:
        store: Volumes and masks.
        rows: Those to learn from.
        classes: What the labels mean.
        preparation: Crop and window.
        seed: Of all draws.
        mirrored: Mirror half of the crops along each axis.

    Reference:
        MONAI's `RandCropByPosNegLabel` at 1:1; flips, scale and shift as in the training of SwinUNETR.
    """

    def __init__(
        self,
        store: PreparedStore,
        rows: Sequence[int],
        classes: Classes,
        preparation: Preparation,
        seed: int,
        *,
        mirrored: bool = True,
    ) -> None:
        self.store, self.rows, self.classes = store, tuple(rows), classes
        self.preparation, self.seed, self.mirrored = preparation, seed, mirrored

    def __getitem__(self, sample: int) -> LabelledCrop:
        epoch, place = divmod(sample, len(self.rows))
        row = self.rows[generator(self.seed, "segment.order", epoch).permutation(len(self.rows))[place]]
        mask = self.store.mask(row)
        assert mask is not None
        numbers, crop = self.classes.numbers(mask), self.preparation.crop
        corner = corner_of(numbers, crop, generator(self.seed, "segment.crop", sample))
        image = crops.window(self.store.hu(row, corner, crop), self.preparation.window_hu)
        cut = padded_crop(numbers, corner, crop, 0)
        self._alterations.set_random_state(seed=torch_seed(self.seed, "segment.alter", sample) % 2**32)
        altered = self._alterations({"image": image[None], "numbers": cut[None]})
        return LabelledCrop(
            torch.as_tensor(np.ascontiguousarray(altered["image"])),
            torch.as_tensor(np.ascontiguousarray(altered["numbers"])).long(),
        )

    @cached_property
    def _alterations(self) -> Any:
        from monai import transforms

        both = ["image", "numbers"]
        return transforms.Compose(
            [
                *(transforms.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3 if self.mirrored else 0)),
                transforms.RandScaleIntensityd("image", factors=0.1, prob=1.0),
                transforms.RandShiftIntensityd("image", offsets=0.1, prob=1.0),
            ]
        )


def corner_of(numbers: Integer[np.ndarray, "x y z"], crop: Triple, draw: np.random.Generator) -> Triple:
    """First voxel of a crop around a drawn voxel, moved inside the volume where it would leave it.

    Args:
        numbers: Class numbers of the whole volume.
        crop: Voxels (x, y, z).
        draw: Source of the draws.
    """
    positive = draw.random() < 0.5
    present = np.unique(numbers)
    present = present[present > 0]
    if positive and len(present):
        inside = np.flatnonzero(numbers == draw.choice(present))
        centre = np.unravel_index(inside[draw.integers(len(inside))], numbers.shape)
    else:
        for _ in range(TRIES):
            centre = tuple(draw.integers(numbers.shape))
            if numbers[centre] == 0:
                break
    limits = [crops.first_corners(num, side) for num, side in zip(numbers.shape, crop, strict=True)]
    x, y, z = (
        int(np.clip(voxel - side // 2, low, high))
        for voxel, side, (low, high) in zip(centre, crop, limits, strict=True)
    )
    return x, y, z
