"""Learning itself: a short run on phantoms must still wake what docs/learning.md shows waking.

The bands hold for seeds 0, 1 and 2 (`benchmarks/learning_broken.py` runs all three); one is enough to see a change.
"""

import os
from pathlib import Path

import numpy as np
import pytest

from dagman import config, files, recipes
from dagman.ct import phantom
from dagman.ct.store import FORMAT, PreparedStore, array_path, write_array
from dagman.train.pretrain import pretrain

STEPS, VOLUMES = 100, 12
SEED = int(os.environ.get("LEARNING_SEED", "0"))
FIGURES = os.environ.get("LEARNING_FIGURES")
"""Where to write what is held to the bands."""


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    folder = tmp_path_factory.mktemp("phantoms")
    rows = []
    for case in range(VOLUMES):
        made = phantom.make(0, case, spacing_mm=(2.0, 2.0, 2.0), shape=(150, 130, 90))
        path = array_path(folder, "volumes", f"phantom_{case}", "npy")
        write_array(path, made.volume.hu)
        rows.append(
            {
                "case_id": f"phantom_{case}",
                "shape": list(made.volume.hu.shape),
                "affine": made.volume.affine.tolist(),
                "bytes": path.stat().st_size,
                "sha256": files.sha256_file(path),
                "mask": None,
            }
        )
    settings = {"format": FORMAT, "storage": "npy", "spacing_mm": 2.0, "resampling": "antialiased"}
    files.write_json(folder / "prepare.json", settings)
    files.write_text(folder / "manifest.jsonl", "".join(map(files.json_line, rows)))
    return PreparedStore(folder)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_run_learns(phantoms: PreparedStore, tmp_path: Path) -> None:
    recipe = recipes.with_length(recipes.get("dagman-tiny"), STEPS, None)
    pretrain(config.override(recipe, {"optimisation.seed": SEED}), phantoms, tmp_path / "run", device="cpu")
    rows = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == STEPS

    def mean(name: str, part: slice) -> float:
        return float(np.mean([row[name] for row in rows[part]]))

    first, last = slice(0, 5), slice(-20, None)
    spreads, terms = ("pooled_spread", "tokens_spread", "cls_spread"), ("ampd", "aitd", "gitd")
    examined = [row for row in rows if row.get("ampd_image_nats") is not None]
    assert [row["step"] for row in examined] == [1, STEPS]
    told = examined[-1]
    found = {"image_error_ratio at first": mean("image_error_ratio", first)}
    found |= {name: mean(name, last) for name in ("image_error_ratio", *spreads, "attention_entropy")}
    found |= {f"{term}_loss_ratio": mean(f"{term}_loss_ratio", last) for term in terms}
    found |= {name: told[name] for name in told if name.endswith("_nats")}
    if FIGURES:
        files.write_json(Path(FIGURES), found)

    assert found["image_error_ratio at first"] > 1.05, "an untrained network is worse than the visible mean"
    assert 0.4 < found["image_error_ratio"] < 0.85, "the image term learns"
    for name in spreads:
        assert 0.5 < found[name] < 0.97, f"{name}: no collapse, and no random directions"
    for term, most in zip(terms, (0.85, 0.9, 0.9), strict=True):
        assert found[f"{term}_loss_ratio"] < most, f"{term}: the student follows the teacher"
    assert found["attention_entropy"] < min(0.99, mean("attention_entropy", first)), "attention leaves uniform"
    assert 0.9 < mean("hidden_dropped_excess", last) < 1.1, "hiding does not follow the noise"
    assert told["ampd_image_nats"] > 4 * told["ampd_position_nats"], "patch targets tell of the image, not of the place"
    for term in ("aitd", "gitd"):
        assert told[f"{term}_image_nats"] > 1.5, f"{term}: targets tell images apart"
        assert told[f"{term}_within_nats"] > 0.8, f"{term}: and places of one volume"
    assert "ALARM" not in (tmp_path / "run" / "log.txt").read_text()
