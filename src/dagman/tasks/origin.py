"""Where the features of a table come from: JSON beside its CSV."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dagman import files
from dagman.tasks.leakage import Seen

if TYPE_CHECKING:
    from dagman.nets.classifier import Which


class Origin(NamedTuple):
    """Where a feature table comes from."""

    weights: Path | None
    """None for an encoder with random weights."""
    which: "Which"
    store: str
    """Its identity."""
    seen: Seen
    """What pretraining saw of the cases."""
    twins: list[list[str]]
    """Cases with the same voxels."""
    masks: int
    """Cases with a mask, seen by the crop around it."""
    weights_sha256: str | None
    """Of their file: that of a run which went on is another."""
    cases: list[dict[str, Any]]
    """What `leakage.record` keeps of each."""
    preparation: dict[str, Any] | None = None
    """How they were shown; None where an earlier version wrote it."""
    crop_mm: list[float] | None = None
    """As `crops.sides_mm`."""
    crops_around: str | None = None
    """As `crops.around`; None where an earlier version wrote it, too."""
    encoder: dict[str, Any] | None = None
    """Its sizes; None where an earlier version wrote it, too."""


def write_origin(origin: Origin, features: Path) -> None:
    """Write where features come from, beside their CSV, which is there already."""
    place = str(origin.weights.absolute()) if origin.weights else None
    values = origin._asdict() | {"weights": place, "seen": origin.seen._asdict()}
    files.write_json(features.with_suffix(".json"), {"features_sha256": files.sha256_file(features), **values})


def read_origin(features: Path) -> Origin | None:
    """Where features come from; None where nobody wrote it down, it cannot be read, or it tells of other features."""
    try:
        values = json.loads(features.with_suffix(".json").read_text())
        if values.pop("features_sha256") != files.sha256_file(features):
            return None
        place = Path(values["weights"]) if values["weights"] else None
        return Origin(**values | {"weights": place, "seen": Seen(**values["seen"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
