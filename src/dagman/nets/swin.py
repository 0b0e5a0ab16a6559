"""The 3D Swin transformer with semantic attention (paper, section 3.1), weight-compatible with MONAI's Swin."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from dagman.errors import DagmanError
from dagman.nets import cells, rows
from dagman.nets.cells import Size
from dagman.nets.rows import LayerNorm
from dagman.nets.stage import Stage
from dagman.nets.transformer import GlobalBlock, check_heads, check_mlp_ratio, sine_cosine_position
from dagman.types import Features, LoadReport, Preparation

PATCH_SIDE = 2
CROP_MULTIPLE = 32
"""Four mergings of patches of two voxels."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Semantic attention: transformer blocks over all cells of a crop and a [CLS] token."""

    stage: int = 3
    """Acts on the output of this stage, 1 to 4 (paper: 3)."""
    placement: Literal["series", "branch"] = "series"
    """`series`: its tokens go on into the next stage; `branch`: it stands beside the trunk."""
    position: Literal["residual", "attention"] = "residual"
    """Where the fixed position code goes: `residual` adds it to the cells; `attention` to queries and keys alone."""
    query_gain: float = 1.0
    """Factor on the first weights of queries and keys; above 1 attention starts less uniform."""
    num_blocks: int = 2
    num_heads: int = 8
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over the token's width."""

    def __post_init__(self) -> None:
        if not 1 <= self.stage <= 4:
            raise DagmanError("CONFIG", "attention.stage", f"cannot be {self.stage}", "choose 1, 2, 3 or 4")
        if self.query_gain <= 0:
            raise DagmanError("CONFIG", "attention.query_gain", f"cannot be {self.query_gain}", "give a number above 0")
        if self.num_blocks < 1:
            raise DagmanError(
                "CONFIG",
                "attention.num_blocks",
                f"cannot be {self.num_blocks}",
                "give at least 1, or `attention: none` for a Swin without semantic attention",
            )


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Sizes of the Swin; the defaults are the paper's."""

    kind: Literal["swin"] = "swin"
    """Tells it from the other encoders."""
    embed_dim: int = 48
    """Width of a patch token; doubles at each stage. A multiple of 12."""
    depths: tuple[int, int, int, int] = (2, 2, 8, 2)
    """Blocks of each stage."""
    num_heads: tuple[int, int, int, int] = (4, 4, 8, 16)
    window: int = 4
    """Side of an attention window in tokens."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over the token's width."""
    patch_norm: bool = False
    """LayerNorm after the patch embedding."""
    drop_path: float = 0.1
    """Chance to skip the last block in training; falls linearly to 0 at the first."""
    hidden_token: Literal["learned", "zero"] = "learned"
    """What stands for a hidden patch."""
    attention: AttentionConfig | None = AttentionConfig()
    plain_cell_stage: int = 3
    """Without semantic attention: the stage whose output tokens are the cells."""

    def __post_init__(self) -> None:
        if self.embed_dim < 12 or self.embed_dim % 12:
            near = max(12, round(self.embed_dim / 12) * 12)
            raise DagmanError(
                "CONFIG", "embed_dim", f"{self.embed_dim} is no multiple of 12", f"choose for example {near}"
            )
        check_mlp_ratio("mlp_ratio", self.mlp_ratio, self.embed_dim)
        if min(self.depths) < 1:
            raise DagmanError("CONFIG", "depths", f"cannot be {self.depths}", "give every stage at least one block")
        if self.window < 2:
            raise DagmanError("CONFIG", "window", f"cannot be {self.window}", "give at least 2 tokens (paper: 4)")
        if not 0 <= self.drop_path < 1:
            raise DagmanError("CONFIG", "drop_path", f"cannot be {self.drop_path}", "choose 0 <= drop_path < 1")
        if not 1 <= self.plain_cell_stage <= 4:
            raise DagmanError("CONFIG", "plain_cell_stage", f"cannot be {self.plain_cell_stage}", "choose 1, 2, 3 or 4")
        for stage, heads in enumerate(self.num_heads):
            check_heads(f"num_heads of stage {stage + 1}", heads, self.embed_dim << stage)
        if self.attention:
            check_heads("attention.num_heads", self.attention.num_heads, self.cell_width)
            check_mlp_ratio("attention.mlp_ratio", self.attention.mlp_ratio, self.cell_width)

    @property
    def cell_stage(self) -> int:
        """The stage whose output tokens are the cells: semantic attention's where there is one."""
        return self.attention.stage if self.attention else self.plain_cell_stage

    @property
    def patch_side(self) -> int:
        """Side of a patch in voxels."""
        return PATCH_SIDE

    @property
    def cell_side(self) -> int:
        """Side of a cell in voxels."""
        return PATCH_SIDE << self.cell_stage

    @property
    def cell_width(self) -> int:
        """Width of `Features.tokens` and `Features.cls`."""
        return self.embed_dim << self.cell_stage

    @property
    def final_width(self) -> int:
        """Width of `Features.pooled`."""
        return self.embed_dim * 16

    @property
    def final_side(self) -> int:
        """Side in voxels of what a final token, of `Features.pyramid[-1]`, stands for."""
        return CROP_MULTIPLE

    @property
    def has_cls(self) -> bool:
        """Whether there is a [CLS] token, and its attention."""
        return self.attention is not None

    def grid(self, crop: Size) -> Size:
        """Cells (x, y, z) of a crop.

        Args:
            crop: Sides in voxels (x, y, z).

        Raises:
            DagmanError: `E-CROP` where a side is no multiple of 32 or the crop has fewer than 8 cells.
        """
        advice = "choose a larger crop (data.crop 64,64,64) or semantic attention at an earlier stage"
        return cells.grid(crop, side=self.cell_side, multiple=CROP_MULTIPLE, advice=advice)


class PatchEmbedding(nn.Module):
    """Patches of 2x2x2 voxels to tokens."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv3d(1, width, kernel_size=PATCH_SIDE, stride=PATCH_SIDE)
        self.norm = LayerNorm(width) if norm else None

    def forward(self, images: Float[Tensor, "batch 1 x y z"]) -> Float[Tensor, "batch x/2 y/2 z/2 width"]:
        """Embed each patch."""
        x = self._product(images) if rows.is_bare(self.proj, nn.Conv3d) else self.proj(images).movedim(1, -1)
        return self.norm(x) if self.norm else x

    def _product(self, images: Tensor) -> Tensor:
        batch, _, *sides = images.shape
        split = [size for side in sides for size in (side // PATCH_SIDE, PATCH_SIDE)]
        patches = images.reshape(batch, *split).permute(0, 1, 3, 5, 2, 4, 6)
        # a convolution with this stride is a product, which needs no other layout of its result; where the weight lies
        # input by output, its gradient, a sum over all patches, is taken several times as fast and rounded less
        weight = self.proj.weight.flatten(1).t().contiguous().t()
        return functional.linear(patches.flatten(4), weight, self.proj.bias)


class SemanticTokens(NamedTuple):
    """What semantic attention makes of the cells of a crop."""

    residual: Float[Tensor, "batch cells width"]
    """Before the last norm: what goes on into the next stage."""
    tokens: Float[Tensor, "batch cells width"]
    cls: Float[Tensor, "batch width"]
    attention: Float[Tensor, "batch cells"]


class SemanticAttention(nn.Module):
    """Transformer blocks over all cells and a [CLS] token that learns which cells matter.

    Args:
        width: Width of a cell's token.
        config: Number of blocks, heads.

    Reference: section 3.1, equation 1.
    """

    def __init__(self, width: int, config: AttentionConfig) -> None:
        super().__init__()
        self.position = config.position
        self.cls_token = cells.learned_token(width)
        self.blocks = nn.ModuleList(
            GlobalBlock(width, num_heads=config.num_heads, mlp_ratio=config.mlp_ratio, query_gain=config.query_gain)
            for _ in range(config.num_blocks)
        )
        self.norm = LayerNorm(width)

    def forward(self, cells: Float[Tensor, "batch x y z width"]) -> SemanticTokens:
        """Attend over the cells."""
        batch, *grid, width = cells.shape
        position = sine_cosine_position((grid[0], grid[1], grid[2]), width, cells.device).to(self.cls_token.dtype)
        tokens, between = cells.flatten(1, 3), None
        if self.position == "residual":
            tokens = tokens + position
        else:
            between = functional.pad(position, (0, 0, 1, 0))
        x = torch.cat([self.cls_token.expand(batch, 1, width), tokens], dim=1)
        for block in self.blocks:
            x, attention = block(x, between)
        normalised = self.norm(x)
        return SemanticTokens(x[:, 1:], normalised[:, 1:], normalised[:, 0], attention)


class SwinEncoder(nn.Module):
    """A crop to `Features`.

    Reference: section 3.1, figure 1.
    """

    preparation: Preparation = Preparation()
    """What the images must be: set by whoever trains or loads the encoder, saved with it."""
    report: LoadReport | None = None
    """What was loaded, where the weights came from a file."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config.embed_dim, norm=config.patch_norm)
        if config.hidden_token == "learned":
            self.hidden_token = cells.learned_token(config.embed_dim)
        drop_paths = np.linspace(0, config.drop_path, sum(config.depths)).tolist()
        ends = np.cumsum(config.depths).tolist()
        self.stages = nn.ModuleList(
            Stage(
                config.embed_dim << stage,
                num_heads=config.num_heads[stage],
                window=config.window,
                mlp_ratio=config.mlp_ratio,
                drop_paths=drop_paths[end - config.depths[stage] : end],
            )
            for stage, end in enumerate(ends)
        )
        if config.attention:
            self.semantic_attention = SemanticAttention(config.cell_width, config.attention)

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
            images: Intensities in [0, 1]; sides are multiples of 32.
            hidden: Cells whose patches the network sees as the hidden token.
            dropped: Cells whose patches become zero after the embedding (the noisy teacher), or the patches one by one
                in C order.
            final_only: Leave the finer levels out of the pyramid where nothing else needs them.

        Raises:
            DagmanError: `E-CROP` for sides that the network cannot divide or too few cells.
            ValueError: For images of another shape.
        """
        levels, semantic = self.trunk(images, hidden, dropped)
        if final_only and semantic:
            levels = levels[-1:]
        pyramid = tuple(functional.layer_norm(level, level.shape[-1:]) for level in levels)
        return Features(
            tokens=semantic.tokens if semantic else pyramid[self.config.cell_stage].flatten(1, 3),
            cls=semantic.cls if semantic else None,
            attention=semantic.attention if semantic else None,
            pooled=pyramid[-1].mean(dim=(1, 2, 3)),
            pyramid=tuple(level.movedim(-1, 1) for level in pyramid),
        )

    def trunk(
        self,
        images: Float[Tensor, "batch 1 x y z"],
        hidden: Bool[Tensor, "batch cells"] | None = None,
        dropped: Bool[Tensor, "batch cells"] | None = None,
    ) -> tuple[list[Float[Tensor, "batch _ _ _ _"]], SemanticTokens | None]:
        """The five raw levels, channels last, and what semantic attention made of its level.

        A level is taken before semantic attention; in series at stage 4, where no stage follows, the last one after.
        """
        x = self.embed(images, hidden, dropped)
        blank = hidden if dropped is None else dropped
        if blank is not None:
            grid = self.config.grid(cells.crop_of(images))
            blank = _per_patch(blank, grid, x.shape[1] // grid[0])
        levels, semantic = [x], None
        for number, stage in enumerate(self.stages, 1):
            x = stage(x, blank if number == 1 else None)
            levels.append(x)
            if self.config.attention and number == self.config.attention.stage:
                semantic = self.semantic_attention(x)
                if self.config.attention.placement == "series":
                    x = semantic.residual.view(x.shape)
        levels[-1] = x
        return levels, semantic

    def embed(
        self,
        images: Float[Tensor, "batch 1 x y z"],
        hidden: Bool[Tensor, "batch cells"] | None = None,
        dropped: Bool[Tensor, "batch cells"] | None = None,
    ) -> Float[Tensor, "batch x/2 y/2 z/2 width"]:
        """Patch tokens, those of hidden and dropped cells replaced."""
        grid = self.config.grid(cells.crop_of(images))
        x: Tensor = self.patch_embed(images)
        side = x.shape[1] // grid[0]
        hidden, dropped = (None if seen is None else _per_patch(seen, grid, side) for seen in (hidden, dropped))
        return cells.replaced(x, hidden, dropped, getattr(self, "hidden_token", None))


def _per_patch(cells: Tensor, grid: Size, side: int) -> Tensor:
    """Give every patch the value of its cell; what has a value for each patch is taken as it is."""
    if cells.shape[1] == math.prod(grid) * side**3:
        return cells.view(-1, *(cells_along * side for cells_along in grid))
    boxes = cells.view(-1, grid[0], 1, grid[1], 1, grid[2], 1).expand(-1, -1, side, -1, side, -1, side)
    return boxes.reshape(len(cells), *(cells_along * side for cells_along in grid))
