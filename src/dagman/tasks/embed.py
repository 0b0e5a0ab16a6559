"""One vector a case: the crop around its mask's centroid where there is one, else the mean over crops that cover it."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional

from dagman.ct import crops
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.nets.classifier import Which, vector, width_of
from dagman.nets.encoder import Encoder, new
from dagman.tasks.table import Table
from dagman.types import Features, Precision, Preparation

VOXELS_AT_ONCE = 4 * 128**3
"""Of the crops that are encoded together: four of the paper's size, more of smaller ones."""
MOST_CROPS = 32
Progress = Callable[[int, int], None]
"""Called with the number of finished cases, or crops, and their total."""


def in_turn(progress: Progress, number: int, networks: int, done: int, total: int) -> None:
    """Tell of the work of one network of several, which do the same one after the other."""
    progress(number * total + done, networks * total)


class _Crop(NamedTuple):
    place: int
    """Of its case among those asked for."""
    image: Float32[np.ndarray, "x y z"]
    """Intensities in [0, 1]."""


def embed(
    encoder: Encoder,
    store: PreparedStore,
    *,
    which: Which = "pooled",
    rows: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Table:
    """Encode every case of a store.

    Args:
        encoder: In eval mode; its `preparation` says how crops are cut and windowed.
        store: Cases on the grid that the encoder was trained on.
        which: `pooled`, the mean of the final tokens; `cells`, the mean of the cell tokens, which keeps more of what
            is small (of a ViT, the same); `cls`; or `all` side by side.
        rows: Of the store; all where None.
        device: Where to compute.
        precision: `bf16` computes under autocast.
        batch_size: Crops encoded at once, by their size where None; no influence on the result beyond rounding.
        progress: Hears of each finished case.

    Raises:
        DagmanError: `E-GRID`, exit code 4, for a store of another spacing; `E-NOCLS` for `cls` of an encoder without;
            `E-NOMASK` for cases with an empty mask; `E-USAGE` for another word or a row that the store lacks;
            `E-DEVICE` for a GPU that is not there.
    """
    width_of(encoder.config, which)
    preparation = suited(store, encoder.preparation)

    def features(images: Float[Tensor, "batch 1 x y z"]) -> Tensor:
        return vector(encode(encoder, images, device=device, precision=precision), which).float().cpu()

    return mean_per_case(store, preparation, features, batch_size=batch_size, progress=progress, rows=rows)


def voxels(store: PreparedStore, preparation: Preparation, *, side: int = 8, progress: Progress | None = None) -> Table:
    """The baseline that knows no network: the same crops, windowed, averaged to `side`^3 voxels."""
    preparation = suited(store, preparation)

    def features(images: Float[Tensor, "batch 1 x y z"]) -> Tensor:
        return functional.adaptive_avg_pool3d(images, side).flatten(1)

    return mean_per_case(store, preparation, features, batch_size=1, progress=progress)


def untrained(encoder: Encoder, seed: int = 0) -> Encoder:
    """An encoder like this one with new random weights, to be compared with."""
    return new(encoder.config, encoder.preparation, seed)


@torch.inference_mode()
def encode(
    encoder: Encoder,
    images: Float[Tensor, "batch 1 x y z"],
    *,
    device: torch.device | str,
    precision: Precision,
) -> Features:
    """Features of a batch; nothing is hidden, and an encoder in training mode is refused."""
    refuse_training(encoder)
    if precision not in get_args(Precision):
        wanted = ", ".join(get_args(Precision))
        raise DagmanError("USAGE", "precision", f"cannot be {precision}", f"give one of {wanted}")
    move(encoder, device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        features: Features = encoder(images.to(device))
    return features


def refuse_training(encoder: Encoder) -> None:
    """Refuse an encoder that drops paths at random.

    Raises:
        ValueError: In training mode.
    """
    if encoder.training:
        raise ValueError("features are taken in eval mode: call encoder.eval()")


def move(encoder: Encoder, device: torch.device | str) -> None:
    """Put an encoder where it computes.

    Raises:
        DagmanError: `E-DEVICE` for a GPU that is not there.
    """
    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise DagmanError("DEVICE", f"device {device}", "no such CUDA device is here", "leave the device out")
    encoder.to(device)


def crops_at_once(preparation: Preparation) -> int:
    """How many crops of an encoder's size are encoded together."""
    x, y, z = preparation.crop
    return max(1, min(MOST_CROPS, VOXELS_AT_ONCE // (x * y * z)))


def suited(store: PreparedStore, preparation: Preparation) -> Preparation:
    """How a store's cases are shown to an encoder: as its `preparation` says, on the same grid.

    They are resampled as the store was: what learns from it wants new scans so. Grey cubes without Hounsfield units
    keep the window that gives them back.

    Raises:
        DagmanError: `E-GRID`, exit code 4, for a store of another spacing; `E-CONFIG` as `PreparedStore.window_hu`.
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
    preparation = replace(preparation, resampling=store.settings.get("resampling", preparation.resampling))
    return replace(preparation, window_hu=store.window_hu or preparation.window_hu)


def _crops_of(store: PreparedStore, row: int, place: int, preparation: Preparation) -> Iterator[_Crop]:
    crop = preparation.crop
    if store.rows[row]["mask"] is not None:
        yield _Crop(place, crops.window(crops.centred(store, row, crop, "mask"), preparation.window_hu))
        return
    for corner in crops.sliding(store.shape(row), crop):
        yield _Crop(place, crops.window(store.hu(row, corner, crop), preparation.window_hu))


def mean_per_case(
    store: PreparedStore,
    preparation: Preparation,
    features: Callable[[Tensor], Tensor],
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    rows: Sequence[int] | None = None,
) -> Table:
    """Features of batches that may span cases, averaged over the crops of each case in the order they are cut.

    Args:
        store: Cases.
        preparation: How crops are cut and windowed.
        features: One vector for each crop of a batch, on the CPU.
        batch_size: Crops of a batch, by their size where None.
        progress: Hears of each finished case.
        rows: Of the store; all where None.

    Raises:
        DagmanError: `E-NOMASK` for cases with an empty mask; `E-USAGE` for batches of nothing or a row that the
            store lacks.
    """
    if batch_size is not None and batch_size < 1:
        raise DagmanError("USAGE", "batch_size", f"cannot be {batch_size}", "give at least 1")
    chosen = range(len(store)) if rows is None else rows
    if missing := [row for row in chosen if not 0 <= row < len(store)]:
        raise DagmanError("USAGE", "rows", f"{missing[0]} is no row of {len(store)}", "count from 0")
    crops.refuse_empty_masks(store, chosen)
    queue = itertools.chain.from_iterable(_crops_of(store, row, place, preparation) for place, row in enumerate(chosen))
    sums: list[np.ndarray] = []
    counts = np.zeros(len(chosen), dtype=np.int64)
    while batch := list(itertools.islice(queue, batch_size or crops_at_once(preparation))):
        found = features(torch.from_numpy(np.stack([crop.image for crop in batch]))[:, None])
        for crop, values in zip(batch, found.double().numpy(), strict=True):
            if crop.place == len(sums):
                sums.append(np.zeros(len(values)))
                if progress and crop.place:
                    progress(crop.place, len(chosen))
            sums[crop.place] += values
            counts[crop.place] += 1
    if progress:
        progress(len(sums), len(chosen))
    means = np.stack([total / count for total, count in zip(sums, counts, strict=True)]) if sums else np.zeros((0, 0))
    said = [store.rows[row] for row in chosen]
    return Table(
        case_ids=tuple(str(row["case_id"]) for row in said),
        patients=tuple(row.get("patient") for row in said),
        labels=tuple(row.get("label") for row in said),
        splits=tuple(row.get("split") for row in said) if any(row.get("split") for row in said) else (),
        features=means.astype(np.float32),
    )
