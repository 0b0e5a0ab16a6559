"""The ladder: what makes a step fast, each part to be taken away alone. None of it changes a loss.

A rung replaces functions of the package, and is an option nowhere in it.
"""

import functools
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

Replace = Callable[[Any, str, Any], None]


def replace(owner: Any, name: str, value: Any) -> None:
    """For the rest of this process; fails where there is nothing of that name to replace."""
    getattr(owner, name)
    setattr(owner, name, value)


def without_kernel(replace: Replace) -> None:
    """PyTorch's attention, and what `row kernel` takes away."""
    from dagman.nets import kernel

    replace(kernel, "library", lambda: None)


def without_row_kernel(replace: Replace) -> None:
    """PyTorch's LayerNorm and GELU; biases, drop path and sums in passes of their own; no fused MLP either."""
    from dagman.nets import rows

    replace(rows, "runs", lambda _: False)


def without_fused_mlp(replace: Replace) -> None:
    """Products of PyTorch, and what lies between them in memory."""
    from dagman.nets import mlp

    replace(mlp, "runs", lambda _: False)  # asked last


def without_dedup(replace: Replace) -> None:
    """Windows that look alike are computed one by one."""
    from dagman.nets import stage

    replace(stage, "blank_windows", lambda *_, **__: None)


def without_fused_teacher(replace: Replace) -> None:
    """The teacher's attention written out, whatever the student's is."""
    import torch

    from dagman.nets import kernel, window

    takes = kernel.takes
    replace(kernel, "takes", lambda x, tokens: torch.is_grad_enabled() and takes(x, tokens))
    replace(window, "fused_attention", window.explicit_attention)


def without_fused_optimizer(replace: Replace) -> None:
    """AdamW tensor by tensor, clipped in a pass of its own, and the teacher's average too."""
    import torch

    from dagman.train import engine

    made = engine.adamw

    def plain(module: Any) -> Any:
        return torch.optim.AdamW([{**group, "fused": False, "foreach": False} for group in made(module).param_groups])

    def lerp(mine: list[Any], others: list[Any], weight: float) -> None:
        for one, other in zip(mine, others, strict=True):
            one.mul_(1 - weight).add_(weight * other)

    def clip(optimizer: Any, most: float) -> Any:
        given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return torch.nn.utils.clip_grad_norm_(given, most)

    replace(engine, "adamw", plain)
    replace(engine, "clip", clip)
    replace(torch, "_foreach_lerp_", lerp)


def with_denormals(replace: Replace) -> None:
    """Numbers below full precision are kept."""
    import contextlib

    from dagman.train import engine

    replace(engine, "flushed_denormals", contextlib.nullcontext)


def without_tokens_in_place(replace: Replace) -> None:
    """Maps are rolled and cut into windows by copies, and back; merging cuts out each octant.

    Where the kernel does not run, windows are gathered as before.
    """
    import torch

    from dagman.nets import kernel
    from dagman.nets.stage import PatchMerging
    from dagman.nets.window import WindowAttention
    from dagman.nets.windows import effective_window, window_layout

    found = WindowAttention.forward

    def attend(self: Any, x: Any) -> Any:
        batch, *grid, width = x.shape
        layout = window_layout(batch, tuple(grid), self.window, self.shift, x.device)
        if list(layout.padded) != grid or not kernel.takes(x, layout.tokens):
            return found(self, x)
        sides, shifts = effective_window(tuple(grid), self.window, self.shift)
        counts = [side // step for side, step in zip(grid, sides, strict=True)]
        split = [size for pair in zip(counts, sides, strict=True) for size in pair]
        rolled = torch.roll(x, [-step for step in shifts], (1, 2, 3)).view(batch, *split, width)
        windows = rolled.permute(1, 3, 5, 0, 2, 4, 6, 7).reshape(-1, layout.tokens, width)
        # the layout sorts windows by their masks; their first tokens tell where each comes from
        first = layout.order.view(-1, batch * layout.tokens)[:, 0]
        kinds = layout.kinds.view(-1, batch)[first.argsort()].flatten()
        mixed = self.attend(windows, layout._replace(kinds=kinds)).view(*counts, batch, *sides, width)
        return torch.roll(mixed.permute(3, 0, 4, 1, 5, 2, 6, 7).reshape(x.shape), shifts, (1, 2, 3))

    def merge(self: Any, x: Any, *_: Any) -> Any:
        octants = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in octants], dim=-1)))

    replace(WindowAttention, "forward", attend)
    replace(PatchMerging, "forward", merge)


def without_cached_layouts(replace: Replace) -> None:
    """Orders, masks and the index of the bias are made anew in every block."""
    from dagman.nets import stage, window

    for module, name in (
        (stage, "window_layout"),
        (stage, "merge_layout"),
        (window, "window_layout"),
        (window, "relative_position_index"),
    ):
        replace(module, name, getattr(module, name).__wrapped__)


def with_logits_of_all_cells(replace: Replace) -> None:
    """Every cell goes through the layer of K, all at once."""
    from dagman.pretext import comparison
    from dagman.pretext.method import HidingConfig

    replace(comparison, "MOST_LOGITS", sys.maxsize)
    replace(HidingConfig, "most", lambda _, cells, *, attended: cells)  # noqa: ARG005


def with_voxels_of_all_cells(replace: Replace) -> None:
    """Every voxel is predicted and compared; those that the student sees count 0."""
    import torch

    from dagman.pretext import diagnostics, hiding
    from dagman.pretext.codistill import CoDistillation

    def predict(self: Any, final: Any, images: Any, hidden: Any) -> Any:
        hidden = hidden.view(len(hidden), *self.grid)
        counted = hiding.repeat(hidden.flatten(1), self.grid, self.cell_side)[:, None]

        def error(prediction: Any) -> Any:
            wrong = ((prediction.float() - images).abs() * counted).unflatten(0, (2, -1)).flatten(1).sum(dim=1)
            return (wrong / (counted.unflatten(0, (2, -1)).flatten(1).sum(dim=1) + 1e-5)).mean()

        loss = error(self.student.voxel_head(final))
        with torch.no_grad():
            means = diagnostics.visible_mean(hiding.cut(images, self.cell_side), hidden)
            return loss, loss / error(means.view(-1, 1, 1, 1, 1))

    replace(CoDistillation, "_predict", predict)


def without_matrices_cast_once(replace: Replace) -> None:
    """Autocast casts the teacher's matrices at each pass."""
    from dagman.pretext import codistill

    replace(codistill, "Shadow", lambda network: functools.partial(type(network).__call__, network))


def without_both_views_at_once(replace: Replace) -> None:
    """Each view goes through the encoders by itself; what drop path draws is the same."""
    import torch

    from dagman.nets.swin import SwinEncoder
    from dagman.nets.transformer import DropPath
    from dagman.types import Features

    together, draw = SwinEncoder.forward, DropPath.forward
    drawn: deque[Any] = deque()
    views: list[Any] = []

    def encode(
        self: Any, images: Any, hidden: Any = None, dropped: Any = None, *, final_only: bool = False
    ) -> Features:
        views.clear()
        for view in range(2):
            given = [None if each is None else each.chunk(2)[view] for each in (images, hidden, dropped)]
            views.append(together(self, *given, final_only=final_only))
        first = [
            None if pair[0] is None else torch.cat(pair) for pair in zip(*(each[:4] for each in views), strict=True)
        ]
        return Features(*first, tuple(map(torch.cat, zip(*(each.pyramid for each in views), strict=True))))

    def factors(self: Any, items: int, like: Any) -> Any:
        if views:  # the second
            return drawn.popleft() if self.training and self.chance else None
        both = draw(self, 2 * items, like)
        if both is None:
            return None
        drawn.append(both[items:])
        return both[:items]

    replace(SwinEncoder, "forward", encode)
    replace(DropPath, "forward", factors)


def without_inference_mode(replace: Replace) -> None:
    """The teacher's tensors keep what autograd would need to know of them."""
    import torch

    from dagman.pretext.codistill import CoDistillation
    from dagman.pretext.shadow import Shadow

    for owner, name in ((CoDistillation, "_teach"), (Shadow, "__call__")):
        replace(owner, name, torch.no_grad()(getattr(owner, name).__wrapped__))


PLAIN: dict[str, Callable[[Replace], None]] = {
    "kernel": without_kernel,
    "dedup": without_dedup,
    "fused teacher": without_fused_teacher,
    "fused optimizer": without_fused_optimizer,
    "flushed denormals": with_denormals,
}
"""What the variant `plain` lacks."""
RUNGS = PLAIN | {
    "row kernel": without_row_kernel,
    "fused MLP": without_fused_mlp,
    "tokens in place": without_tokens_in_place,
    "cached layouts": without_cached_layouts,
    "logits of hidden cells alone": with_logits_of_all_cells,
    "voxels of hidden cells alone": with_voxels_of_all_cells,
    "matrices cast once": without_matrices_cast_once,
    "both views at once": without_both_views_at_once,
    "inference mode": without_inference_mode,
}
"""What the fast path has; a variant `fast without X` takes one away."""
