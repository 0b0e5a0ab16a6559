"""How far attention heads look, and how evenly far: attention-weighted distances in mm, and entropies.

Every figure of a stage is a mean over crops, one value a crop; patients are drawn again for its interval.

Reference: paper, section 4.5 and figure 4a: per head the attention-weighted mean distance, per stage the
entropy of those distances across heads, and the mean entropy of the rows.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dagman import files
from dagman.ct import crops
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.figures import diversity as figure
from dagman.nets.encoder import Encoder
from dagman.nets.stage import WindowBlock
from dagman.nets.swin import PATCH_SIDE
from dagman.nets.transformer import GlobalBlock
from dagman.nets.vit import ViTEncoder
from dagman.nets.windows import FORBIDDEN, effective_window, partition, window_layout
from dagman.randomness import generator
from dagman.tasks import statistics
from dagman.tasks.embed import move, refuse_training, suited
from dagman.tasks.protocol import GroupBy
from dagman.tasks.table import write_rows
from dagman.types import Preparation

NUM_CROPS = 16
BODY_RATIO = 0.25
"""Share of a drawn crop that is body, at least, as in training."""
ROWS_AT_ONCE = 512
"""Rows of attention among all cells that are held at a time: 32,768 cells have 10^9 pairs a head."""


class Heads(NamedTuple):
    """The heads of a Swin's stage, of semantic attention, or of a ViT's block."""

    place: str
    """`stage 1` to `stage 4`, `semantic attention`, or `block 1` and so on."""
    distance_mm: Float[np.ndarray, " heads"]
    """Attention-weighted mean distance of each head, blocks one after the other."""
    head_entropy: Float[np.ndarray, " heads"]
    """Mean entropy of each head's attention rows over the largest that a row can have."""

    @property
    def row_entropy(self) -> float:
        """Mean of the heads' entropies."""
        return float(self.head_entropy.mean(dtype=np.float64))

    @property
    def distance_entropy(self) -> float:
        """Entropy in nats of the heads' distances, each as its share of their sum; NaN where no head looks away."""
        total = self.distance_mm.sum()
        share = self.distance_mm[self.distance_mm > 0] / total
        return float(-(share * np.log(share)).sum()) if total > 0 else math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """How the heads of an encoder looked at one crop."""

    case_id: str
    patient: str | None
    heads: tuple[Heads, ...]
    """Of each place."""

    def at(self, place: str) -> Heads | None:
        """The heads of one place; None where the encoder has none there."""
        return next((one for one in self.heads if one.place == place), None)


READINGS: dict[str, Callable[[Heads], float]] = {
    "distance_mm": lambda one: float(one.distance_mm.mean(dtype=np.float64)),
    "distance_entropy": lambda one: one.distance_entropy,
    "distance_entropy_ratio": lambda one: one.distance_entropy / (math.log(len(one.distance_mm)) or math.nan),
    "row_entropy": lambda one: one.row_entropy,
}
"""What is read off a place for each crop: the heads' mean distance; the entropy of their distances in nats, and over
its largest value, the logarithm of their number; the mean entropy of their rows over its largest value."""


def head_diversity(
    encoder: Encoder,
    store: PreparedStore,
    *,
    num_crops: int = NUM_CROPS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Look]:
    """Look at crops drawn from a store; the same seed draws from the same volumes for every encoder.

    Args:
        encoder: In eval mode; its `preparation` says how crops are cut and windowed.
        store: Cases on the grid that the encoder was trained on; all have their turn before one comes twice.
        num_crops: How many.
        seed: Of the draws.
        device: Where to compute.
        progress: Hears of each finished crop.

    Raises:
        DagmanError: `E-GRID` for a store of another spacing; `E-CONFIG` for no crop; `E-STORE` for an empty store;
            `E-DEVICE` for a GPU that is not there.

    Reference:
        Section 4.5, figure 4a.
    """
    preparation = suited(store, encoder.preparation)
    if num_crops < 1:
        raise DagmanError("CONFIG", "number of crops", f"cannot be {num_crops}", "look at 1 or more")
    if not len(store):
        raise DagmanError("STORE", store.folder, "holds no case", "prepare scans into it")
    move(encoder, device)
    order = generator(seed, "diversity.order").permutation(len(store)).tolist()
    looks = []
    for number in range(num_crops):
        row = order[number % len(order)]
        image = torch.from_numpy(_drawn(preparation, store, row, seed, number))[None, None].to(device)
        told = store.rows[row]
        looks.append(
            Look(case_id=str(told["case_id"]), patient=told.get("patient"), heads=tuple(heads(encoder, image)))
        )
        if progress:
            progress(number + 1, num_crops)
    return looks


def _drawn(preparation: Preparation, store: PreparedStore, row: int, seed: int, number: int) -> np.ndarray:
    """A crop with enough body, as the network sees it; two views that overlap wholly are one crop."""
    pair = crops.two_views(
        store,
        row,
        preparation.crop,
        overlap_ratio=1.0,
        body_ratio=BODY_RATIO,
        generator=generator(seed, "diversity.crop", number),
    )
    return crops.window(pair.u, preparation.window_hu)


def summary(
    runs: Mapping[str, Sequence[Look]], *, group_by: GroupBy = "patient", seed: int = 0
) -> list[dict[str, Any]]:
    """One row for each run and place: every reading with its interval, and how far it lies above the first run's.

    Args:
        runs: Name to what `head_diversity` returned, all with one seed and number of crops.
        group_by: What intervals draw again: `case` where patients are unknown.
        seed: Of the bootstrap.
    """
    first = next(iter(runs.values()))
    rows = []
    for name, looks in runs.items():
        patients = [look.case_id if group_by == "case" else look.patient for look in looks]
        for place in dict.fromkeys(one.place for look in looks for one in look.heads):
            row: dict[str, Any] = {"weights": name, "place": place, "crops": len(looks)}
            row["heads"] = next(len(one.distance_mm) for one in looks[0].heads if one.place == place)
            for reading in READINGS:
                values = _read(looks, place, reading)
                row[reading] = vars(statistics.mean_over_patients(values, patients, seed=seed))
                if looks is not first:
                    above = values - _read(first, place, reading)
                    row[f"{reading}_above_first"] = vars(statistics.mean_over_patients(above, patients, seed=seed))
            rows.append(row)
    return rows


def _read(looks: Sequence[Look], place: str, reading: str) -> np.ndarray:
    found = [look.at(place) for look in looks]
    return np.array([READINGS[reading](one) if one else np.nan for one in found])


def write(
    runs: Mapping[str, Sequence[Look]],
    folder: Path,
    *,
    group_by: GroupBy = "patient",
    seed: int = 0,
    found: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write `heads.csv`, `crops.csv`, `result.json` and `diversity.png`; returns their paths.

    Args:
        runs: As in `summary`.
        folder: Where.
        group_by: As in `summary`.
        seed: Of the bootstrap.
        found: What else the result should say, as plain values.
    """
    paths = [folder / name for name in ("heads.csv", "crops.csv", "result.json", "diversity.png")]
    drawn = {name: {one.place: _over_crops(looks, one.place) for one in looks[0].heads} for name, looks in runs.items()}
    write_rows(
        paths[0],
        ("weights", "place", "head", "distance_mm", "row_entropy"),
        (
            (name, place, number, *values)
            for name, places in drawn.items()
            for place, box in places.items()
            for number, values in enumerate(zip(box.distance_mm, box.row_entropy, strict=True), 1)
        ),
    )
    write_rows(
        paths[1],
        ("weights", "crop", "case_id", "patient", "place", *READINGS),
        (
            (name, number, look.case_id, look.patient or "", one.place, *(read(one) for read in READINGS.values()))
            for name, looks in runs.items()
            for number, look in enumerate(looks, 1)
            for one in look.heads
        ),
    )
    some = next(iter(runs.values()))
    files.write_json(
        paths[2],
        {
            "crops": len(some),
            "cases": len({look.case_id for look in some}),
            "patients": len({look.patient for look in some} - {None}),
            "seed": seed,
            "interval": f"95 %, bias-corrected and accelerated bootstrap over {group_by}s",
            "group_by": group_by,
            "rows": summary(runs, group_by=group_by, seed=seed),
            **(found or {}),
        },
    )
    files.write_bytes(paths[3], figure.png(drawn))
    return paths


def _over_crops(looks: Sequence[Look], place: str) -> figure.Boxes:
    found = [one for look in looks if (one := look.at(place))]
    return figure.Boxes(
        distance_mm=np.stack([one.distance_mm for one in found]).mean(axis=0, dtype=np.float64),
        row_entropy=np.stack([one.head_entropy for one in found]).mean(axis=0, dtype=np.float64),
        distance_entropy=np.array([READINGS["distance_entropy_ratio"](one) for one in found]),
    )


@torch.inference_mode()
def heads(encoder: Encoder, images: Float[Tensor, "batch 1 x y z"]) -> list[Heads]:
    """Distances and entropies of every head, averaged over rows and images, without a shift's forbidden pairs.

    Args:
        encoder: In eval mode.
        images: Crops in [0, 1], on the encoder's device.
    """
    refuse_training(encoder)
    places = _places(encoder)
    seen: list[tuple[Any, tuple[Any, ...]]] = []
    hooks = [module.register_forward_pre_hook(lambda one, given: seen.append((one, given))) for module in places]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    grid = encoder.config.grid((images.shape[2], images.shape[3], images.shape[4]))
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for module, given in seen:
        place, step_mm = places[module]
        measure = _in_windows if isinstance(module, WindowBlock) else _among_cells
        found.setdefault(place, []).append(measure(module, *given, grid=grid, step_mm=step_mm))
    return [
        Heads(place, *(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))
        for place, parts in found.items()
    ]


def _places(encoder: Encoder) -> dict[nn.Module, tuple[str, float]]:
    """The blocks that attend, each with its place and the distance between its tokens in mm."""
    voxel, cell = encoder.preparation.spacing_mm, encoder.preparation.spacing_mm * encoder.config.cell_side
    if isinstance(encoder, ViTEncoder):
        return {block: (f"block {number}", cell) for number, block in enumerate(encoder.blocks, 1)}
    windows = {
        block: (f"stage {number}", voxel * PATCH_SIDE * 2 ** (number - 1))
        for number, stage in enumerate(encoder.stages, 1)
        for block in stage.blocks  # type: ignore[union-attr]
    }
    blocks = encoder.semantic_attention.blocks if encoder.config.has_cls else ()
    return windows | dict.fromkeys(blocks, ("semantic attention", cell))


def _in_windows(
    block: WindowBlock, x: Tensor, *_: object, grid: tuple[int, int, int], step_mm: float
) -> tuple[Tensor, Tensor]:
    del grid
    module, x = block.attn, block.norm1(x)
    here = (x.shape[1], x.shape[2], x.shape[3])
    layout = window_layout(x.shape[0], here, module.window, module.shift, x.device)
    windows = partition(x, layout)
    count, tokens, width = windows.shape
    query, key, _ = module.qkv(windows).view(count, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (query * (width // module.num_heads) ** -0.5 @ key.transpose(-2, -1)).float() + module.bias(tokens)
    # Padding is attended to, but lies nowhere; nor does the shift let far sides of the map meet.
    real = partition(torch.ones_like(x[..., :1]), layout).squeeze(-1) > 0
    meet = real[:, None, :].expand(count, tokens, tokens).clone()
    for start, stop, mask in layout.masks:
        meet[start:stop] &= mask == 0
    weights = logits.masked_fill(~meet[:, None], FORBIDDEN).softmax(dim=-1)
    sides, _ = effective_window(here, module.window, module.shift)
    most = meet.sum(dim=-1).clamp_min(1).log()
    return _measured(weights, _distances(sides, step_mm).to(x.device), most[:, None], real[:, None].float())


def _among_cells(
    module: GlobalBlock,
    x: Tensor,
    position: Tensor | None = None,
    *,
    grid: tuple[int, int, int],
    step_mm: float,
) -> tuple[Tensor, Tensor]:
    """Cells among each other, without [CLS], which has no place."""
    query, key, _ = (part[:, :, 1:] for part in module.heads_of(x, position))
    cells = query.shape[2]
    most = torch.full((1, 1, 1), math.log(cells), device=x.device)
    far, share = (torch.zeros(module.num_heads, device=x.device) for _ in range(2))
    for image in range(len(x)):
        for start in range(0, cells, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            part = query[image : image + 1, :, rows] * query.shape[-1] ** -0.5
            attention = (part @ key[image : image + 1].transpose(-2, -1)).float().softmax(dim=-1)
            every = torch.ones_like(attention[:, :1, :, 0])
            found, entropy = _measured(attention, _distances(grid, step_mm, rows).to(x.device), most, every)
            weight = attention.shape[2] / cells / len(x)
            far, share = far + weight * found, share + weight * entropy
    return far, share


def _distances(sides: tuple[int, int, int], step_mm: float, rows: slice = slice(None)) -> Tensor:
    places = torch.tensor(list(itertools.product(*map(range, sides))), dtype=torch.float32)
    return step_mm * torch.cdist(places[rows], places)


def _measured(attention: Tensor, distance_mm: Tensor, most: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Of each head the mean distance, and the mean entropy of the rows over `most`; over the rows that count."""
    far = (attention * distance_mm).sum(dim=-1)
    share = -torch.xlogy(attention, attention).sum(dim=-1) / most.clamp_min(1e-9)
    return (far * counts).sum(dim=(0, 2)) / counts.sum(), (share * counts).sum(dim=(0, 2)) / counts.sum()
