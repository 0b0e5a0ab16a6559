"""Prepared volumes as training samples: the same batches for any number of workers, and after a resume."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dagman.ct.crops import two_views, window
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.randomness import generator
from dagman.types import Views


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a network is shown of a prepared store."""

    crop: tuple[int, int, int] = (128, 128, 128)
    """Voxels (x, y, z), multiples of what the encoder asks for (Swin: 32, ViT: its patch); the paper's 128 at 2 mm."""
    window_hu: tuple[float, float] = (-175.0, 250.0)
    """Mapped to [0, 1] and clipped; the lab's soft-tissue window. Lung work wants [-1000, 400]."""
    overlap_ratio: float = 0.5
    """Length that two views share at least, along every axis."""
    body_ratio: float = 0.25
    """Share of a view's voxels at or above -950 HU (lung and denser), at least; drawn again up to 20 times."""
    pairs_per_volume: int = 1
    """Pairs cut from a volume one after the other. Above 1 a batch holds several places of one patient, and what tells
    patients apart (noise, contrast) no longer tells views apart."""
    flip_ratio: float = 0.0
    """Chance that a view is mirrored, for each axis and view on its own."""
    jitter_ratio: float = 0.0
    """Windowed intensities are scaled by up to 1 +- this and shifted by up to +- this, for each view on its own."""

    def __post_init__(self) -> None:
        low, high = self.window_hu
        for field, wrong, advice in (
            ("crop", min(self.crop) < 1, "give the three sides in voxels"),
            ("window_hu", not low < high, "give the lower edge first"),
            ("overlap_ratio", not 0 <= self.overlap_ratio <= 1, "give a number from 0 to 1"),
            ("body_ratio", not 0 <= self.body_ratio <= 1, "give a number from 0 to 1"),
            ("pairs_per_volume", self.pairs_per_volume < 1, "give at least 1"),
            ("flip_ratio", not 0 <= self.flip_ratio <= 1, "give a number from 0 to 1"),
            ("jitter_ratio", not 0 <= self.jitter_ratio < 1, "give a number from 0 to below 1"),
        ):
            if wrong:
                raise DagmanError("CONFIG", f"data.{field}", f"cannot be {getattr(self, field)}", advice)


Sample = tuple[Float[Tensor, "1 x y z"], Float[Tensor, "1 x y z"], int, float]


class ViewsDataset(Dataset[Sample]):
    """Pairs of views by global sample number, which counts on from epoch to epoch.

    With p pairs a volume, sample `i` belongs to visit `i // p`, visit `v` is position `v % len` of epoch `v // len`'s
    own order of the volumes, and its crops are drawn from `(seed, "crops", i)`: nothing depends on who asks, or when.

    Args:
        store: The prepared volumes.
        config: What is cut from them.
        seed: The run's seed.
        rows: Rows of the store to use, such as the training cases; all without.

    Raises:
        DagmanError: `E-NODATA` without a single volume.
    """

    def __init__(self, store: PreparedStore, config: DataConfig, seed: int, rows: Sequence[int] | None = None) -> None:
        self.store = store
        self.config = config
        self.seed = seed
        self.rows = np.arange(len(store)) if rows is None else np.asarray(rows, dtype=np.int64)
        if not len(self.rows):
            raise DagmanError("NODATA", store.folder, "holds no volume to train on", "prepare at least one scan")
        self._order = (-1, self.rows)

    def __len__(self) -> int:
        """Samples in one epoch: one pair a volume."""
        return len(self.rows)

    def row(self, sample: int) -> int:
        """The row of the store that a sample is cut from."""
        epoch, position = divmod(sample // self.config.pairs_per_volume, len(self.rows))
        if self._order[0] != epoch:
            self._order = (epoch, generator(self.seed, "order", epoch).permutation(self.rows))
        return int(self._order[1][position])

    def __getitem__(self, sample: int) -> Sample:
        config, row = self.config, self.row(sample)
        draws = generator(self.seed, "crops", sample)
        pair = two_views(
            self.store,
            row,
            config.crop,
            overlap_ratio=config.overlap_ratio,
            body_ratio=config.body_ratio,
            generator=draws,
        )
        augmentation = generator(self.seed, "augmentation", sample)
        u, v = (self._shown(view, augmentation) for view in (pair.u, pair.v))
        return u, v, row, self._padding(row, pair.corners)

    def _shown(self, hu: np.ndarray, draws: np.random.Generator) -> Tensor:
        """A crop as the network sees it, (1, x, y, z)."""
        image = window(hu, self.config.window_hu)
        if self.config.flip_ratio:
            mirrored = np.flatnonzero(draws.random(3) < self.config.flip_ratio)
            image = np.ascontiguousarray(np.flip(image, tuple(mirrored.tolist())))
        if self.config.jitter_ratio:
            scale, shift = draws.uniform(-self.config.jitter_ratio, self.config.jitter_ratio, 2).astype(np.float32)
            image = np.clip(image * (1 + scale) + shift, 0, 1)
        return torch.from_numpy(image)[None]

    def _padding(self, row: int, corners: tuple[tuple[int, int, int], tuple[int, int, int]]) -> float:
        """Share of both views that lies outside the volume."""
        crop, shape = np.array(self.config.crop), np.array(self.store.shape(row))
        inside = np.clip(np.minimum(np.array(corners) + crop, shape) - np.maximum(corners, 0), 0, None)
        return float(1 - (inside / crop).prod(axis=1).mean())


def collate(samples: Sequence[Sample]) -> Views:
    """Samples as one batch."""
    u, v, rows, padding = zip(*samples, strict=True)
    return Views(
        u=torch.stack(u), v=torch.stack(v), rows=torch.tensor(rows), padding=torch.tensor(padding, dtype=torch.float32)
    )


class SampleOrder(Sampler[int]):
    """Global sample numbers from `start` to before `end`; each of `world` ranks takes every `world`-th.

    A resumed run is the rest of the interrupted one: only `start` differs.

    Args:
        start: First global sample number.
        end: The number after the last.
        rank: This process.
        world: Number of processes.
    """

    def __init__(self, start: int, end: int, rank: int = 0, world: int = 1) -> None:
        self.samples = range(start + rank, end, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)


def mean_intensity(
    store: PreparedStore, config: DataConfig, seed: int, num_crops: int = 64, rows: Sequence[int] | None = None
) -> float:
    """Mean windowed intensity of the first training crops, padding included.

    Args:
        store: The prepared volumes.
        config: What is cut from them.
        seed: The run's seed.
        num_crops: Crops looked at, in pairs.
        rows: As for `ViewsDataset`.
    """
    dataset = ViewsDataset(store, config, seed, rows)
    return float(
        np.mean([view.mean().item() for sample in range(max(1, num_crops // 2)) for view in dataset[sample][:2]])
    )
