"""Where the features of a table come from: JSON beside its CSV."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dagman import files
from dagman.errors import DagmanError, ExitCode
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


def origin_file(features: Path) -> Path:
    """Beside a feature table."""
    return features.with_suffix(".json")


def refuse_foreign(features: Path) -> None:
    """Refuse to write features, and where they come from, over something else.

    Raises:
        DagmanError: `E-OUTPUT`, exit code 4.
    """
    beside, advice = origin_file(features), "choose another name, such as features.csv"
    if beside == features:
        raise DagmanError("OUTPUT", features, "cannot end in .json", advice, exit_code=ExitCode.REFUSED)
    if features.exists() and not (features.is_file() and _has_features(features)):
        raise DagmanError("OUTPUT", features, "is no table of features", advice, exit_code=ExitCode.REFUSED)
    if beside.exists() and not (beside.is_file() and _is_origin(beside)):
        problem = "does not say where features come from, and would be written over"
        raise DagmanError("OUTPUT", beside, problem, advice, exit_code=ExitCode.REFUSED)


def _has_features(path: Path) -> bool:
    with path.open("rb") as stream:
        return b"f0" in stream.readline().strip().split(b",")


def _is_origin(path: Path) -> bool:
    with path.open("rb") as stream:
        return b'"features_sha256"' in stream.read(100)


def write_origin(origin: Origin, features: Path) -> None:
    """Write where features come from, beside their CSV, which is there already."""
    place = str(origin.weights.absolute()) if origin.weights else None
    values = origin._asdict() | {"weights": place, "seen": origin.seen._asdict()}
    files.write_json(origin_file(features), {"features_sha256": files.sha256_file(features), **values})


def read_origin(features: Path) -> Origin | None:
    """Where features come from; None where nobody wrote it down, it cannot be read, or it tells of other features."""
    try:
        values = json.loads(origin_file(features).read_text())
        if values.pop("features_sha256") != files.sha256_file(features):
            return None
        place = Path(values["weights"]) if values["weights"] else None
        return Origin(**values | {"weights": place, "seen": Seen(**values["seen"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
