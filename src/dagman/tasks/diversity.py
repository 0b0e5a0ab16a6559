"""How far attention heads look, and how differently: attention-weighted distances in mm, and entropies.

Reference: paper, section 4.5 and figure 4a: per head the attention-weighted mean distance, per stage the
entropy of those distances across heads, and the mean entropy of the rows.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dagman.nets.encoder import Encoder
from dagman.nets.swin import PATCH_SIDE
from dagman.nets.transformer import GlobalBlock
from dagman.nets.vit import ViTEncoder
from dagman.nets.window import WindowAttention, effective_window, partition, window_layout

ROWS_AT_ONCE = 512
"""Rows of attention among all cells that are held at a time: 32,768 cells have 10^9 pairs a head."""


class Heads(NamedTuple):
    """The heads of a Swin's stage, of semantic attention, or of a ViT's block."""

    place: str
    """`stage 1` to `stage 4`, `semantic attention`, or `block 1` and so on."""
    distance_mm: Float[np.ndarray, " heads"]
    """Attention-weighted mean distance of each head, blocks one after the other."""
    row_entropy: float
    """Mean entropy of the attention rows over the largest that a row can have."""

    @property
    def distance_entropy(self) -> float:
        """Entropy in nats of the heads' distances, each as its share of their sum."""
        share = self.distance_mm / self.distance_mm.sum()
        return float(-(share * np.log(share)).sum())


@torch.inference_mode()
def heads(encoder: Encoder, images: Float[Tensor, "batch 1 x y z"]) -> list[Heads]:
    """Distances and entropies of every head, averaged over rows and images, without a shift's forbidden pairs.

    Args:
        encoder: In eval mode.
        images: Crops in [0, 1], on the encoder's device.
    """
    places = _places(encoder)
    seen: list[tuple[Any, tuple[Any, ...]]] = []
    hooks = [module.register_forward_pre_hook(lambda one, given: seen.append((one, given))) for module in places]
    try:
        encoder(images)
    finally:
        for hook in hooks:
            hook.remove()
    grid = encoder.config.grid((images.shape[2], images.shape[3], images.shape[4]))
    found: dict[str, list[tuple[Tensor, float]]] = {}
    for module, given in seen:
        place, step_mm = places[module]
        measure = _in_windows if isinstance(module, WindowAttention) else _among_cells
        found.setdefault(place, []).append(measure(module, *given, grid=grid, step_mm=step_mm))
    return [
        Heads(place, torch.cat([far for far, _ in parts]).cpu().numpy(), float(np.mean([share for _, share in parts])))
        for place, parts in found.items()
    ]


def _places(encoder: Encoder) -> dict[nn.Module, tuple[str, float]]:
    """The modules that attend, each with its place and the distance between its tokens in mm."""
    voxel, cell = encoder.preparation.spacing_mm, encoder.preparation.spacing_mm * encoder.config.cell_side
    if isinstance(encoder, ViTEncoder):
        return {block: (f"block {number}", cell) for number, block in enumerate(encoder.blocks, 1)}
    windows = {
        block.attn: (f"stage {number}", voxel * PATCH_SIDE * 2 ** (number - 1))
        for number, stage in enumerate(encoder.stages, 1)
        for block in stage.blocks  # type: ignore[union-attr]
    }
    blocks = encoder.semantic_attention.blocks if encoder.config.has_cls else ()
    return windows | dict.fromkeys(blocks, ("semantic attention", cell))


def _in_windows(
    module: WindowAttention, x: Tensor, *, grid: tuple[int, int, int], step_mm: float
) -> tuple[Tensor, float]:
    del grid
    here = (x.shape[1], x.shape[2], x.shape[3])
    layout = window_layout(x.shape[0], here, module.window, module.shift, x.device)
    windows = partition(x, layout)
    count, tokens, width = windows.shape
    query, key, _ = module.qkv(windows).view(count, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    logits = (query * (width // module.num_heads) ** -0.5 @ key.transpose(-2, -1)).float() + module.bias(tokens)
    most = torch.full((count, tokens), math.log(tokens), device=x.device)
    for start, stop, mask in layout.masks:
        logits[start:stop] += mask
        most[start:stop] = (mask == 0).sum(dim=-1).log()
    sides, _ = effective_window(here, module.window, module.shift)
    return _measured(logits.softmax(dim=-1), _distances(sides, step_mm).to(x.device), most[:, None])


def _among_cells(
    module: GlobalBlock,
    x: Tensor,
    position: Tensor | None = None,
    *,
    grid: tuple[int, int, int],
    step_mm: float,
) -> tuple[Tensor, float]:
    """Cells among each other, without [CLS], which has no place."""
    query, key, _ = (part[:, :, 1:] for part in module.heads_of(x, position))
    cells = query.shape[2]
    most = torch.full((1, 1, 1), math.log(cells), device=x.device)
    far, share = 0.0, 0.0
    for image in range(len(x)):
        for start in range(0, cells, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            part = query[image : image + 1, :, rows] * query.shape[-1] ** -0.5
            attention = (part @ key[image : image + 1].transpose(-2, -1)).float().softmax(dim=-1)
            found, entropy = _measured(attention, _distances(grid, step_mm, rows).to(x.device), most)
            weight = attention.shape[2] / cells / len(x)
            far, share = far + weight * found, share + weight * entropy
    return torch.as_tensor(far), share


def _distances(sides: tuple[int, int, int], step_mm: float, rows: slice = slice(None)) -> Tensor:
    places = torch.tensor(list(itertools.product(*map(range, sides))), dtype=torch.float32)
    return step_mm * torch.cdist(places[rows], places)


def _measured(attention: Tensor, distance_mm: Tensor, most: Tensor) -> tuple[Tensor, float]:
    """Mean distance of each head, and mean entropy of the rows over `most`."""
    far = (attention * distance_mm).sum(dim=-1).mean(dim=(0, 2))
    rows = -torch.xlogy(attention, attention).sum(dim=-1)
    return far, float((rows / most.clamp_min(1e-9)).mean())
