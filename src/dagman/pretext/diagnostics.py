"""What is watched beside the losses: entropies, attention, and whether the features collapse."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from dagman.pretext import losses
from dagman.types import Features

RANK_ROWS = 128
"""Vectors of which the effective rank is taken: enough to see a collapse, cheap at any size."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

MEANINGS: Mapping[str, str] = {
    "hidden_ratio": "share of the cells hidden from the student",
    "padding_ratio": "share of the voxels that lie outside the stored volumes",
    "hidden_dropped_ratio": "share of the hidden cells that the teacher had dropped as well",
    "hidden_dropped_excess": "that share / the share of all cells that the teacher had dropped; 1 is unrelated",
    "aitd_loss_ratio": "AITD / ln K; 1 is a student that knows nothing, or a teacher that says nothing",
    "ampd_loss_ratio": "AMPD / ln K over the views of which anything is hidden",
    "gitd_loss_ratio": "GITD / ln K",
    "aitd_teacher_entropy": "mean entropy of the teacher's [CLS] distributions / ln K; 1 is uniform, 0 one-hot",
    "aitd_student_entropy": "the same of the student's",
    "ampd_teacher_entropy": "mean entropy of the teacher's distributions for hidden cells / ln K",
    "ampd_student_entropy": "the same of the student's",
    "gitd_teacher_entropy": "mean entropy of the teacher's pooled distributions / ln K",
    "gitd_student_entropy": "the same of the student's",
    **{
        f"{term}_{side}_variety": f"how far the {side}'s {what} distributions tell rows apart; 0: the same for all"
        for term, what in {"aitd": "[CLS]", "ampd": "cells'", "gitd": "pooled"}.items()
        for side in ("teacher", "student")
    },
    **{
        f"{term}_center_size": "root mean square of the head's center / that of the batch's mean teacher logits; not "
        "there where balancing takes a shared center away"
        for term in ("aitd", "ampd", "gitd")
    },
    "attention_hidden_ratio": "share of the guiding attention on cells hidden from the student",
    "attention_entropy": "mean entropy of the guiding attention rows / ln N; 1 is uniform",
    "attention_peak": "mean over views of N times the largest attention; 1 is uniform",
    "attention_dropped_ratio": "share of the guiding attention on cells dropped from the teacher",
    "pooled_spread": "spread of the student's pooled features: 0 where all are the same, 1 in random directions",
    "cls_spread": "the same of its [CLS] tokens",
    "tokens_spread": "the same of its cell tokens, over all cells and views",
    "pooled_effective_rank": "effective rank of the student's pooled features, at most the number of views",
    "tokens_effective_rank": f"effective rank of {RANK_ROWS} of its cell tokens, evenly picked",
    "image_error_ratio": "error of the image term / that of predicting each view's visible mean; below 1 is learning",
}
"""Name in `Outcome.diagnostics` -> what it is. A name is absent where the recipe lacks its head, loss or noise; a value
about hidden cells is NaN where every view of the batch was left whole."""


def spread(vectors: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
    """Standard deviation of unit vectors over rows, averaged over dimensions, times sqrt(width).

    Args:
        vectors: Features, of any length.
    """
    unit = functional.normalize(losses.at_least_single(vectors), dim=1)
    return unit.std(dim=0, correction=0).mean() * math.sqrt(unit.shape[1])


def effective_rank(vectors: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
    """Exponential of the entropy of the normalised singular values, of at most `RANK_ROWS` rows.

    Args:
        vectors: Features; not centered, so that a constant has rank 1; what is not finite counts as 0.

    Reference: Roy and Vetterli 2007; RankMe, Garrido et al. 2023.
    """
    some = vectors
    if len(vectors) > RANK_ROWS:
        # Steps of the golden ratio share no period with the grid of cells, as equal steps would.
        turns = torch.arange(len(vectors), dtype=torch.float64, device=vectors.device) * GOLDEN_RATIO % 1
        some = vectors[turns.argsort()[:RANK_ROWS]]
    some = some.double().nan_to_num(0, 0, 0)
    gram = some @ some.T if len(some) <= some.shape[1] else some.T @ some
    singular = _eigenvalues(gram).clamp_min(0).sqrt()
    return losses.entropy(singular / singular.sum().clamp_min(1e-30)).exp().to(torch.float32)


def _eigenvalues(symmetric: Float[Tensor, "rows rows"]) -> Float[Tensor, " rows"]:
    """On CPUs in one thread: LAPACK takes several times as long with two on matrices of `RANK_ROWS`."""
    threads = torch.get_num_threads()
    if symmetric.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        values: Tensor = torch.linalg.eigvalsh(symmetric)
        return values
    finally:
        torch.set_num_threads(threads)


class Told(NamedTuple):
    """Sums over distributions: those of the chunks of a batch add up to its own."""

    rows: Float[Tensor, ""]
    """Rows that were counted."""
    entropy: Float[Tensor, ""]
    """Nats."""
    mass: Float[Tensor, " prototypes"]
    """Of each prototype."""

    def __add__(self, other: "Told") -> "Told":  # type: ignore[override]
        return Told(*(mine + others for mine, others in zip(self, other, strict=True)))


@torch.no_grad()
def told(probabilities: Float[Tensor, "rows prototypes"], counted: Bool[Tensor, " rows"] | None = None) -> Told:
    """What rows of distributions over K prototypes say, summed in their own precision.

    No matrix product: autocast would round it to bfloat16, in which a uniform teacher of 32 rows reads .9983 of ln K.

    Args:
        probabilities: One distribution a row.
        counted: Rows to count; all without it.
    """
    weight = torch.ones_like(probabilities[:, 0]) if counted is None else counted.to(probabilities.dtype)
    return Told(
        weight.sum(),
        (weight * losses.entropy(probabilities)).sum(),
        (weight[:, None] * probabilities).sum(dim=0),
    )


def entropy_share(said: Told) -> Float[Tensor, ""]:
    """Mean entropy of the rows over its maximum, ln K; NaN without rows."""
    return said.entropy / said.rows / math.log(len(said.mass))


@torch.no_grad()
def size(values: Tensor) -> Float[Tensor, ""]:
    """Root mean square, not quite 0."""
    return values.square().mean().sqrt().clamp_min(1e-12)


def variety(said: Told) -> Float[Tensor, ""]:
    """Mutual information of row and prototype over the largest that so many rows and prototypes allow; or NaN."""
    total = said.rows
    between, within = losses.entropy(said.mass / total), said.entropy / total
    most = total.clamp(max=len(said.mass)).log().clamp_min(math.log(2))
    return ((between - within) / most).clamp_min(0)


def visible_mean(
    cells: Float[Tensor, "batch x y z side side side"], hidden: Bool[Tensor, "batch x y z"]
) -> Float[Tensor, " batch"]:
    """The prediction to beat: the mean of each view's visible voxels.

    Args:
        cells: Intensities in [0, 1], from `hiding.cut`.
        hidden: On cells.
    """
    means = cells.mean(dim=(4, 5, 6)) * ~hidden
    return means.flatten(1).sum(dim=1) / (~hidden).flatten(1).sum(dim=1).clamp_min(1)


@torch.no_grad()
def of_features(features: Features) -> dict[str, Tensor]:
    """Spread and effective rank of what an encoder returned."""
    tokens = features.tokens.flatten(0, 1)
    found = {
        "pooled_spread": spread(features.pooled),
        "tokens_spread": spread(tokens),
        "pooled_effective_rank": effective_rank(features.pooled),
        "tokens_effective_rank": effective_rank(tokens),
    }
    return found if features.cls is None else found | {"cls_spread": spread(features.cls)}


@torch.no_grad()
def of_hiding(
    hidden: Bool[Tensor, "batch cells"],
    dropped: Bool[Tensor, "batch cells"] | None,
    attention: Float[Tensor, "batch cells"] | None,
) -> dict[str, Tensor]:
    """How much was hidden, how peaked the guiding attention is, and how both meet the teacher's noise.

    Shares of hidden cells are NaN where nothing is hidden.
    """
    found = {"hidden_ratio": hidden.float().mean()}
    if dropped is not None:
        found["hidden_dropped_ratio"] = (hidden & dropped).sum() / hidden.sum()
        found["hidden_dropped_excess"] = found["hidden_dropped_ratio"] / dropped.float().mean()
    if attention is not None:
        cells = attention.shape[1]
        found["attention_entropy"] = losses.entropy(attention).mean() / math.log(cells)
        found["attention_peak"] = attention.amax(dim=1).mean() * cells
        found["attention_hidden_ratio"] = (attention * hidden).sum(dim=1).mean()
    if attention is not None and dropped is not None:
        found["attention_dropped_ratio"] = (attention * dropped).sum(dim=1).mean()
    return found
