"""A stage of the 3D Swin: blocks of window attention, every second one shifted, and the merging after them."""

import math

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dagman.nets import gpu, rows
from dagman.nets.mlp import MLP
from dagman.nets.rows import LayerNorm, branch_off, join_and_branch_off
from dagman.nets.transformer import DropPath
from dagman.nets.window import WindowAttention
from dagman.nets.windows import (
    blank_windows,
    effective_window,
    in_whole_windows,
    merge_layout,
    partition,
    permute,
    reverse,
    window_layout,
)


class WindowBlock(nn.Module):
    """A pre-norm transformer block whose attention stays within (shifted) windows."""

    def __init__(
        self, width: int, *, num_heads: int, window: int, shift: int, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = WindowAttention(width, num_heads=num_heads, window=window, shift=shift)
        self.drop_path = DropPath(drop_path)
        self.norm2 = LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio))

    def forward(
        self, x: Float[Tensor, "batch x y z width"], blank: Bool[Tensor, "batch x y z"] | None = None
    ) -> Float[Tensor, "batch x y z width"]:
        """Two residual steps.

        Args:
            x: Tokens.
            blank: Tokens of patches that the network does not see, at the first blocks. Windows of nothing else are
                alike and are computed once; the result is the same.
        """
        tokens = self.attn.tokens((x.shape[1], x.shape[2], x.shape[3]))
        triton = gpu.chosen(x, tokens, x.shape[-1] // self.attn.num_heads) == "triton"
        if triton and self._is_bare() and gpu.fuses(x, self.mlp.linear1.out_features):
            return self._forward_on_chip(x, tokens)
        if blank is None or not rows.is_bare(self.attn, WindowAttention):
            return self._forward_all(x)
        return self._forward_once(x, blank)

    def _is_bare(self) -> bool:
        """Whether nobody waits for a part to be called, and each does what its weights say."""
        attn, mlp = self.attn, self.mlp
        parts = (attn, WindowAttention), (mlp, MLP), (self.norm1, LayerNorm), (self.norm2, LayerNorm)
        layers = attn.qkv, attn.proj, mlp.linear1, mlp.linear2
        return all(rows.is_bare(part, kind) for part, kind in parts) and all(map(rows.is_affine, layers))

    def _forward_all(self, x: Tensor) -> Tensor:
        """Every window."""
        x, normalised = branch_off(x, self.norm1)
        return self._add_branches(x, self.attn(normalised), len(x))

    def _add_branches(self, x: Tensor, mixed: Tensor, batch: int, item: Tensor | None = None) -> Tensor:
        """Both residual steps, once attention is done; `item`: the batch item of each row, where rows are windows."""

        def factors() -> Tensor | None:
            drawn: Tensor | None = self.drop_path(batch, x)
            return drawn if drawn is None or item is None else drawn[item]

        x, normalised = join_and_branch_off(x, mixed, self.attn.proj, factors(), self.norm2)
        joined: Tensor = self.mlp(x, normalised, factors())
        return joined

    def _forward_on_chip(self, x: Tensor, tokens: int) -> Tensor:
        """Each residual step as one kernel."""
        attn, mlp = self.attn, self.mlp
        bias, window, shift = attn.bias(tokens), attn.window, attn.shift
        kept = self.drop_path(x.shape[0], x)
        x = gpu.attention_half(x, self.norm1, attn.qkv, bias, attn.proj, kept=kept, window=window, shift=shift)
        return gpu.mlp_half(x, self.norm2, mlp.linear1, mlp.linear2, self.drop_path(x.shape[0], x))

    def _forward_once(self, x: Tensor, blank: Tensor) -> Tensor:
        """Every window that is unlike the others, and one that stands for all that are alike."""
        batch, grid = x.shape[0], (x.shape[1], x.shape[2], x.shape[3])
        layout = window_layout(batch, grid, self.attn.window, self.attn.shift, x.device)
        dropping = self.training and self.drop_path.chance > 0
        alike = None
        if layout.padded == grid:
            alike = blank_windows(blank, layout, for_each_item=dropping or self.attn.shift > 0)
        if alike is None:
            return self._forward_all(x)
        windows = partition(x, layout).index_select(0, alike.unique)
        windows, normalised = branch_off(windows, self.norm1)
        windows = self._add_branches(windows, self.attn.attend(normalised, alike.layout), batch, alike.item)
        return reverse(windows.index_select(0, alike.place), layout, grid)


class PatchMerging(nn.Module):
    """Joins 2x2x2 tokens into one of twice the width; their order comes from outside, as compilers ignore its cache."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(8 * width)
        self.reduction = nn.Linear(8 * width, 2 * width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch x y z width"], order: Int[Tensor, " rows"], inverse: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch x/2 y/2 z/2 2*width"]:
        """Join each token with its neighbours; sides are even, `order` and `inverse` those of `merge_layout`."""
        batch, *sides, width = x.shape
        joined = permute(x.reshape(-1, width), order, inverse).view(batch, *(side // 2 for side in sides), 8 * width)
        merged: Tensor = self.reduction(self.norm(joined))
        return merged


class Stage(nn.Module):
    """Blocks with windows in place and shifted in turn, then merging.

    Args:
        width: Features of a token; merging doubles them.
        num_heads: Attention heads; divides `width`.
        window: Side of a window in tokens.
        mlp_ratio: Hidden width of the MLPs over `width`.
        drop_paths: Chance that a block is left out in training, for each block.
    """

    def __init__(self, width: int, *, num_heads: int, window: int, mlp_ratio: float, drop_paths: list[float]) -> None:
        super().__init__()
        self.window, self.head_width = window, width // num_heads
        self.blocks = nn.ModuleList(
            WindowBlock(
                width,
                num_heads=num_heads,
                window=window,
                shift=window // 2 if block % 2 else 0,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
            )
            for block, drop_path in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(width)

    def forward(
        self, x: Float[Tensor, "batch x y z width"], blank: Bool[Tensor, "batch x y z"] | None = None
    ) -> Float[Tensor, "batch x/2 y/2 z/2 2*width"]:
        """From one level of the pyramid to the next; `blank` marks tokens of the first stage that are all alike."""
        grid = (x.shape[1], x.shape[2], x.shape[3])
        tokens = math.prod(effective_window(grid, self.window, 0)[0])
        if blank is not None and gpu.chosen(x, tokens, self.head_width) == "triton":
            blank = None  # to count blank windows would cost more than it saves, and stop a recording
        for number, block in enumerate(self.blocks):
            x = block(x, blank if number < 2 else None)
            if number == 0 and blank is not None and len(self.blocks) > 1:
                layout = window_layout(x.shape[0], grid, self.window, 0, x.device)
                blank = in_whole_windows(blank, layout) if layout.padded == grid else None
        merged: Tensor = self.downsample(x, *merge_layout(x.shape[0], grid, x.device))
        return merged
