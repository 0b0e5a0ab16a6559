"""How far points of classes lie from each other: distances within and between classes, silhouettes, k-NN votes."""

from collections import Counter

import numpy as np
from jaxtyping import Float, Shaped

NEIGHBOURS = 5


def standardised(features: Float[np.ndarray, "crops width"]) -> Float[np.ndarray, "crops width"]:
    """Columns with mean 0 and standard deviation 1; constant columns are 0."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    spread = centred.std(axis=0)
    moving = spread > 1e-9 * np.abs(features).max(axis=0)
    return np.where(moving, centred / np.where(moving, spread, 1.0), 0.0)


def between(points: Float[np.ndarray, "crops width"]) -> Float[np.ndarray, "crops crops"]:
    """Euclidean distances of all pairs."""
    from scipy.spatial.distance import pdist, squareform

    distances: np.ndarray = squareform(pdist(points))
    return distances


def usual(distances: np.ndarray) -> float:
    """Root mean square distance of two different crops."""
    count = len(distances)
    return float(np.sqrt((distances**2).sum() / (count * (count - 1))))


def measured(
    distances: Float[np.ndarray, "crops crops"],
    labels: Shaped[np.ndarray, " crops"],
    structures: Shaped[np.ndarray, " crops"] | None = None,
) -> dict[str, Float[np.ndarray, " crops"]]:
    """Of each crop the mean distance to others of its class, to those of other classes, and its silhouette.

    Args:
        distances: Of all pairs.
        labels: Classes, at least two, with at least two crops each.
        structures: What each crop is of: two crops of one structure overlap, and are no pair. Each of its own without.

    Returns:
        NaN for the distance within a class, and the silhouette, of a crop whose class has no other structure.
    """
    own = np.arange(len(labels)) if structures is None else structures
    names = np.unique(labels)
    same = (labels[:, None] == labels) & (own[:, None] != own)
    within, pairs = (distances * same).sum(axis=1), same.sum(axis=1)
    intra = np.divide(within, pairs, out=np.full(len(labels), np.nan), where=pairs > 0)
    to_class = np.stack([distances[:, labels == name].mean(axis=1) for name in names], axis=1)
    nearest = np.where(labels[:, None] == names, np.inf, to_class).min(axis=1)
    apart = np.maximum(intra, nearest)
    other = labels[:, None] != labels
    return {
        "intra": intra,
        "inter": (distances * other).sum(axis=1) / other.sum(axis=1),
        "silhouette": np.where(apart == 0, 0.0, (nearest - intra) / np.where(apart == 0, 1.0, apart)),
    }


def votes(
    distances: Float[np.ndarray, "crops crops"],
    labels: Shaped[np.ndarray, " crops"],
    groups: Shaped[np.ndarray, " crops"],
    neighbours: int = NEIGHBOURS,
) -> Float[np.ndarray, " crops"]:
    """1 where the nearest crops of other patients vote for a crop's class, 0 where not; a tie goes to the nearest.

    NaN where no other patient has the class: no vote could be right.
    """
    right = np.full(len(labels), np.nan)
    for crop, (label, group) in enumerate(zip(labels, groups, strict=True)):
        others = np.flatnonzero(groups != group)
        if label not in labels[others]:
            continue
        nearest = labels[others[np.argsort(distances[crop, others], kind="stable")[:neighbours]]]
        counts = Counter(nearest.tolist())  # keeps the order of the first vote, and most_common is stable
        right[crop] = counts.most_common(1)[0][0] == label
    return right
