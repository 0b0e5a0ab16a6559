"""Where the encoder looks: semantic attention of a whole CT on the scan's own grid, as NIfTI and as a picture.

A crop's attention sums to 1 over its N cells; times N, 1 is what uniform attention would give every cell, whatever the
crop. Crops overlap by half and are blended with Gaussian weights, so every map of every scan is on this one scale.
Between the centres of cells the map is trilinear: a cell is 16 voxels of 2 mm wide at the paper's stage, and a
smooth picture does not pretend to edges that are only those of the cells' grid.
"""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn import functional

from dagman import files
from dagman.ct import crops
from dagman.ct.prepare import PrepareConfig, prepare_volume
from dagman.ct.read import read, read_mask_of
from dagman.ct.resample import BODY_HU
from dagman.ct.store import AIR_HU, padded_crop
from dagman.errors import DagmanError
from dagman.figures import attention as figure
from dagman.nets.encoder import Encoder
from dagman.tasks.embed import crops_at_once, encode
from dagman.types import Grid, Scan, Volume

Triple = tuple[int, int, int]
BLEND_SIGMA_RATIO = 0.125
"""Standard deviation of the blending weights over the crop's side (MONAI's sliding window)."""
BODY_GRID_MM = 4.0
"""Fine enough to tell the body from the table, coarse enough to take no time."""


class Outputs(NamedTuple):
    """What `explain` wrote and found."""

    nifti: Path
    picture: Path
    lowest: float
    highest: float
    """Range of the map over the body, times uniform."""
    gain: float | None
    """Mean attention in the mask over that in the body; None without a mask."""


def explain(
    encoder: Encoder,
    scan: Scan,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    precision: Literal["float32", "bf16"] = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Outputs:
    """Write `CASE_attention.nii.gz`, which lies over the scan in any viewer, and `CASE_attention.png`.

    Args:
        encoder: A Swin with semantic attention, or a ViT.
        scan: Its mask, where it has one, is outlined and the planes go through its centre.
        folder: Where the files go.
        device: Where to compute.
        precision: `bf16` computes under autocast.
        progress: Hears of each finished crop.

    Raises:
        DagmanError: As `ct.read.read`; `E-NOATTENTION` for an encoder without semantic attention.

    Reference:
        Figure 5.
    """
    volume = read(scan)
    labels = read_mask_of(scan, volume)
    mask = labels.hu > 0 if labels else None
    values = attention_map(encoder, volume, device=device, precision=precision, progress=progress)
    body = body_of(volume)
    nifti, picture = (folder / f"{scan.case_id}_attention{suffix}" for suffix in (".nii.gz", ".png"))
    write_nifti(values, volume.affine, volume.own_grid or Grid(_triple(volume.hu.shape), volume.affine), nifti)
    scene = figure.Scene(
        title=scan.case_id,
        hu=volume.hu,
        attention=values,
        mask=mask,
        spacing_mm=volume.spacing_mm,
        centre=centre(values, body, mask),
        window_hu=encoder.preparation.window_hu,
    )
    figure.write_png(scene, picture)
    seen = values[body & (values > 0)]
    gain = None if mask is None else pointing_gain(values, mask, body)
    return Outputs(nifti, picture, float(seen.min()), float(seen.max()), gain)


def attention_map(
    encoder: Encoder,
    volume: Volume,
    *,
    device: torch.device | str = "cpu",
    precision: Literal["float32", "bf16"] = "float32",
    overlap_ratio: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
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
    if not encoder.config.has_cls:
        raise DagmanError(
            "NOATTENTION", "encoder", "has no semantic attention", "give weights of a recipe with semantic attention"
        )
    preparation = encoder.preparation
    prepared = prepare_volume(
        volume, PrepareConfig(spacing_mm=preparation.spacing_mm, resampling=preparation.resampling)
    )
    corners = crops.sliding(_triple(prepared.hu.shape), preparation.crop, overlap_ratio)
    blend = _blending_weights(preparation.crop)
    total, weight = (np.zeros(prepared.hu.shape, np.float32) for _ in range(2))
    grid, together = encoder.config.grid(preparation.crop), crops_at_once(preparation)
    for start in range(0, len(corners), together):
        part = corners[start : start + together]
        hu = np.stack([padded_crop(prepared.hu, corner, preparation.crop, AIR_HU) for corner in part])
        images = torch.from_numpy(crops.window(hu, preparation.window_hu))[:, None]
        rows = encode(encoder, images, device=device, precision=precision).attention
        assert rows is not None  # noqa: S101
        for corner, row in zip(part, rows, strict=True):
            inside, source = _overlap(prepared.hu.shape, corner, preparation.crop)
            total[inside] += (blend * _times_uniform(row, grid, preparation.crop))[source]
            weight[inside] += blend[source]
        if progress:
            progress(start + len(part), len(corners))
    blended: np.ndarray = total / weight
    return onto(blended, prepared.affine, Grid(_triple(volume.hu.shape), volume.affine))


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

    Linear between voxel centres; up to half a voxel beyond the last one it counts, and 0 further out.
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
        inside = np.abs(where - (num - 1) / 2) <= num / 2 + 1e-6
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
    """The voxel to cut planes through: the middle of the mask, else the body's most attended voxel."""
    if mask is not None and mask.any():
        x, y, z = (round(float(lines.mean())) for lines in np.nonzero(mask))
        return x, y, z
    inside = np.where(body, values, 0)
    return _triple(tuple(int(index) for index in np.unravel_index(inside.argmax(), inside.shape)))


def pointing_gain(
    values: Float32[np.ndarray, "x y z"], mask: Bool[np.ndarray, "x y z"], body: Bool[np.ndarray, "x y z"]
) -> float | None:
    """The mask's share of the body's attention over its share of the body: 1 is what uniform attention gets.

    None for an empty mask, or one outside the body.
    """
    inside = mask & body
    if not inside.any() or values[body].sum() <= 0:
        return None
    return float(values[inside].mean(dtype=np.float64) / values[body].mean(dtype=np.float64))
