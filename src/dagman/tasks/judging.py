"""A stored case beside its reference: on the store's voxels while learning, on the scan's own in the end."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from dagman.ct import grid
from dagman.ct.store import PreparedStore
from dagman.tasks import segment, segmentation_scores
from dagman.tasks.classes import Classes
from dagman.tasks.segmentation_scores import Row
from dagman.types import Grid


class Judged(NamedTuple):
    """What was found in a scan, on its own voxels."""

    numbers: UInt8[np.ndarray, "x y z"]
    """Of the classes, in the order of the scan's file."""
    grid: Grid
    rows: list[Row]


def reference(store: PreparedStore, row: int, classes: Classes) -> UInt8[np.ndarray, "x y z"]:
    """Class numbers of a case's mask on the store's voxels."""
    mask = store.mask(row)
    assert mask is not None
    return classes.numbers(mask)


def on_store(
    likely: Float32[np.ndarray, "classes x y z"], store: PreparedStore, row: int, classes: Classes
) -> list[Row]:
    """Scores on the store's voxels: cheap, and near enough to choose a step by."""
    said, side = store.rows[row], float(store.settings["spacing_mm"])
    return segmentation_scores.compare(
        likely.argmax(axis=0).astype(np.uint8),
        reference(store, row, classes),
        classes,
        (side, side, side),
        case_id=said["case_id"],
        patient=said.get("patient"),
        on="store",
    )


def on_scan(likely: Float32[np.ndarray, "classes x y z"], store: PreparedStore, row: int, classes: Classes) -> Judged:
    """What `segment predict` would write, and what `segment score` would say of it beside the label file as drawn.

    Where the store does not keep that (one of an earlier version), scores are those on the store's voxels.

    Args:
        likely: Probability of each class, background first, on the store's voxels.
        store: What the case lies in.
        row: Of the store.
        classes: Of the segmentation.
    """
    said = store.rows[row]
    own = own_grid(said)
    numbers = segment.most_likely(likely, np.array(said["affine"]), own)
    drawn = store.drawn(row)
    if drawn is None:
        return Judged(numbers, own, on_store(likely, store, row, classes))
    turned, affine = grid.to_ras(numbers, own.affine)
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    rows = segmentation_scores.compare(
        turned,
        classes.numbers(drawn),
        classes,
        (float(x), float(y), float(z)),
        case_id=said["case_id"],
        patient=said.get("patient"),
    )
    return Judged(numbers, own, rows)


def own_grid(said: dict[str, Any]) -> Grid:
    """The file's own voxels; turned to RAS+ in stores that do not know them."""
    x, y, z = said.get("own_shape") or said["source_shape"]
    return Grid((x, y, z), np.array(said.get("own_affine") or said["source_affine"]))
