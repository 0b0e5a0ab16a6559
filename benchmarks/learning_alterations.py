"""What a run may differ in that no setting changes: initial values, targets, weights that change on the way.

Each is a change of the package for one process, asked for by `learning_curve.py --alter NAME`; none of them is kept.
Those that change on the way count passes of their process: run them without a stop.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dagman.nets.heads import VoxelHead
from dagman.nets.swin import SemanticAttention, SwinEncoder
from dagman.pretext.codistill import CoDistillation

HALF = 75
"""Passes after which a weight changes: half of a run of 150 steps, less the two that measure what a pair takes."""


def after(owner: Any, method: str, change: Callable[..., None]) -> None:
    """Let `change(self)` follow each call of a method."""
    before = getattr(owner, method)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = before(self, *args, **kwargs)
        change(self)
        return result

    setattr(owner, method, changed)


def voxel_head_of_torch() -> None:
    """The voxel head starts as torch's linear layers do, and not at the mean intensity with small weights."""
    after(VoxelHead, "__init__", lambda head: head.linear.reset_parameters())


def large_tokens() -> None:
    """Hidden and [CLS] token start ten times as large (standard deviation .2)."""

    def enlarge(encoder: SwinEncoder) -> None:
        for token in (encoder.hidden_token, encoder.semantic_attention.cls_token):
            nn.init.trunc_normal_(token, std=0.2)

    after(SwinEncoder, "__init__", enlarge)


def small_semantic_attention() -> None:
    """The layers of semantic attention start small (standard deviation .02, biases 0), as vision transformers do."""

    def shrink(attention: SemanticAttention) -> None:
        for layer in attention.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    after(SemanticAttention, "__init__", shrink)


def normalised_target() -> None:
    """The image term predicts each cell less its mean, over its standard deviation (MAE)."""
    predict = CoDistillation._predict

    def changed(self: CoDistillation, final: Tensor, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        side = self.cell_side
        blocks = images
        for axis in (2, 3, 4):
            blocks = blocks.unfold(axis, side, side)
        deviation, mean = torch.std_mean(blocks, dim=(-3, -2, -1))
        wide = [
            part.repeat_interleave(side, 2).repeat_interleave(side, 3).repeat_interleave(side, 4)
            for part in (mean, deviation)
        ]
        return predict(self, final, (images - wide[0]) / (wide[1] + 1e-3), hidden)

    CoDistillation._predict = changed  # type: ignore[method-assign]


def _first_half_without(*terms: str) -> None:
    weigh, passes = CoDistillation._weigh, [0]

    def changed(self: CoDistillation, values: Any) -> Any:
        passes[0] += self.training
        early = passes[0] <= HALF
        return weigh(self, {name: value * 0 if early and name in terms else value for name, value in values.items()})

    CoDistillation._weigh = changed  # type: ignore[method-assign]


def distillation_late() -> None:
    """The first half of the run has the image term only."""
    _first_half_without("ampd", "aitd", "gitd")


def image_late() -> None:
    """The first half of the run has no image term."""
    _first_half_without("amip")


def momentum_warm_up() -> None:
    """The teacher's momentum is at most (1 + step) / (10 + step)."""
    update, steps = CoDistillation.update_teacher, [0]

    def changed(self: CoDistillation, momentum: float) -> None:
        steps[0] += 1
        update(self, min(momentum, (1 + steps[0]) / (10 + steps[0])))

    CoDistillation.update_teacher = changed  # type: ignore[method-assign]


ALTERATIONS: dict[str, Callable[[], None]] = {
    change.__name__.replace("_", "-"): change
    for change in (
        voxel_head_of_torch,
        large_tokens,
        small_semantic_attention,
        normalised_target,
        distillation_late,
        image_late,
        momentum_warm_up,
    )
}
