"""MedMNIST3D: the official file, and files made to the shape of every set, whole and broken."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dagman.cli import run
from dagman.ct.index import index
from dagman.ct.read import read
from dagman.ct.sources.medmnist import INFO
from dagman.ct.sources.medmnist_files import WINDOW_HU, hounsfield
from dagman.ct.store import PreparedStore


def arrays(counts: tuple[int, int, int] = (5, 2, 3), side: int = 28, classes: int = 2) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(3)
    content = {}
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        content[f"{part}_images"] = draw.integers(0, 256, (count, side, side, side)).astype(np.uint8)
        content[f"{part}_labels"] = (np.arange(count) % classes).astype(np.uint8)[:, None]
    return content


def blank(counts: tuple[int, int, int], classes: int) -> dict[str, np.ndarray]:
    """A file of the true counts, quick to write."""
    whole = arrays(counts, side=2, classes=classes)
    return whole | {key: np.zeros_like(value) for key, value in whole.items() if key.endswith("images")}


def save(path: Path, **changes: Any) -> Path:
    content = {key: value for key, value in (arrays() | changes).items() if value is not None}
    np.savez_compressed(path, **content)
    return path


def problem(path: Path) -> str:
    scans, problems = index([path])
    assert scans == []
    assert len(problems) == 1
    assert not problems[0].ignored
    return str(problems[0])


def test_windowing_gives_grey_values_back() -> None:
    grey = np.arange(256, dtype=np.uint8)
    low, high = WINDOW_HU
    back = np.clip((hounsfield(grey) - low) / (high - low), 0, 1)
    assert np.abs(back - grey / 255).max() <= 0.5 / (high - low)
    assert (np.rint(back * 255) == grey).all()


def test_every_item_keeps_its_class_split_and_voxels(tmp_path: Path) -> None:
    path = save(tmp_path / "cubes.npz")
    scans, problems = index([path])
    assert [(scan.split, scan.label) for scan in scans if scan.split != "train"] == [
        *(("test", "0"), ("test", "1"), ("test", "0")),
        *(("validation", "0"), ("validation", "1")),
    ]
    assert [scan.case_id for scan in scans if scan.split == "train"] == [
        f"cubes-train-{number:04d}" for number in range(5)
    ]
    assert all(scan.patient is None for scan in scans)
    assert "whose an item is stays unknown" in str(problems[0])
    [last] = [scan for scan in scans if scan.case_id == "cubes-val-0001"]
    assert (read(last).hu == hounsfield(arrays()["val_images"][1])).all()


@pytest.mark.parametrize("axis", [1, 4])
def test_a_channel_axis_of_one_is_dropped(tmp_path: Path, axis: int) -> None:
    images = {key: np.expand_dims(value, axis) for key, value in arrays().items() if key.endswith("images")}
    scans, _ = index([save(tmp_path / "cubes.npz", **images)])
    assert (read(scans[0]).hu == hounsfield(arrays()["test_images"][0])).all()


def test_labels_without_their_second_axis(tmp_path: Path) -> None:
    flat = {key: value.ravel().astype(np.int64) for key, value in arrays().items() if key.endswith("labels")}
    assert len(index([save(tmp_path / "cubes.npz", **flat)])[0]) == 10


@pytest.mark.parametrize("name", INFO)
def test_every_published_set_is_known_by_its_counts_and_classes(tmp_path: Path, name: str) -> None:
    info = INFO[name]
    np.savez_compressed(tmp_path / f"{name}.npz", **blank(info.counts[0], len(info.classes)))
    scans, _ = index([tmp_path / f"{name}.npz"])
    assert len(scans) == sum(info.counts[0])
    labels = {scan.label for scan in scans}
    assert labels == (set(info.classes) if info.task == "multi-class" else {"0", "1"})


def test_six_sets_of_the_sizes_their_authors_publish() -> None:
    sizes = {name: sum(info.counts[0]) for name, info in INFO.items()}
    assert sizes == {
        "organmnist3d": 1742,
        "nodulemnist3d": 1633,
        "adrenalmnist3d": 1584,
        "fracturemnist3d": 1370,
        "vesselmnist3d": 1908,
        "synapsemnist3d": 1759,
    }
    assert [len(info.classes) for info in INFO.values()] == [11, 2, 2, 3, 2, 2]


def test_a_file_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    assert "holds 5/2/3 items for training/validation/test, where the set has 1158/165/310" in problem(
        save(tmp_path / "nodulemnist3d_64.npz")
    )
    np.savez_compressed(tmp_path / "adrenalmnist3d.npz", **blank((1188, 98, 298), 3))
    assert "holds class 2, where the set has 2" in problem(tmp_path / "adrenalmnist3d.npz")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_images": None}, "holds no val_images"),
        ({"test_labels": None}, "holds no test_labels"),
        ({"train_images": np.zeros((5, 28, 28, 28), np.float32)}, "of float32"),
        ({"train_images": np.zeros((5, 28, 28), np.uint8)}, "train_images is 5 x 28 x 28"),
        ({"train_images": np.zeros((5, 28, 28, 28, 3), np.uint8)}, "x 28 x 3"),
        ({"train_images": np.zeros((5, 28, 28, 27), np.uint8)}, "not cubes of one size"),
        ({"val_images": np.zeros((2, 14, 14, 14), np.uint8)}, "not cubes of one size"),
        ({"val_images": np.zeros((0, 28, 28, 28), np.uint8)}, "declares 0 voxels"),
        ({"train_labels": np.zeros((4, 1), np.uint8)}, "not one class for each of 5 images"),
        ({"train_labels": np.zeros((5, 14), np.uint8)}, "not one class for each of 5 images"),
        ({"train_labels": np.full((5, 1), -1)}, "holds classes -1 to -1"),
        ({"train_labels": np.array([print] * 5, dtype=object)[:, None]}, "is no whole .npz file"),
    ],
)
def test_other_arrays_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    if any(value is not None and value.dtype == object for value in changes.values()):
        changes = {"train_labels": np.array([{"a": 1}] * 5, dtype=object)[:, None]}
    assert words in problem(save(tmp_path / "cubes.npz", **changes))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "cubes.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is no whole .npz file" in problem(path)
    path.write_text("<html>")
    assert "is no whole .npz file" in problem(path)


def test_a_header_that_declares_more_than_there_is_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bomb.npz"
    save(tmp_path / "cubes.npz")
    header = str({"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**3, 10**3, 10**3)}).encode()
    with zipfile.ZipFile(tmp_path / "cubes.npz") as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "train_images.npy":
                data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            target.writestr(name, data)
    assert "not what its header says" in problem(path)


def test_prepare_writes_a_store_as_any_other_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "cubes.npz")
    command = ["prepare", "-i", str(path), "-o", str(tmp_path / "store"), "--spacing-mm", "1.5"]
    assert run(command) == 0
    assert "grey 0 to 255 stand for -175 to 250 HU" in capsys.readouterr().err
    store = PreparedStore(tmp_path / "store")
    store.verify()
    assert [row["spacing_mm"] for row in store.rows] == [[1.5] * 3] * 10
    assert {row["split"] for row in store.rows} == {"train", "validation", "test"}
    assert (store.hu(0) == hounsfield(arrays()["test_images"][0])).all()
    before = store.store_id
    (tmp_path / "store" / "volumes" / "cubes-val-0001.b2nd").unlink()
    assert run(command) == 0
    assert "1 case prepared" in capsys.readouterr().err
    assert PreparedStore(tmp_path / "store").store_id == before


def test_the_official_file(real_data: Path) -> None:
    path = real_data / "medmnist3d" / "adrenalmnist3d.npz"
    scans, problems = index([path])
    assert len(scans) == 1584
    assert [problem.ignored for problem in problems] == [True]
    assert sum(scan.label == "1" for scan in scans) == sum(
        int(np.load(path)[f"{part}_labels"].sum()) for part in ("train", "val", "test")
    )
    assert set(np.unique(read(scans[700]).hu)) == {-175, 250}
