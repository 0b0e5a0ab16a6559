"""The prepared store: crops equal slices, damage is found, two storages hold the same."""

import gc
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagman.ct.store import AIR_HU, FORMAT, PreparedStore, array_path, padded_crop, write_array
from dagman.errors import DagmanError
from dagman.files import sha256_file, write_json, write_text


def make_store(
    folder: Path, volumes: dict[str, np.ndarray], masks: dict[str, np.ndarray] | None = None, storage="blosc2"
):
    """A store of given arrays, as `prepare` writes it."""
    rows = []
    for case_id, hu in sorted(volumes.items()):
        paths = {"volumes": hu} | ({"masks": masks[case_id]} if masks and case_id in masks else {})
        files = {}
        for kind, array in paths.items():
            path = array_path(folder, kind, case_id, storage)
            write_array(path, array)
            files[kind] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        row = {
            "case_id": case_id,
            "patient": case_id,
            "shape": list(hu.shape),
            "affine": np.diag([2.0, 2, 2, 1]).tolist(),
        }
        rows.append(row | files["volumes"] | {"mask": files.get("masks")})
    write_json(folder / "prepare.json", {"format": FORMAT, "spacing_mm": 2.0, "storage": storage})
    write_text(folder / "manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return PreparedStore(folder)


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1024, 3000, shape).astype(np.int16)


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return noise((70, 45, 33))


@pytest.fixture(scope="module")
def stores(tmp_path_factory, volume):
    mask = (volume > 2500).astype(np.uint8)
    return {
        storage: make_store(tmp_path_factory.mktemp(storage), {"case": volume}, {"case": mask}, storage)
        for storage in ("blosc2", "npy")
    }


@settings(max_examples=60, deadline=None)
@given(
    corner=st.tuples(*[st.integers(-90, 90)] * 3),
    size=st.tuples(*[st.integers(1, 40)] * 3),
)
def test_crops_equal_slices_of_the_padded_whole(stores, volume, corner, size):
    wide = np.full([num + 300 for num in volume.shape], AIR_HU, np.int16)
    wide[150 : 150 + 70, 150 : 150 + 45, 150 : 150 + 33] = volume
    expected = wide[tuple(slice(150 + start, 150 + start + side) for start, side in zip(corner, size, strict=True))]
    for store in stores.values():
        crop = store.hu(0, corner, size)
        assert crop.dtype == np.int16
        np.testing.assert_array_equal(crop, expected)
        mask = store.mask(0, corner, size)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, expected > 2500)


def test_the_whole_volume_comes_back_and_a_crop_may_be_written_to(stores, volume):
    for store in stores.values():
        np.testing.assert_array_equal(store.hu(0), volume)
        crop = store.hu(0, (1, 1, 1), (8, 8, 8))
        assert padded_crop(volume, (1, 1, 1), (8, 8, 8), 0).tolist() == crop.tolist()


def test_a_store_travels_to_workers_small_and_keeps_its_id(stores):
    for store in stores.values():
        sent = pickle.dumps(store)
        assert len(sent) < 10_000
        assert pickle.loads(sent).store_id == store.store_id
        assert len(store.store_id) == 16


def test_the_id_changes_with_any_voxel_case_or_setting(tmp_path, volume):
    changed = volume.copy()
    changed[3, 3, 3] += 1
    ids = {
        make_store(tmp_path / "a", {"case": volume}).store_id,
        make_store(tmp_path / "b", {"case": changed}).store_id,
        make_store(tmp_path / "c", {"other": volume}).store_id,
        make_store(tmp_path / "d", {"case": volume}, {"case": volume}).store_id,
        make_store(tmp_path / "e", {"case": volume}, storage="npy").store_id,
    }
    assert len(ids) == 5
    assert make_store(tmp_path / "f", {"case": volume}).store_id in ids


def test_every_single_flipped_bit_is_found(tmp_path, volume):
    store = make_store(tmp_path, {"a": volume, "b": volume[:40]}, {"b": volume[:40]})
    store.verify()
    draws = np.random.default_rng(7)
    paths = [store.path(0), store.path(1), store.path(1, "masks")]
    found = 0
    for i in range(60):
        path = paths[i % 3]
        data = bytearray(path.read_bytes())
        place, bit = int(draws.integers(len(data))), int(draws.integers(8))
        data[place] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(DagmanError, match=rf"E-CHECKSUM .*{path.parent.name}/{path.stem}"):
            store.verify()
        found += 1
        data[place] ^= 1 << bit
        path.write_bytes(data)
    assert found == 60
    store.verify()


@pytest.mark.parametrize("storage", ["blosc2", "npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_a_damaged_file_is_refused_at_reading_never_zeros(tmp_path, volume, storage, damage):
    store = make_store(tmp_path, {"case": volume}, storage=storage)
    path = store.path(0)
    data = path.read_bytes()
    path.write_bytes({"missing": data, "empty": b"", "cut": data[:-1], "longer": data + b"x"}[damage])
    if damage == "missing":
        path.unlink()
    advice = "run the same" if damage == "missing" else "delete this file"
    with pytest.raises(DagmanError, match=rf"E-CHECKSUM .*case.*; {advice}"):
        store.hu(0, (0, 0, 0), (4, 4, 4))
    with pytest.raises(DagmanError, match="E-CHECKSUM"):
        store.verify()


def test_arrays_are_corners_too_and_a_store_stays_where_it_was(stores, volume, tmp_path, monkeypatch):
    for store in stores.values():
        crop = store.hu(0, np.array([1, 2, 3]), np.array([4, 5, 6]))
        assert np.array_equal(crop, volume[1:5, 2:7, 3:9])
    make_store(tmp_path / "store", {"a": volume})
    monkeypatch.chdir(tmp_path)
    store = PreparedStore("store")
    monkeypatch.chdir("/")
    assert np.array_equal(store.hu(0), volume)
    store.path(0).unlink()
    with pytest.raises(DagmanError, match="is missing; run the same `dagman prepare` again"):
        PreparedStore(tmp_path / "store").hu(0)


def test_no_store_and_an_unfinished_one_are_refused(tmp_path):
    with pytest.raises(DagmanError, match=r"E-STORE .*manifest.jsonl"):
        PreparedStore(tmp_path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text + text, "manifest.jsonl:3: a is listed twice"),
        (lambda text: text.replace('"a"', '"../a"'), "manifest.jsonl:1: ../a is no case name"),
        (lambda text: text.replace('"shape"', '"shapes"'), "manifest.jsonl:1: line lacks shape"),
        (lambda text: "{" + text, "manifest.jsonl:1: line is not"),
        (lambda text: text.replace("\n", "\n[1]\n", 1), "manifest.jsonl:2: line lacks"),
    ],
)
def test_a_damaged_manifest_is_refused_with_its_line(tmp_path, volume, edit, said):
    make_store(tmp_path, {"a": volume, "b": volume})
    path = tmp_path / "manifest.jsonl"
    path.write_text(edit(path.read_text()))
    with pytest.raises(DagmanError) as caught:
        PreparedStore(tmp_path)
    assert said in str(caught.value)
    assert caught.value.code == "MANIFEST"


def test_windows_line_ends_and_a_byte_order_mark_are_no_damage(tmp_path, volume):
    store = make_store(tmp_path, {"a": volume, "b": volume})
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert PreparedStore(tmp_path).store_id == store.store_id


def test_a_store_of_another_format_is_refused(tmp_path, volume):
    make_store(tmp_path, {"a": volume})
    write_json(tmp_path / "prepare.json", {"format": FORMAT + 1, "storage": "blosc2"})
    with pytest.raises(DagmanError, match=f"has format {FORMAT + 1}"):
        PreparedStore(tmp_path)


def test_ten_thousand_rows_open_quickly(tmp_path, volume):
    import time

    store = make_store(tmp_path, {"a": volume})
    row = store.rows[0]
    write_text(
        tmp_path / "manifest.jsonl", "".join(json.dumps(row | {"case_id": f"c{i:05d}"}) + "\n" for i in range(10_000))
    )
    started = time.perf_counter()
    assert len(PreparedStore(tmp_path)) == 10_000
    assert time.perf_counter() - started < 5


def test_without_blosc2_the_error_says_what_to_do(tmp_path, volume, monkeypatch):
    store = make_store(tmp_path, {"a": volume})
    monkeypatch.setitem(__import__("sys").modules, "blosc2", None)
    with pytest.raises(DagmanError, match=r"E-BLOSC2 .*install blosc2, or prepare with storage npy"):
        store.hu(0)
    assert make_store(tmp_path / "npy", {"a": volume}, storage="npy").hu(0).shape == volume.shape


def test_store_crops_and_datasets_import_where_only_the_training_core_is_installed():
    import subprocess
    import sys

    blocked = [
        "blosc2",
        "SimpleITK",
        "nibabel",
        "pydicom",
        "monai",
        "scipy",
        "sklearn",
        "joblib",
        "matplotlib",
        "cyclopts",
        "rich",
    ]
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import dagman.ct.store, dagman.ct.crops, dagman.ct.datasets\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_flipped_bit_is_refused_when_a_crop_is_read(tmp_path):
    store = make_store(tmp_path, {"a": np.arange(32**3, dtype=np.int16).reshape(32, 32, 32)})
    path = store.path(0)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DagmanError, match=r"E-CHECKSUM .*a\.\w+: has not the checksum"):
        PreparedStore(store.folder).hu(0, (0, 0, 0), (4, 4, 4))


@pytest.mark.parametrize("storage", ["blosc2", "npy"])
def test_a_volume_that_is_replaced_while_it_is_read_is_refused(tmp_path, storage):
    """As by `prepare` beside a training: what is open goes on; another file has another checksum."""
    store = make_store(tmp_path, {name: noise((32, 32, 32), seed) for seed, name in enumerate("ab")}, storage=storage)
    before = store.hu(0, (0, 0, 0), (8, 8, 8))
    write_array(store.path(0), noise((32, 32, 32), 2))
    np.testing.assert_array_equal(store.hu(0, (0, 0, 0), (8, 8, 8)), before)
    store.hu(1, (0, 0, 0), (8, 8, 8))
    with pytest.raises(DagmanError, match=r"E-CHECKSUM .*a\.\w+: (has not the checksum|holds)"):
        store.hu(0, (0, 0, 0), (8, 8, 8))


def test_opening_a_store_looks_for_cycles_no_more_often_where_it_has_more_rows(tmp_path: Path) -> None:
    row = {"shape": [9, 9, 9], "affine": np.eye(4).tolist(), "bytes": 1, "sha256": "0", "mask": None}
    write_json(tmp_path / "prepare.json", {"format": FORMAT, "spacing_mm": 2.0, "storage": "npy"})
    text = "".join(json.dumps(row | {"case_id": f"case{number}"}) + "\n" for number in range(5000))
    write_text(tmp_path / "manifest.jsonl", text)
    begun = []
    gc.callbacks.append(lambda phase, _: begun.append(phase) if phase == "start" else None)
    try:
        assert len(PreparedStore(tmp_path)) == 5000
    finally:
        gc.callbacks.pop()
    assert len(begun) <= 2, "each goes through all that was read so far"
    write_text(tmp_path / "manifest.jsonl", text + "{damaged\n")
    with pytest.raises(DagmanError, match="E-MANIFEST"):
        PreparedStore(tmp_path)
    assert gc.isenabled()
