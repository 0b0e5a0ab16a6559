"""The four losses of section 3.2 as pure functions; every softmax is at least float32."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SINKHORN_ROUNDS = 3
DENOMINATOR_GUARD = 1e-5
"""Keeps the image term finite where nothing is hidden."""


def at_least_single(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sharpen(
    logits: Float[Tensor, "*rows prototypes"], center: Float[Tensor, "*#rows prototypes"], temperature: float
) -> Float[Tensor, "*rows prototypes"]:
    """The teacher's distribution: centered, sharpened, normalised.

    Args:
        logits: Of the teacher's head.
        center: Running mean of those logits, one for all rows or one a row.
        temperature: tau_t; smaller is sharper.

    Reference: P_t of equations 2-4; appendix A for centering and sharpening.
    """
    return ((at_least_single(logits) - center) / temperature).softmax(dim=-1)


def moved_center(
    center: Float[Tensor, "*places prototypes"], mean: Float[Tensor, "*places prototypes"], momentum: float
) -> Float[Tensor, "*places prototypes"]:
    """The center after one step.

    Args:
        center: Running mean of the teacher's logits.
        mean: Their mean over the tokens of this step.
        momentum: Share of the old center that stays (0.9, as DINO and iBOT).

    Reference: appendix A, centering.
    """
    return center.lerp(mean, 1 - momentum)


def balanced(
    logits: Float[Tensor, "*rows prototypes"],
    center: Float[Tensor, "*#rows prototypes"],
    temperature: float,
    *,
    counted: Bool[Tensor, "*rows"] | None = None,
) -> Float[Tensor, "*rows prototypes"]:
    """The teacher's distributions such that all prototypes are named about equally often over the rows.

    Args:
        logits: Of the teacher's head.
        center: As for `sharpen`; where it is one for all rows, it changes nothing.
        temperature: Smaller is sharper.
        counted: Rows over which prototypes are balanced; all without it.

    Reference: Sinkhorn-Knopp as in SwAV (Caron et al. 2020), three rounds.
    """
    scores = ((at_least_single(logits) - center) / temperature).flatten(0, -2)
    for _ in range(SINKHORN_ROUNDS):
        among = scores if counted is None else scores.masked_fill(~counted.reshape(-1, 1), -math.inf)
        mass = among.logsumexp(dim=0)
        scores = (scores - torch.where(mass.isfinite(), mass, 0)).log_softmax(dim=1)
    return scores.exp().view(logits.shape)


def cross_entropy(
    student_logits: Float[Tensor, "*rows prototypes"],
    teacher_probabilities: Float[Tensor, "*rows prototypes"],
    *,
    temperature: float,
) -> Float[Tensor, "*rows"]:
    """Cross-entropy in nats of the student's distribution against the teacher's, for each row.

    Args:
        student_logits: Of the student's head.
        teacher_probabilities: From `sharpen`.
        temperature: tau_s (0.1, as DINO and iBOT).

    Reference: equations 2 (rows are [CLS] tokens), 3 (cells) and 4 (pooled tokens).
    """
    log_probabilities = (at_least_single(student_logits) / temperature).log_softmax(dim=-1)
    return -(teacher_probabilities * log_probabilities).sum(dim=-1)


def entropy(probabilities: Float[Tensor, "*rows outcomes"]) -> Float[Tensor, "*rows"]:
    """Entropy of each row in nats; 0 log 0 is 0."""
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


def mean_over_hidden(values: Float[Tensor, "views picked"], hidden: Bool[Tensor, "views picked"]) -> Float[Tensor, ""]:
    """Mean over each view's hidden cells, then over the views; a view with none counts as 0.

    Args:
        values: One for each cell that was picked.
        hidden: Which of the picked cells are hidden.

    Reference: equation 3, "averaged on the m_att tokens".
    """
    return ((values * hidden).sum(dim=1) / hidden.sum(dim=1).clamp_min(1)).mean()


def masked_l1(
    prediction: Float[Tensor, " cells *voxels"], images: Float[Tensor, " cells *voxels"]
) -> Float[Tensor, ""]:
    """Mean absolute error over the hidden voxels of a batch; 0 where nothing is hidden.

    Args:
        prediction: Of the student's voxel head for the hidden cells.
        images: The same cells' intensities in [0, 1].

    Reference: equation 5.
    """
    return (at_least_single(prediction) - images).abs().sum() / (prediction.numel() + DENOMINATOR_GUARD)
