"""How learning rate, weight decay, momentum and temperatures move through a run: pure functions of the step."""

import math


def cosine(step: int, total: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total - 1`, both met exactly.

    Args:
        step: Optimizer step, from 0.
        total: Number of optimizer steps of the run.
        start: Value at the first step.
        end: Value at the last step.

    Reference:
        AttMask's `cosine_scheduler`, for weight decay and the teacher's momentum; the paper gives neither.
    """
    if step >= total - 1:
        return end
    if step <= 0:
        return start
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / (total - 1)))


def warmup_cosine(step: int, total: int, peak: float, end: float, warmup: int) -> float:
    """Linear rise to `peak` at step `warmup - 1`, then half a cosine to `end` at step `total - 1`.

    The first step already learns: it takes `peak / warmup`.

    Args:
        step: Optimizer step, from 0.
        total: Number of optimizer steps of the run.
        peak: Highest value.
        end: Value at the last step.
        warmup: Steps of the rise, 0 for none.

    Reference:
        DAGMaN appendix A (80 of 800 epochs of linear warm-up).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    first = max(warmup - 1, 0)
    return cosine(step - first, total - first, peak, end)


def ramp(step: int, first: int, last: int, start: float, end: float) -> float:
    """`start` up to step `first`, `end` from step `last`, a straight line between.

    Reference:
        The teacher's temperatures: .04 to .07 over 30 epochs in iBOT and AttMask.
    """
    if step >= last:
        return end
    if step <= first:
        return start
    return start + (end - start) * (step - first) / (last - first)


def temperature_steps(total: int, steps_per_epoch: float) -> int:
    """Steps in which a teacher temperature rises: 30 epochs, or 30 % of a run that has fewer than 100 epochs."""
    if total < 100 * steps_per_epoch - 1e-9:
        return max(1, math.floor(0.3 * total + 1e-9))
    return max(1, math.ceil(30 * steps_per_epoch - 1e-9))


def frozen_steps(total: int, steps_per_epoch: float, ratio: float) -> int:
    """Steps in which the heads' last layers get no gradient: one epoch, at most `ratio` of the run.

    Reference:
        AttMask's and DINO's `freeze_last_layer`, one epoch; the bound keeps short runs from freezing for long.
    """
    return min(math.ceil(steps_per_epoch - 1e-9), math.floor(ratio * total + 1e-9))
