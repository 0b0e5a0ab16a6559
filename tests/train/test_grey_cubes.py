"""Grey cubes without Hounsfield units: pretraining sees them as every use of the encoder does."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_run import small

from dagman.ct.datasets import ViewsDataset, collate, show
from dagman.ct.prepare import PrepareConfig, prepare
from dagman.ct.sources.medmnist_files import WINDOW_HU
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.nets.weights import load_encoder
from dagman.tasks import embed
from dagman.train import pretrain as loop
from dagman.train.job import fitted
from dagman.train.pretrain import PretrainConfig, pretrain
from dagman.types import Preparation

pytestmark = pytest.mark.usefixtures("few_examined", "undrawn")
LUNGS = (-1000.0, 400.0)


def grey(number: int) -> np.ndarray:
    draws = np.random.default_rng(number)
    return draws.integers(0, 256, (4, 28, 28, 28)).astype(np.uint8)


@pytest.fixture(scope="module")
def cubes(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    folder = tmp_path_factory.mktemp("cubes")
    parts = {"train": 0, "val": 1, "test": 2}
    arrays = {f"{part}_images": grey(number) for part, number in parts.items()}
    arrays |= {f"{part}_labels": np.array([[0], [1], [0], [1]], np.uint8) for part in parts}
    np.savez(folder / "cubes.npz", **arrays)
    prepare([folder / "cubes.npz"], folder / "store", PrepareConfig(storage="npy"))
    return PreparedStore(folder / "store")


def lungs() -> PretrainConfig:
    config = small(steps=1)
    return replace(config, data=replace(config.data, window_hu=LUNGS))


def test_pretraining_sees_the_cubes_as_embedding_does(cubes: PreparedStore, tmp_path: Path) -> None:
    pretrain(lungs(), cubes, tmp_path / "run")
    preparation = load_encoder(tmp_path / "run").preparation
    assert preparation.window_hu == WINDOW_HU == embed.suited(cubes, preparation).window_hu
    assert "grey cubes, shown from -175 to 250 HU" in (tmp_path / "run" / "log.txt").read_text()


def test_a_view_holds_the_grey_values_of_the_file(cubes: PreparedStore) -> None:
    data = fitted(lungs(), cubes).data
    dataset = ViewsDataset(cubes, data, 0, [row for row, said in enumerate(cubes.rows) if said["split"] == "train"])
    seen = np.unique(np.rint(255 * show(collate([dataset[0], dataset[1]]), data).u.numpy()))
    assert seen.tolist() == list(range(256))


def test_a_run_of_another_window_is_not_continued(
    cubes: PreparedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "fitted", lambda config, _: config)
        pretrain(lungs(), cubes, tmp_path / "run")
    with pytest.raises(DagmanError, match=r"^E-RESUME .*data\.window_hu"):
        pretrain(lungs(), cubes, tmp_path / "run")


def test_a_store_of_cubes_and_cts_is_refused_before_anything_is_written(cubes: PreparedStore, tmp_path: Path) -> None:
    mixed = PreparedStore(cubes.folder)
    mixed.rows = [{**row, "window_hu": None} if number < 2 else row for number, row in enumerate(cubes.rows)]
    told = r"^E-CONFIG .*: holds 10 grey cubes of -175 to 250 HU and 2 CTs, which cannot be shown in one window; prep"
    with pytest.raises(DagmanError, match=told):
        pretrain(lungs(), mixed, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(DagmanError, match=told):
        embed.suited(mixed, Preparation(window_hu=LUNGS))
