"""Learning itself: a short run on phantoms must still wake what docs/learning.md shows waking."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagman import config, files, recipes
from dagman.ct import phantom
from dagman.ct.store import FORMAT, PreparedStore, array_path, write_array
from dagman.train.pretrain import pretrain

STEPS, VOLUMES = 90, 12


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
@pytest.mark.parametrize("seed", [0])
def test_a_short_run_learns(phantoms: PreparedStore, tmp_path: Path, seed: int) -> None:
    recipe = recipes.with_length(recipes.get("dagman-tiny"), STEPS, None)
    changes: dict[str, Any] = {"data.window_hu": "-1000,400", "optimisation.batch_size": 8, "optimisation.seed": seed}
    # With it the image term and attention move within so few small batches; with zeros only the distillation does.
    changes["encoder.hidden_token"] = "learned"
    recipe = config.override(recipe, changes)
    pretrain(replace(recipe, recipe="learning"), phantoms, tmp_path / "run", device="cpu")
    rows = files.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == STEPS

    def mean(name: str, part: slice) -> float:
        return float(np.mean([row[name] for row in rows[part]]))

    first, last = slice(0, 5), slice(-20, None)
    assert mean("image_error_ratio", first) > 1.05, "an untrained network is worse than the visible mean"
    assert 0.4 < mean("image_error_ratio", last) < 0.97, "the image term learns"
    for name in ("pooled_spread", "tokens_spread", "cls_spread"):
        assert mean(name, last) > 0.3, f"{name}: no collapse"
    assert mean("ampd_loss_ratio", last) < 0.985, "the student follows the teacher's cells"
    assert mean("attention_entropy", last) < mean("attention_entropy", first), "attention leaves uniform"
    assert 0.8 < mean("hidden_dropped_excess", last) < 1.2, "hiding does not follow the noise"
    examined = [row for row in rows if row.get("ampd_image_nats") is not None]
    assert [row["step"] for row in examined] == [1, STEPS]
    assert examined[-1]["ampd_image_nats"] > 2 * examined[-1]["ampd_position_nats"], "patch targets tell of the image"
    assert min(examined[-1][f"{term}_image_nats"] for term in ("aitd", "gitd")) > 0.05, "no target is uniform"
    assert "ALARM" not in (tmp_path / "run" / "log.txt").read_text()
