"""Student against teacher, row by row, without ever holding the K-wide logits of many rows at once."""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dagman.pretext import diagnostics, losses
from dagman.pretext.diagnostics import Told

MOST_LOGITS = 2**22
"""That are held at once, where rows need not be balanced against each other: 16 MiB in float32."""


class Rows(NamedTuple):
    """What rows of student and teacher meet: vectors of a head's bottleneck, with what belongs to each."""

    student: Float[Tensor, "rows bottleneck"]
    teacher: Float[Tensor, "rows bottleneck"]
    center: Float[Tensor, "rows prototypes"]
    counted: Bool[Tensor, " rows"] | None
    """Rows that the loss asks about; all where None."""

    def chunk(self, start: int, size: int) -> "Rows":
        """Some of them."""
        return Rows(*(None if each is None else each[start : start + size] for each in self))  # type: ignore[arg-type]


class Compared(NamedTuple):
    """Student against teacher at one head."""

    loss: Tensor
    watched: dict[str, Tensor]
    """Of `diagnostics.MEANINGS`, without the head's name before it."""


class Heads(NamedTuple):
    """From bottlenecks to what is compared."""

    logits: Callable[[Tensor], Tensor]
    """Of the student."""
    targets: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """Of the teacher, from its bottleneck, the center and which rows count: distributions."""
    temperature: float
    """tau_s."""
    balanced: bool
    """Whether targets depend on all rows together."""


def compare(heads: Heads, rows: Rows) -> tuple[Float[Tensor, " rows"], dict[str, Tensor]]:
    """Cross-entropy of each row, and what is watched of both sides.

    Many rows are taken chunk by chunk, and each chunk's logits are made once more for the gradient.
    """
    num = max(1, len(rows.student))
    size = num if heads.balanced else max(1, MOST_LOGITS // rows.center.shape[-1])
    chunks = [rows.chunk(start, size) for start in range(0, num, size)]
    told = functools.partial(_told, heads)
    if len(chunks) == 1:
        values, *sides = told(*rows)
    else:
        found = [checkpoint(told, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        values = torch.cat([part[0] for part in found])
        sides = [functools.reduce(operator.add, [part[side] for part in found]) for side in (1, 2)]
    watched = {}
    for side, said in zip(("teacher", "student"), sides, strict=True):
        watched[f"{side}_entropy"] = diagnostics.entropy_share(said)
        watched[f"{side}_variety"] = diagnostics.variety(said)
    return values, watched


def _told(
    heads: Heads, student: Tensor, teacher: Tensor, center: Tensor, counted: Tensor | None
) -> tuple[Tensor, Told, Told]:
    targets, logits = heads.targets(teacher, center, counted), heads.logits(student)
    values = losses.cross_entropy(logits, targets, temperature=heads.temperature)
    with torch.no_grad():
        guesses = (logits / heads.temperature).softmax(dim=-1)
    return values, diagnostics.told(targets, counted), diagnostics.told(guesses, counted)
