"""Prepared volumes as training samples: the same batches for any number of workers, and after a resume."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate, get_worker_info

from dagman.ct.crops import two_views
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
    """Mapped to [0, 1] and clipped; the lab's soft-tissue window. Lung work wants [-1000, 400].
    A store of grey cubes (MedMNIST) is shown in its own, whatever stands here."""
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


class Pairs(NamedTuple):
    """Two overlapping crops of each volume of a batch as they are stored, and how they shall be shown.

    This is what reader processes hand over and what goes to the device: half the bytes of `Views`.
    """

    u: Int16[Tensor, "batch x y z"]
    v: Int16[Tensor, "batch x y z"]
    mirrored: Bool[Tensor, "batch 2 3"]
    """Axes along which u and v are mirrored."""
    jitter: Float[Tensor, "batch 2 2"]
    """Scale and shift of u and v, added to 1 and 0."""
    rows: Int[Tensor, " batch"]
    padding: Float[Tensor, " batch"]


class ViewsDataset(Dataset[Pairs]):
    """Batches of one pair of views by global sample number, which counts on from epoch to epoch.

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

    def __getitem__(self, sample: int) -> Pairs:
        config, row = self.config, self.row(sample)
        pair = two_views(
            self.store,
            row,
            config.crop,
            overlap_ratio=config.overlap_ratio,
            body_ratio=config.body_ratio,
            generator=generator(self.seed, "crops", sample),
        )
        mirrored, jitter = self._augmentation(sample)
        return Pairs(
            u=torch.from_numpy(pair.u)[None],
            v=torch.from_numpy(pair.v)[None],
            mirrored=torch.from_numpy(mirrored)[None],
            jitter=torch.from_numpy(jitter)[None],
            rows=torch.tensor([row]),
            padding=torch.tensor([self._padding(row, pair.corners)], dtype=torch.float32),
        )

    def _augmentation(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """Which axes of each view are mirrored, (2, 3), and scale and shift of its intensities, (2, 2)."""
        config = self.config
        mirrored, jitter = np.zeros((2, 3), dtype=bool), np.zeros((2, 2), dtype=np.float32)
        if not (config.flip_ratio or config.jitter_ratio):
            return mirrored, jitter
        draws = generator(self.seed, "augmentation", sample)
        for view in range(2):
            if config.flip_ratio:
                mirrored[view] = draws.random(3) < config.flip_ratio
            if config.jitter_ratio:
                jitter[view] = draws.uniform(-config.jitter_ratio, config.jitter_ratio, 2)
        return mirrored, jitter

    def _padding(self, row: int, corners: tuple[tuple[int, int, int], tuple[int, int, int]]) -> float:
        """Share of both views that lies outside the volume."""
        shape, inside = self.store.shape(row), [1.0, 1.0]
        for view, corner in enumerate(corners):
            for first, side, num in zip(corner, self.config.crop, shape, strict=True):
                inside[view] *= max(0, min(first + side, num) - max(first, 0)) / side
        return 1 - sum(inside) / 2


def collate(samples: Sequence[Pairs]) -> Pairs:
    """Samples as one batch."""
    return Pairs(*(default_collate([part[0] for part in parts]) for parts in zip(*samples, strict=True)))


_ALIGNED = 8
"""Bytes: the longest numbers of a batch."""


class SharedCollate:
    """Samples as one batch, in memory that a reader process shares with the training and uses again.

    Memory that is shared anew for every batch costs more than reading its crops (`benchmarks/input.py`): the system
    clears it page by page. So a process fills the same few places in turn, and all of a batch is whole **until the
    next batch is taken from the loader**.

    Args:
        ahead: Batches that a process may be ahead of the training: `prefetch_factor` of its loader.
    """

    def __init__(self, ahead: int) -> None:
        self.places: list[Tensor | None] = [None] * (ahead + 1)
        self.batches = 0

    def __call__(self, samples: Sequence[Pairs]) -> Pairs:
        """All of a batch lies in one piece of memory: to hand a piece over costs as much as to read a crop.

        Where no process reads, batches are those of `collate`.
        """
        if get_worker_info() is None:
            return collate(samples)
        parts = [(values, len(samples) * values[0].nbytes) for values in zip(*samples, strict=True)]
        starts = list(itertools.accumulate((-(-size // _ALIGNED) * _ALIGNED for _, size in parts), initial=0))
        turn = self.batches % len(self.places)
        self.batches += 1
        place = self.places[turn]
        if place is None or len(place) != starts[-1]:
            place = torch.empty(starts[-1], dtype=torch.uint8)
            self.places[turn] = place.share_memory_()  # type: ignore[no-untyped-call]
        batch = []
        for (values, size), start in zip(parts, starts, strict=False):
            batch.append(place[start : start + size].view(values[0].dtype).view(-1, *values[0].shape[1:]))
            torch.cat(values, out=batch[-1])
        return Pairs(*batch)


def show(pairs: Pairs, config: DataConfig) -> Views:
    """What the network sees of crops, made where they lie: windowed, mirrored and jittered.

    Args:
        pairs: A batch, on any device.
        config: Of the data set that it comes from.
    """
    u, v = (_shown(hu, pairs.mirrored[:, view], pairs.jitter[:, view], config) for view, hu in enumerate(pairs[:2]))
    return Views(u=u, v=v, rows=pairs.rows, padding=pairs.padding)


def _shown(hu: Tensor, mirrored: Tensor, jitter: Tensor, config: DataConfig) -> Tensor:
    """Crops of one view, (batch, 1, x, y, z), in [0, 1]."""
    low, high = config.window_hu
    image = hu.float()[:, None].sub_(low).mul_(1 / (high - low)).clamp_(0, 1)
    if config.flip_ratio:
        for axis in range(3):
            image = torch.where(mirrored[:, axis].view(-1, 1, 1, 1, 1), image.flip(2 + axis), image)
    if config.jitter_ratio:
        scale, shift = jitter.view(-1, 2, 1, 1, 1, 1).unbind(dim=1)
        image = image.mul_(1 + scale).add_(shift).clamp_(0, 1)
    return image


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
    shown = (show(dataset[sample], config) for sample in range(max(1, num_crops // 2)))
    return float(np.mean([view.mean().item() for views in shown for view in (views.u, views.v)]))
