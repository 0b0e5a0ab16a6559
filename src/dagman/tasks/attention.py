"""Where the encoder looks: semantic attention of a whole CT on the scan's own grid, as NIfTI and as a picture.

A crop's attention sums to 1 over its N cells; times N, 1 is what uniform attention would give every cell, whatever the
crop. Crops overlap by half and are blended with Gaussian weights, so every map of every scan is on this one scale.
Between the centres of cells the map is trilinear: a cell is 16 voxels of 2 mm wide at the paper's stage, and a
smooth picture does not pretend to edges that are only those of the cells' grid.
"""

import gzip
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn import functional

from dagman import files
from dagman.ct import crops
from dagman.ct.prepare import PrepareConfig, prepare_volume
from dagman.ct.read import Limits, read, read_mask_of
from dagman.ct.resample import BODY_HU
from dagman.ct.store import AIR_HU, padded_crop
from dagman.errors import DagmanError
from dagman.figures import attention as figure
from dagman.nets.encoder import Encoder
from dagman.nets.transformer import GlobalBlock, rows_of_first
from dagman.nets.vit import ViTEncoder
from dagman.tasks.embed import Progress, crops_at_once, encode, in_turn
from dagman.tasks.pointing import Pointing, shares
from dagman.types import Grid, Precision, Scan, Volume

Triple = tuple[int, int, int]
BLEND_SIGMA_RATIO = 0.125
"""Standard deviation of the blending weights over the crop's side (MONAI's sliding window)."""
BODY_GRID_MM = 4.0
"""Fine enough to tell the body from the table, coarse enough to take no time."""


class Look(NamedTuple):
    """What one encoder saw in a scan."""

    nifti: Path
    pointing: Pointing


class Outputs(NamedTuple):
    """What `explain` wrote and found."""

    looks: dict[str, Look]
    """Of each encoder."""
    picture: Path
    heads: Path | None = None
    """The picture of the heads, where it was asked for."""


def explain(
    encoders: Mapping[str, Encoder],
    scan: Scan,
    folder: Path,
    *,
    heads: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> Outputs:
    """Show where encoders look at one scan.

    Writes `CASE_attention.nii.gz`, which lies over the scan in any viewer (`CASE_NAME_attention.nii.gz` of several
    encoders), `CASE_attention.png` and, where asked for, `CASE_heads.png`.

    Args:
        encoders: Name to Swin with semantic attention, or ViT; the first one's window shows the CT.
        scan: Its mask, where it has one, is outlined and the planes go through its centre.
        folder: Where the files go.
        heads: Also draw every head by itself.
        device: Where to compute.
        progress: Hears of each finished crop of an encoder.
        limits: As for `ct.read.read`; a scan thinner than a crop is shown with air around it.

    Raises:
        DagmanError: As `ct.read.read`; `E-NOATTENTION` for an encoder without semantic attention.

    Reference:
        Figure 5.
    """
    for name, encoder in encoders.items():
        _require_attention(encoder, name)
    volume = read(scan, limits)
    labels = read_mask_of(scan, volume)
    mask = labels.hu > 0 if labels else None
    body, own = body_of(volume), volume.own_grid or Grid(_triple(volume.hu.shape), volume.affine)
    maps, looks = {}, {}
    for number, (name, plain) in enumerate(zip(encoders, files.names_in_files([*encoders]), strict=True)):
        encoder = encoders[name]
        tell = progress and partial(in_turn, progress, number, len(encoders))
        maps[name] = values = attention_map(encoder, volume, device=device, progress=tell)
        whose = f"{plain}_" if len(encoders) > 1 else ""
        nifti = folder / f"{scan.case_id}_{whose}attention.nii.gz"
        write_nifti(values, volume.affine, own, nifti)
        seen, (found, why) = values[body & (values > 0)], shares(values, mask, body)
        ends = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
        looks[name] = Look(nifti, Pointing(scan.case_id, scan.patient, name, *ends, found, why))
    first = next(iter(encoders))
    scene = figure.Scene(
        title=scan.case_id,
        hu=volume.hu,
        attention=maps,
        mask=mask,
        spacing_mm=volume.spacing_mm,
        centre=centre(maps[first], body, mask),
        window_hu=encoders[first].preparation.window_hu,
    )
    picture = picture_of(scan, folder)
    figure.write_png(scene, picture)
    if not heads:
        return Outputs(looks, picture)
    sheet = folder / f"{scan.case_id}_heads.png"
    level = np.eye(4)
    level[2, 3] = scene.centre[2]
    x, y, _ = volume.hu.shape
    plane = Grid((x, y, 1), volume.affine @ level)
    by_head = {name: head_maps(encoder, volume, plane, device=device) for name, encoder in encoders.items()}
    figure.write_heads_png(scene, by_head, sheet)
    return Outputs(looks, picture, sheet)


def picture_of(scan: Scan, folder: Path) -> Path:
    """Where `explain` draws a scan, whatever the encoders."""
    return folder / f"{scan.case_id}_attention.png"


def attention_map(
    encoder: Encoder,
    volume: Volume,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    overlap_ratio: float = 0.5,
    progress: Progress | None = None,
) -> Float32[np.ndarray, "x y z"]:
    """Semantic attention of a CT, times uniform, on the volume's grid; 0 where no crop looked (far from the body).

    Args:
        encoder: A Swin with semantic attention, or a ViT; its `preparation` says how the CT is shown to it.
        volume: Any spacing, RAS+.
        device: Where to compute.
        precision: `bf16` computes under autocast.
        overlap_ratio: Of neighbouring crops, along every axis.
        progress: Hears of each finished crop.

    Raises:
        DagmanError: `E-NOATTENTION` for an encoder without semantic attention.

    Reference:
        Equation 1, over overlapping crops.
    """

    def rows(images: Tensor) -> Tensor:
        found = encode(encoder, images, device=device, precision=precision).attention
        assert found is not None
        return found[:, None]

    affine, blended = _blended(encoder, volume, rows, overlap_ratio, progress)
    return onto(blended[0], affine, Grid(_triple(volume.hu.shape), volume.affine))


def head_maps(
    encoder: Encoder,
    volume: Volume,
    grid: Grid | None = None,
    *,
    device: torch.device | str = "cpu",
    overlap_ratio: float = 0.5,
) -> Float32[np.ndarray, "heads x y z"]:
    """Semantic attention of every head, times uniform, on a grid along the volume's axes; the volume's own where None.

    The mean over heads is `attention_map`; a head that looks at [CLS] itself lies below the others everywhere.
    """
    target = grid or Grid(_triple(volume.hu.shape), volume.affine)
    rows_of = partial(head_rows, encoder, device=device)
    affine, blended = _blended(encoder, volume, rows_of, overlap_ratio, None)
    return np.stack([onto(values, affine, target) for values in blended])


@torch.inference_mode()
def head_rows(
    encoder: Encoder, images: Float[Tensor, "batch 1 x y z"], *, device: torch.device | str = "cpu"
) -> Float[Tensor, "batch heads cells"]:
    """The rows of [CLS] in each head of the last block, on one scale: their mean over heads is `Features.attention`."""
    blocks = encoder.blocks if isinstance(encoder, ViTEncoder) else encoder.semantic_attention.blocks
    block = blocks[-1]
    assert isinstance(block, GlobalBlock)
    given: list[tuple[Any, ...]] = []
    hook = block.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    try:
        encode(encoder, images, device=device, precision="float32")
    finally:
        hook.remove()
    query, key, _ = block.heads_of(*given[0])
    rows = rows_of_first(query, key)[:, :, 1:]
    return rows / rows.sum(dim=-1).mean(dim=1)[:, None, None]


def _require_attention(encoder: Encoder, name: str) -> None:
    if not encoder.config.has_cls:
        advice = "give weights of a recipe with semantic attention"
        raise DagmanError("NOATTENTION", name, "has no semantic attention", advice)


def _blended(
    encoder: Encoder,
    volume: Volume,
    rows_of: Callable[[Tensor], Tensor],
    overlap_ratio: float,
    progress: Progress | None,
) -> tuple[Float[np.ndarray, "4 4"], Float32[np.ndarray, "maps x y z"]]:
    """Rows (batch, maps, cells) of overlapping crops as maps on the prepared volume's grid, after its affine."""
    _require_attention(encoder, "encoder")
    preparation = encoder.preparation
    prepared = prepare_volume(
        volume, PrepareConfig(spacing_mm=preparation.spacing_mm, resampling=preparation.resampling)
    )
    shape = _triple(prepared.hu.shape)
    corners = crops.sliding(shape, preparation.crop, overlap_ratio)
    blend, weight = _blending_weights(preparation.crop), np.zeros(shape, np.float32)
    grid, together = encoder.config.grid(preparation.crop), crops_at_once(preparation)
    total = np.zeros((1, *shape), np.float32)
    for start in range(0, len(corners), together):
        part = corners[start : start + together]
        hu = np.stack([padded_crop(prepared.hu, corner, preparation.crop, AIR_HU) for corner in part])
        found = rows_of(torch.from_numpy(crops.window(hu, preparation.window_hu))[:, None])
        if len(total) < found.shape[1]:
            total = np.zeros((found.shape[1], *shape), np.float32)
        for corner, rows in zip(part, found, strict=True):
            inside, source = _overlap(shape, corner, preparation.crop)
            for number, row in enumerate(rows):
                total[number][inside] += (blend * _times_uniform(row, grid, preparation.crop))[source]
            weight[inside] += blend[source]
        if progress:
            progress(start + len(part), len(corners))
    blended: np.ndarray = total / weight
    if not np.isfinite(blended).all():
        raise DagmanError("FEATURES", "attention", "is not finite", "check the weights")
    return prepared.affine, blended


def _triple(shape: tuple[int, ...]) -> Triple:
    x, y, z = shape
    return x, y, z


def _blending_weights(crop: Triple) -> np.ndarray:
    axes = [np.exp(-0.5 * ((np.arange(side) - (side - 1) / 2) / (BLEND_SIGMA_RATIO * side)) ** 2) for side in crop]
    # A plain product, without the floor that others give it: the share of each crop then changes along an axis in the
    # same way everywhere, and no seam appears at the border of the volume.
    weights: np.ndarray = (axes[0][:, None, None] * axes[1][:, None] * axes[2]).astype(np.float32)
    return weights


def _overlap(shape: tuple[int, ...], corner: Triple, crop: Triple) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a crop that lies in the volume, as slices of the volume and of the crop."""
    edges = [
        (max(first, 0), min(first + side, num), first) for num, first, side in zip(shape, corner, crop, strict=True)
    ]
    inside = tuple(slice(low, high) for low, high, _ in edges)
    return inside, tuple(slice(low - first, high - first) for low, high, first in edges)


def _times_uniform(row: Float[Tensor, " cells"], grid: Triple, crop: Triple) -> np.ndarray:
    cells = row.float().cpu().view(1, 1, *grid) * row.numel()
    voxels: np.ndarray = functional.interpolate(cells, size=crop, mode="trilinear")[0, 0].numpy()
    return voxels


def onto(
    values: Float32[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"], target: Grid
) -> Float32[np.ndarray, "other_x other_y other_z"]:
    """Values on another grid whose axes run along the same lines, in any order and direction.

    Linear between voxel centres. The last one counts for three quarters of a voxel beyond it, and 0 stands further out:
    a resampled grid ends up to a quarter of its voxel before the scan does (`resample.positions`).
    """
    step = np.linalg.inv(affine) @ target.affine
    order = [int(np.abs(step[:3, axis]).argmax()) for axis in range(3)]
    for axis, source in enumerate(order):
        num = values.shape[source]
        where = step[source, axis] * np.arange(target.shape[axis]) + step[source, 3]
        if len(where) == num and np.allclose(np.sort(where), np.arange(num), rtol=0, atol=1e-3):
            values = values if step[source, axis] > 0 else np.flip(values, source)
            continue
        low = np.clip(np.floor(where + 1e-6).astype(np.int64), 0, num - 1)
        inside = np.abs(where - (num - 1) / 2) <= num / 2 + 0.25 + 1e-6
        share = np.clip(where - low, 0, 1)
        weights = np.stack([inside * (1 - share), inside * share]).astype(np.float32)
        weights = weights.reshape(2, *(-1 if other == source else 1 for other in range(3)))
        near, far = values.take(low, source), values.take(np.minimum(low + 1, num - 1), source)
        values = near * weights[0] + far * weights[1]
    return np.ascontiguousarray(values.transpose(order))


def write_nifti(
    values: Float32[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"], target: Grid, path: Path
) -> None:
    """Write values as float32 NIfTI on `target`, with both of its coordinate forms set."""
    import nibabel

    image = nibabel.Nifti1Image(onto(values, affine, target), target.affine)
    image.set_qform(target.affine, code=1)
    image.set_sform(target.affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"DAGMaN semantic attention, times uniform"
    files.write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))


def body_of(volume: Volume) -> Bool[np.ndarray, "x y z"]:
    """The patient with lungs and bowel gas, without table and clothes: the largest thick thing, holes filled."""
    from scipy import ndimage

    steps = [max(1, round(BODY_GRID_MM / size)) for size in volume.spacing_mm]
    coarse = volume.hu[:: steps[0], :: steps[1], :: steps[2]] > BODY_HU
    parts, num_parts = ndimage.label(ndimage.binary_erosion(coarse, border_value=1))
    if num_parts == 0:
        return np.ones(volume.hu.shape, np.bool_)
    largest = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    grown = ndimage.binary_dilation(largest) & coarse
    filled = np.stack([ndimage.binary_fill_holes(plane) for plane in np.moveaxis(grown, 2, 0)], axis=2)
    nearest = [np.arange(num) // step for num, step in zip(volume.hu.shape, steps, strict=True)]
    body: np.ndarray = filled[np.ix_(*nearest)]
    return body


def centre(
    values: Float32[np.ndarray, "x y z"],
    body: Bool[np.ndarray, "x y z"],
    mask: Bool[np.ndarray, "x y z"] | None = None,
) -> Triple:
    """The voxel to cut planes through: the middle of the mask, else the most attended one whose planes show the body.

    These cut at least half as much of it as the plane that cuts most: what is attended most is often the skin, and
    planes that touch it show air.
    """
    if mask is not None and mask.any():
        x, y, z = (round(float(lines.mean())) for lines in np.nonzero(mask))
        return x, y, z
    shown = body.copy()
    for axis in range(3):
        area = body.sum(axis=tuple({0, 1, 2} - {axis}))
        np.moveaxis(shown, axis, 0)[2 * area < area.max()] = False
    inside = np.where(shown if shown.any() else body, values, 0)
    return _triple(tuple(int(index) for index in np.unravel_index(inside.argmax(), inside.shape)))
