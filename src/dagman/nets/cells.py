"""What every encoder does with cells, the cubes that are attended to and hidden: count them, put tokens in place."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dagman.errors import DagmanError

Size = tuple[int, int, int]
SMALLEST_NUMBER = 8


def grid(crop: Size, *, side: int, multiple: int, advice: str) -> Size:
    """Cells (x, y, z) of a crop.

    Args:
        crop: Sides in voxels (x, y, z).
        side: Of a cell, in voxels.
        multiple: What the crop's sides must be multiples of, in voxels.
        advice: What to do about too few cells.

    Raises:
        DagmanError: `E-CROP` where a side is no multiple or the crop has fewer than 8 cells.
    """
    sizes = "x".join(map(str, crop))
    if any(length < multiple or length % multiple for length in crop):
        near = "x".join(str(max(1, math.ceil(length / multiple)) * multiple) for length in crop)
        raise DagmanError("CROP", f"crop {sizes}", f"sides must be multiples of {multiple} voxels", f"choose {near}")
    x, y, z = (length // side for length in crop)
    if x * y * z < SMALLEST_NUMBER:
        problem = f"has {x * y * z} cells of {side} voxels, fewer than {SMALLEST_NUMBER}"
        raise DagmanError("CROP", f"crop {sizes}", problem, advice)
    return x, y, z


def crop_of(images: Tensor) -> Size:
    """Sides in voxels of the crops of a batch.

    Raises:
        ValueError: For what is no (batch, 1, x, y, z).
    """
    if images.ndim != 5 or images.shape[1] != 1:
        raise ValueError(f"an encoder wants crops of shape (batch, 1, x, y, z), not {tuple(images.shape)}")
    return images.shape[2], images.shape[3], images.shape[4]


def learned_token(width: int) -> nn.Parameter:
    """A token that no patch gives: [CLS], or what stands for a hidden patch."""
    token = nn.Parameter(torch.zeros(width))
    nn.init.trunc_normal_(token, std=0.02)
    return token


def replaced(
    patches: Float[Tensor, "batch *places width"],
    hidden: Bool[Tensor, " batch *places"] | None,
    dropped: Bool[Tensor, " batch *places"] | None,
    token: Float[Tensor, " width"] | None,
) -> Float[Tensor, "batch *places width"]:
    """Embedded patches, the hidden ones replaced by the token and the dropped ones by 0.

    Args:
        patches: Right after the embedding.
        hidden: From the student.
        dropped: From the noisy teacher.
        token: None stands for 0.
    """
    zero = patches.new_zeros(())
    if hidden is not None:
        patches = torch.where(hidden[..., None], zero if token is None else token.to(patches.dtype), patches)
    if dropped is not None:
        patches = torch.where(dropped[..., None], zero, patches)
    return patches
