"""The 3D vision transformer that the paper sets beside the Swin (appendix A, table 2), with its own [CLS] token."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from dagman.errors import DagmanError
from dagman.nets import cells
from dagman.nets.cells import Size
from dagman.nets.rows import LayerNorm
from dagman.nets.transformer import GlobalBlock, check_heads, check_mlp_ratio, sine_cosine_position
from dagman.types import Features, LoadReport, Preparation


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes of the ViT; the defaults are the paper's. Each patch is a cell."""

    kind: Literal["vit"] = "vit"
    """Tells it from the other encoders."""
    width: int = 768
    """Of every token. A multiple of 6, for the position code."""
    depth: int = 12
    """Blocks."""
    num_heads: int = 8
    patch_side: int = 16
    """Side of a patch in voxels."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over the token's width."""
    drop_path: float = 0.1
    """Chance to skip the last block in training; falls linearly to 0 at the first."""
    hidden_token: Literal["learned", "zero"] = "learned"
    """What stands for a hidden patch."""

    def __post_init__(self) -> None:
        if self.width < 6 or self.width % 6:
            near = max(6, round(self.width / 6) * 6)
            raise DagmanError("CONFIG", "width", f"{self.width} is no multiple of 6", f"choose for example {near}")
        check_mlp_ratio("mlp_ratio", self.mlp_ratio, self.width)
        if self.depth < 1:
            raise DagmanError("CONFIG", "depth", f"cannot be {self.depth}", "give at least 1 block (paper: 12)")
        if self.patch_side < 1:
            raise DagmanError("CONFIG", "patch_side", f"cannot be {self.patch_side}", "give voxels (paper: 16)")
        if not 0 <= self.drop_path < 1:
            raise DagmanError("CONFIG", "drop_path", f"cannot be {self.drop_path}", "choose 0 <= drop_path < 1")
        check_heads("num_heads", self.num_heads, self.width)

    @property
    def cell_side(self) -> int:
        """Side of a cell in voxels."""
        return self.patch_side

    @property
    def cell_width(self) -> int:
        """Width of `Features.tokens` and `Features.cls`."""
        return self.width

    @property
    def final_width(self) -> int:
        """Width of `Features.pooled`."""
        return self.width

    @property
    def final_side(self) -> int:
        """Side in voxels of what a final token, of `Features.pyramid[-1]`, stands for."""
        return self.patch_side

    @property
    def has_cls(self) -> bool:
        """Whether there is a [CLS] token, and its attention."""
        return True

    @property
    def levels(self) -> tuple[int, ...]:
        """Blocks, counted from 1, whose outputs are the pyramid: at each quarter of the depth (3, 6, 9, 12 of 12)."""
        return tuple(sorted({-(-quarter * self.depth // 4) for quarter in (1, 2, 3, 4)}))

    def grid(self, crop: Size) -> Size:
        """Cells (x, y, z) of a crop.

        Args:
            crop: Sides in voxels (x, y, z).

        Raises:
            DagmanError: `E-CROP` where a side is no multiple of the patch's or the crop has fewer than 8 cells.
        """
        return cells.grid(crop, side=self.patch_side, multiple=self.patch_side, advice="choose a larger crop")


class PatchEmbedding(nn.Module):
    """Patches of `side`^3 voxels to tokens."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Linear(side**3, width)

    def forward(self, images: Float[Tensor, "batch 1 x y z"]) -> Float[Tensor, "batch cells width"]:
        """Embed each patch: what a convolution with a stride of the patch does, in half its time on CPUs."""
        batch, _, *sides = images.shape
        x, y, z = (length // self.side for length in sides)
        boxes = images.reshape(batch, x, self.side, y, self.side, z, self.side).permute(0, 1, 3, 5, 2, 4, 6)
        embedded: Tensor = self.proj(boxes.reshape(batch, x * y * z, self.side**3))
        return embedded


class ViTEncoder(nn.Module):
    """A crop to `Features`; the last block's [CLS] row plays the part of semantic attention.

    The final norm is behind everything that losses see, so that each of them trains the whole network.

    Reference: appendix A and table 2; sizes of ViT-B, with 8 heads.
    """

    preparation: Preparation = Preparation()
    """What the images must be: set by whoever trains or loads the encoder, saved with it."""
    report: LoadReport | None = None
    """What was loaded, where the weights came from a file."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config.width, config.patch_side)
        learned = config.hidden_token == "learned"
        self.hidden_token = cells.learned_token(config.width) if learned else None
        self.cls_token = cells.learned_token(config.width)
        self.blocks = nn.ModuleList(
            GlobalBlock(config.width, num_heads=config.num_heads, mlp_ratio=config.mlp_ratio, drop_path=drop_path)
            for drop_path in np.linspace(0, config.drop_path, config.depth).tolist()
        )
        self.norm = LayerNorm(config.width)

    def forward(
        self,
        images: Float[Tensor, "batch 1 x y z"],
        hidden: Bool[Tensor, "batch cells"] | None = None,
        dropped: Bool[Tensor, "batch cells"] | None = None,
        *,
        final_only: bool = False,
    ) -> Features:
        """Encode crops.

        Args:
            images: Intensities in [0, 1]; sides are multiples of the patch's.
            hidden: Cells whose patch the network sees as the hidden token.
            dropped: Cells whose patch becomes zero after the embedding (the noisy teacher).
            final_only: Leave the earlier levels out of the pyramid.

        Raises:
            DagmanError: `E-CROP` for sides that the network cannot divide or too few cells.
            ValueError: For images of another shape.
        """
        grid = self.config.grid(cells.crop_of(images))
        patches = cells.replaced(self.patch_embed(images), hidden, dropped, self.hidden_token)
        position = sine_cosine_position(grid, self.config.width, images.device).to(self.cls_token.dtype)
        placed = patches + position
        x = torch.cat([self.cls_token.expand(len(images), 1, -1), placed], dim=1)
        wanted = () if final_only else self.config.levels[:-1]
        levels = []
        for number, block in enumerate(self.blocks, 1):
            x, attention = block(x)
            if number in wanted:
                levels.append(functional.layer_norm(x[:, 1:], x.shape[-1:]))
        normalised = self.norm(x)
        tokens = normalised[:, 1:]
        return Features(
            tokens=tokens,
            cls=normalised[:, 0],
            attention=attention,
            pooled=tokens.mean(dim=1),
            pyramid=tuple(level.transpose(1, 2).unflatten(2, grid) for level in [*levels, tokens]),
        )
