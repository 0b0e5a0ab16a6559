"""One vector for each case: the crop around its mask where there is one, else the mean over crops that cover it."""

import itertools
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from dagman import randomness
from dagman.ct import crops
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.nets.encoder import Encoder, build
from dagman.tasks.table import Table
from dagman.types import Features, Preparation

Which = Literal["pooled", "cells", "cls", "all"]
VOXELS_AT_ONCE = 4 * 128**3
"""Of the crops that are encoded together: four of the paper's size, more of smaller ones."""
MOST_CROPS = 32
Progress = Callable[[int, int], None]
"""Called with the number of finished cases and their total."""


class _Crop(NamedTuple):
    row: int
    image: Float32[np.ndarray, "x y z"]
    """Intensities in [0, 1]."""


def embed(
    encoder: Encoder,
    store: PreparedStore,
    *,
    which: Which = "pooled",
    device: torch.device | str = "cpu",
    precision: Literal["float32", "bf16"] = "float32",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Table:
    """Encode every case of a store.

    Args:
        encoder: In eval mode; its `preparation` says how crops are cut and windowed.
        store: Cases on the grid that the encoder was trained on.
        which: `pooled`, the mean of the final tokens; `cells`, the mean of the cell tokens, which keeps more of what
            is small (of a ViT, the same); `cls`; or `all` side by side.
        device: Where to compute.
        precision: `bf16` computes under autocast.
        batch_size: Crops encoded at once, by their size where None; no influence on the result beyond rounding.
        progress: Hears of each finished case.

    Raises:
        DagmanError: `E-GRID`, exit code 4, for a store of another spacing; `E-NOCLS` for `cls` of an encoder without.
    """
    if which in ("cls", "all") and not encoder.config.has_cls:
        raise DagmanError("NOCLS", f"--which {which}", "this encoder has no [CLS] token", "use pooled or cells")
    check_grid(store, encoder.preparation)

    def features(images: Float[Tensor, "batch 1 x y z"]) -> Tensor:
        return chosen(encode(encoder, images, device=device, precision=precision), which)

    return _mean_per_case(
        store, encoder.preparation, features, batch_size or crops_at_once(encoder.preparation), progress
    )


def voxels(store: PreparedStore, preparation: Preparation, *, side: int = 8, progress: Progress | None = None) -> Table:
    """The baseline that knows no network: the same crops, windowed, averaged to `side`^3 voxels."""
    check_grid(store, preparation)

    def features(images: Float[Tensor, "batch 1 x y z"]) -> Tensor:
        return functional.adaptive_avg_pool3d(images, side).flatten(1)

    return _mean_per_case(store, preparation, features, 1, progress)


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """An encoder like this one with new random weights, to be compared with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.torch_seed(seed, "untrained"))
        other = build(encoder.config)
    other.preparation = encoder.preparation
    return other.eval()


@torch.inference_mode()
def encode(
    encoder: Encoder,
    images: Float[Tensor, "batch 1 x y z"],
    *,
    device: torch.device | str,
    precision: Literal["float32", "bf16"],
) -> Features:
    """Features of a batch; nothing is hidden, and an encoder in training mode is refused."""
    if encoder.training:
        raise ValueError("features are taken in eval mode: call encoder.eval()")
    encoder.to(device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        features: Features = encoder(images.to(device))
    return features


def chosen(features: Features, which: Which) -> Tensor:
    """The features that are asked for, side by side, as float32 on the CPU."""
    parts = {"pooled": features.pooled, "cells": features.tokens.mean(dim=1), "cls": features.cls}
    chosen = [part for name, part in parts.items() if which in (name, "all") and part is not None]
    return torch.cat([part.float().cpu() for part in chosen], dim=1)


def crops_at_once(preparation: Preparation) -> int:
    """How many crops of an encoder's size are encoded together."""
    x, y, z = preparation.crop
    return max(1, min(MOST_CROPS, VOXELS_AT_ONCE // (x * y * z)))


def check_grid(store: PreparedStore, preparation: Preparation) -> None:
    """Refuse a store of another spacing than the encoder's.

    Raises:
        DagmanError: `E-GRID`, exit code 4.
    """
    stored = float(store.settings["spacing_mm"])
    if abs(stored - preparation.spacing_mm) > 1e-3:
        raise DagmanError(
            "GRID",
            store.folder,
            f"has voxels of {stored:g} mm, the encoder was trained on {preparation.spacing_mm:g} mm",
            "prepare the scans with the encoder's spacing",
            exit_code=ExitCode.REFUSED,
        )


def _crops_of(store: PreparedStore, row: int, preparation: Preparation) -> Iterator[_Crop]:
    crop = preparation.crop
    if store.rows[row]["mask"] is not None:
        yield _Crop(row, crops.window(crops.centred(store, row, crop, "mask"), preparation.window_hu))
        return
    for corner in crops.sliding(store.shape(row), crop):
        yield _Crop(row, crops.window(store.hu(row, corner, crop), preparation.window_hu))


def _mean_per_case(
    store: PreparedStore,
    preparation: Preparation,
    features: Callable[[Tensor], Tensor],
    batch_size: int,
    progress: Progress | None,
) -> Table:
    """Features of batches that may span cases, averaged over the crops of each case in the order they are cut."""
    queue = itertools.chain.from_iterable(_crops_of(store, row, preparation) for row in range(len(store)))
    sums: list[np.ndarray] = []
    counts = np.zeros(len(store), dtype=np.int64)
    while batch := list(itertools.islice(queue, batch_size)):
        found = features(torch.from_numpy(np.stack([crop.image for crop in batch]))[:, None])
        for crop, vector in zip(batch, found.double().numpy(), strict=True):
            if crop.row == len(sums):
                sums.append(np.zeros(len(vector)))
                if progress and crop.row:
                    progress(crop.row, len(store))
            sums[crop.row] += vector
            counts[crop.row] += 1
    if progress:
        progress(len(sums), len(store))
    means = np.stack([total / count for total, count in zip(sums, counts, strict=True)]) if sums else np.zeros((0, 0))
    return Table(
        case_ids=tuple(str(row["case_id"]) for row in store.rows),
        patients=tuple(row.get("patient") for row in store.rows),
        labels=tuple(row.get("label") for row in store.rows),
        features=means.astype(np.float32),
    )
