"""RTSTRUCT and SEG: round trips, holes, planes between slices, names, references, and the real files."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage

from dagman.cli import run
from dagman.ct import guard, read, segments
from dagman.ct.index import index
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.types import Scan, Volume

sys.path.append(str(Path(__file__).parents[1] / "corpus"))
import make_corpus

Change = Callable[[Dataset], None]


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> tuple[Scan, Volume]:
    """The corpus's series, whose rows and columns run against the patient's axes."""
    folder = tmp_path_factory.mktemp("ct") / "series"
    folder.mkdir()
    for k, data in enumerate(make_corpus.slices()):
        make_corpus.save(data, folder / f"{k:02d}.dcm")
    [scan] = index([folder])[0]
    return scan, read.read(scan)


def own_affine(volume: Volume) -> np.ndarray:
    assert volume.own_grid is not None
    return volume.own_grid.affine


def world(volume: Volume, points: np.ndarray) -> list[float]:
    """(column, row, slice) to the flat LPS mm of ContourData."""
    affine = own_affine(volume)
    ras = points @ affine[:3, :3].T + affine[:3, 3]
    return (ras * [-1, -1, 1]).ravel().tolist()


def outlines(mask: np.ndarray, shift: float = 0.0) -> list[np.ndarray]:
    """Contours (points, 3) of a mask (columns, rows, slices), halfway between pixels, a hole as one of its own."""
    lines = []
    for k in range(mask.shape[2]):
        padded = np.pad(mask[:, :, k].astype(float), 1)
        drawn = contourpy.contour_generator(z=padded.T).lines(0.5)
        lines += [np.column_stack([line[:-1] - 1, np.full(len(line) - 1, k + shift)]) for line in drawn]
    return lines


def rtstruct(path: Path, volume: Volume, structures: dict[str, list[np.ndarray]], change: Change | None = None) -> Path:
    first = make_corpus.slices()[0]
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{make_corpus.UID}.77"
    data.Modality, data.PatientID, data.SeriesInstanceUID = "RTSTRUCT", make_corpus.CANARY, f"{make_corpus.UID}.78"
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = first.SeriesInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = first.FrameOfReferenceUID, [study]
    data.ReferencedFrameOfReferenceSequence = [frame]
    data.StructureSetROISequence, data.ROIContourSequence = [], []
    for number, (name, lines) in enumerate(structures.items(), 11):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, first.FrameOfReferenceUID
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for line in lines:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(line)
            contour.ContourData = [f"{value:.4f}" for value in world(volume, line)]
            drawn.ContourSequence.append(contour)
        data.StructureSetROISequence.append(roi)
        data.ROIContourSequence.append(drawn)
    if change:
        change(data)
    data.save_as(path, enforce_file_format=True)
    return path


def mask_of(scan: Scan, volume: Volume, path: Path, *rois: str) -> np.ndarray:
    """Labels in the file's own order."""
    labels = read.read_mask(path, volume, image=scan.files[0], rois=rois)
    assert (labels.affine == volume.affine).all()
    return labels.hu[::-1, ::-1] if own_affine(volume)[0, 0] < 0 else labels.hu


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, (22, 18, 16)), indexing="ij"), -1)
    return ((grid - np.array(centre)) ** 2).sum(-1) <= radius**2


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


HOLLOW = ball((10, 8, 7), 6.3) & ~ball((11, 8, 7), 3.1)


def test_a_mask_comes_back_through_contours_with_its_hole(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], {"GTV-1": outlines(HOLLOW)})
    found = mask_of(*ct, path) == 1
    assert dice(found, HOLLOW) >= 0.98
    assert (found == HOLLOW).all()


def test_a_turned_mask_lands_on_the_same_anatomy(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    """Bone in the file's own order and in RAS order."""
    _, volume = ct
    bone = volume.hu > 400
    own = bone[::-1, ::-1] if own_affine(volume)[0, 0] < 0 else bone
    path = rtstruct(tmp_path / "rt.dcm", volume, {"bone": outlines(own)})
    labels = read.read_mask(path, volume, image=ct[0].files[0])
    assert ((labels.hu == 1) == bone).all()


@pytest.mark.parametrize("shift", [-0.4, 0.3, 0.49])
def test_planes_between_slices_belong_to_the_nearest(ct: tuple[Scan, Volume], tmp_path: Path, shift: float) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], {"a": outlines(HOLLOW, shift)})
    assert dice(mask_of(*ct, path) == 1, HOLLOW) >= 0.98


def test_contours_of_one_plane_may_differ_by_rounding(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    """A hole stays one although its contour is written on the other side of a hundredth."""
    lines = [
        line + np.array([0, 0, 0.0049 if np.ptp(line[:, 0]) > 7 else 0.0051])
        for line in outlines(HOLLOW)
        if line[0, 2] == 7
    ]
    assert len({round(float(line[0, 2]), 2) for line in lines}) == 2
    found = mask_of(*ct, rtstruct(tmp_path / "rt.dcm", ct[1], {"a": lines})) == 1
    assert (found[:, :, 7] == HOLLOW[:, :, 7]).all()


@pytest.mark.parametrize("order", [("gtv", "lung"), ("lung", "gtv", "empty")])
def test_a_structure_asked_for_that_nobody_would_see_is_refused(
    ct: tuple[Scan, Volume], tmp_path: Path, order: tuple[str, ...]
) -> None:
    drawn = {"lung": outlines(ball((10, 8, 7), 5)), "gtv": outlines(ball((10, 8, 7), 2)), "empty": []}
    path = rtstruct(tmp_path / "rt.dcm", ct[1], drawn)
    hidden = "gtv" if order[0] == "gtv" else "empty"
    with pytest.raises(DagmanError, match=f"E-ROI .*no voxel of {hidden} to see"):
        mask_of(*ct, path, *order)


def test_planes_finer_than_slices_fill_no_slice_beyond_them(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], {"fine": at(*np.arange(2, 5, 0.5))})
    assert seen(mask_of(*ct, path, "fine")) == [2, 3, 4]


def test_planes_on_every_other_slice_fill_those_between(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    disc = np.zeros((22, 18, 16), bool)
    disc[5:12, 4:9, 3:12] = True
    lines = [line for line in outlines(disc) if line[0, 2] % 2 == 1]
    found = mask_of(*ct, rtstruct(tmp_path / "rt.dcm", ct[1], {"a": lines})) == 1
    assert found[8, 6].tolist() == [2 <= k <= 12 for k in range(16)]
    assert (found[:, :, 3:12] == disc[:, :, 3:12]).all()


def at(*places: float) -> list[np.ndarray]:
    """A square on each of some planes."""
    return [np.array([[5, 4, k], [11, 4, k], [11, 8, k], [5, 8, k]]) + np.array([0.5, 0.5, 0]) for k in places]


def seen(found: np.ndarray) -> list[int]:
    """Slices that show anything."""
    return np.flatnonzero(found.any(axis=(0, 1))).tolist()


@pytest.mark.parametrize("places", [[10, 20], [10, 11, 30], [3, 4, 11], [3, 11], [7], [10, 11, 20, 30]])
def test_a_few_planes_are_not_smeared_over_their_gap(tmp_path: Path, places: list[int]) -> None:
    """On a CT of 40 slices."""
    (tmp_path / "series").mkdir()
    for k in range(40):
        data = make_corpus.one_slice(k % 16)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{make_corpus.UID}.9.{k + 1}"
        data.InstanceNumber = k + 1
        data.ImagePositionPatient = [20, 15, 30 + make_corpus.SPACING_MM[2] * k]
        make_corpus.save(data, tmp_path / "series" / f"{k:02d}.dcm")
    [scan] = index([tmp_path / "series"])[0]
    volume = read.read(scan)
    path = rtstruct(tmp_path / "rt.dcm", volume, {"a": at(*places)})
    assert seen(mask_of(scan, volume, path) == 1) == places


@pytest.mark.parametrize(
    ("other", "few", "slices"),
    [
        ((1, 2, 3, 4, 5), (3, 11), [3, 11]),
        ((1, 2, 3, 4, 5), (3, 5, 7), [3, 5, 7]),
        ((1, 3, 5, 7, 9), (3, 11), [2, 3, 4, 10, 11, 12]),
        ((1, 3, 5, 7, 9), (3, 5), [2, 3, 4, 5, 6]),
        ((1, 3, 5, 7, 9), (3,), [2, 3, 4]),
    ],
)
def test_how_far_planes_lie_apart_is_told_by_all_structures(
    ct: tuple[Scan, Volume], tmp_path: Path, other: tuple[int, ...], few: tuple[int, ...], slices: list[int]
) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], {"other": at(*other), "few": at(*few)})
    assert seen(mask_of(*ct, path, "few")) == slices


def test_a_structure_of_regular_planes_is_filled_whatever_lies_beside_it(
    ct: tuple[Scan, Volume], tmp_path: Path
) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], {"gtv": at(1, 4, 7, 10, 13), "body": at(*range(2, 12))})
    assert seen(mask_of(*ct, path, "gtv") == 1) == list(range(15))


def test_a_broken_structure_that_is_not_asked_for_stops_no_other(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    drawn = {"GTV-1": at(3, 4), "sagittal": [line[:, [2, 1, 0]] for line in at(1, 2, 3)], "broken": at(1, 2)}

    def change(data: Dataset) -> None:
        data.ROIContourSequence[2].ContourSequence[0].ContourData = []
        del data.ROIContourSequence[2].ContourSequence[1].ContourData

    path = rtstruct(tmp_path / "rt.dcm", ct[1], drawn, change)
    assert seen(mask_of(*ct, path, "GTV-1")) == [3, 4]


def test_a_gap_between_two_parts_stays(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    parts = ball((10, 8, 3), 2.2) | ball((10, 8, 12), 2.2)
    assert (mask_of(*ct, rtstruct(tmp_path / "rt.dcm", ct[1], {"a": outlines(parts)})) == parts).all()


TWO = {"GTV-1": outlines(ball((6, 6, 5), 3)), "Lung": outlines(ball((15, 11, 10), 3))}


def test_structures_become_labels_in_the_order_asked_for(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], TWO)
    first, second = ball((6, 6, 5), 3), ball((15, 11, 10), 3)
    assert (mask_of(*ct, path) == first + 2 * second).all()
    assert (mask_of(*ct, path, "lung", "GTV-1") == 2 * first + second).all()
    assert (mask_of(*ct, path, "lung") == second).all()
    assert (mask_of(*ct, path, "12") == second).all()


def test_overlapping_structures_are_asked_for_by_name(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    large, small = ball((10, 8, 7), 5), ball((10, 8, 7), 2)
    path = rtstruct(tmp_path / "rt.dcm", ct[1], {"lung": outlines(large), "gtv": outlines(small)})
    with pytest.raises(DagmanError, match=r"E-ROI .*overlap.*name those wanted"):
        mask_of(*ct, path)
    assert (mask_of(*ct, path, "lung", "gtv") == large.astype(int) + small).all()


@pytest.mark.parametrize("name", ["GTV-2", "3"])
def test_a_name_that_is_not_there_tells_no_other_name(ct: tuple[Scan, Volume], tmp_path: Path, name: str) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], TWO)
    with pytest.raises(DagmanError, match=f"holds 2 structures, none of them named {name}") as caught:
        mask_of(*ct, path, name)
    assert "Lung" not in str(caught.value)


def another_series(data: Dataset) -> None:
    [study] = data.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    study.RTReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"


def another_frame(data: Dataset) -> None:
    frame = data.ReferencedFrameOfReferenceSequence[0]
    frame.FrameOfReferenceUID = "1.2.3"
    del frame.RTReferencedStudySequence
    for roi in data.StructureSetROISequence:
        roi.ReferencedFrameOfReferenceUID = "1.2.3"


def nothing(data: Dataset) -> None:
    del data.ReferencedFrameOfReferenceSequence
    for roi in data.StructureSetROISequence:
        del roi.ReferencedFrameOfReferenceUID


def broken(data: Dataset) -> None:
    del data.StructureSetROISequence


def without_numbers(data: Dataset) -> None:
    data.ROIContourSequence[0].ContourSequence[0].ContourData = []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_series, "E-REFERENCE .*another series"),
        (another_frame, "E-REFERENCE .*another frame of reference"),
        (nothing, "E-REFERENCE .*does not say"),
        (broken, "E-DICOM .*broken"),
        (without_numbers, "E-(MASK|DICOM)"),
    ],
)
def test_structures_of_another_ct_are_refused(
    ct: tuple[Scan, Volume], tmp_path: Path, change: Change, words: str
) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], TWO, change)
    with pytest.raises(DagmanError, match=words) as caught:
        mask_of(*ct, path)
    assert make_corpus.CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([line + np.array([0, 0, 20]) for line in TWO["Lung"]], "beyond the slices"),
        ([line[:, [2, 1, 0]] for line in TWO["Lung"]], "cross the slices"),
        ([line + np.array([100, 0, 0]) for line in TWO["Lung"]], "no voxel"),
        ([], "no voxel"),
    ],
)
def test_contours_that_do_not_lie_on_the_grid_are_refused(
    ct: tuple[Scan, Volume], tmp_path: Path, lines: list[np.ndarray], words: str
) -> None:
    with pytest.raises(DagmanError, match=rf"E-MASK .*{words}"):
        mask_of(*ct, rtstruct(tmp_path / "rt.dcm", ct[1], {"a": lines}))


def test_prepare_takes_named_structures_from_a_table(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    path = rtstruct(tmp_path / "rt.dcm", ct[1], TWO)
    rows = [
        ("case_id", "image", "mask"),
        ("all", ct[0].source, path.name),
        ("lung", ct[0].source, f"{path.name}#Lung"),
        ("none", ct[0].source, f"{path.name}#Liver"),
        ("twice", ct[0].source, f"{path.name}#Lung|Lung"),
        ("nifti", ct[0].source, "rt.dcm#"),
    ]
    with (tmp_path / "table.csv").open("w") as stream:
        csv.writer(stream).writerows(rows)
    command = ["prepare", "-i", str(tmp_path / "table.csv"), "-o", str(tmp_path / "store"), "--workers", "1"]
    assert run(command) == 3
    store = PreparedStore(tmp_path / "store")
    assert [(row["case_id"], sorted(row["mask"]["voxels"])) for row in store.rows] == [
        ("all", ["1", "2"]),
        ("lung", ["1"]),
    ]
    rejected = (tmp_path / "store" / "rejected.jsonl").read_text()
    assert sorted(rejected.count(f'"code": "{code}"') for code in ("ROI", "TABLE")) == [1, 2]
    assert make_corpus.CANARY not in rejected


def test_masks_of_other_kinds_have_no_names(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    make_corpus.FILES["good.nii.gz"][1](tmp_path / "mask.nii.gz")
    with pytest.raises(DagmanError, match=r"E-ROI .*has no names"):
        read.read_mask(tmp_path / "mask.nii.gz", ct[1], rois=["a"])
    with pytest.raises(DagmanError, match="needs the CT it was drawn on"):
        read.read_mask(rtstruct(tmp_path / "rt.dcm", ct[1], TWO))


def seg(path: Path, scan: Scan, masks: dict[str, np.ndarray], kind: str = "BINARY", **changes: Any) -> Path:
    """A SEG by highdicom on the CT's images, empty frames left out."""
    highdicom = pytest.importorskip("highdicom")
    images = [pydicom.dcmread(file) for file in scan.files]
    for image in images:
        image.SliceThickness = make_corpus.SPACING_MM[2]
        for name in ("StudyID", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyDate", "StudyTime"):
            setattr(image, name, "")
    code = pydicom.sr.codedict.codes
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=code.SCT.Tissue,
            segmented_property_type=code.SCT.Bone,
            algorithm_type="MANUAL",
        )
        for number, name in enumerate(masks, 1)
    ]
    pixels = np.stack([mask.transpose(2, 1, 0) for mask in masks.values()], axis=-1)
    result = highdicom.seg.Segmentation(
        source_images=sorted(images, key=lambda image: image.ImagePositionPatient[2]),
        pixel_array=pixels.astype(np.uint8 if kind == "BINARY" else np.float32),
        segmentation_type=kind,
        segment_descriptions=descriptions,
        series_instance_uid=f"{make_corpus.UID}.80",
        sop_instance_uid=f"{make_corpus.UID}.81",
        **dict.fromkeys(("series_number", "instance_number"), 1),
        **dict.fromkeys(("manufacturer", "manufacturer_model_name", "software_versions", "device_serial_number"), "a"),
    )
    for name, value in changes.items():
        setattr(result, name, value)
    result.save_as(path)
    return path


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_seg_comes_back_exactly(ct: tuple[Scan, Volume], tmp_path: Path, kind: str) -> None:
    parts = ball((10, 8, 3), 2.2) | ball((10, 8, 12), 2.2)
    path = seg(tmp_path / "seg.dcm", ct[0], {"a": parts, "b": HOLLOW & ~parts}, kind)
    assert (mask_of(*ct, path) == parts + 2 * (HOLLOW & ~parts)).all()
    assert (mask_of(*ct, path, "b") == (HOLLOW & ~parts)).all()


def test_overlapping_segments_are_asked_for_by_name(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    path = seg(tmp_path / "seg.dcm", ct[0], {"a": ball((10, 8, 7), 5), "b": ball((10, 8, 7), 2)})
    with pytest.raises(DagmanError, match=r"E-ROI .*overlap"):
        mask_of(*ct, path)
    assert (mask_of(*ct, path, "a", "b") == ball((10, 8, 7), 5).astype(int) + ball((10, 8, 7), 2)).all()


def test_seg_of_another_series_is_refused(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    other = Dataset()
    other.SeriesInstanceUID = "1.2.3"
    path = seg(tmp_path / "seg.dcm", ct[0], {"a": HOLLOW}, ReferencedSeriesSequence=[other])
    with pytest.raises(DagmanError, match=r"E-REFERENCE .*another series"):
        mask_of(*ct, path)


def test_seg_on_other_voxels_is_refused(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    path = seg(tmp_path / "seg.dcm", ct[0], {"a": HOLLOW})
    assert ct[1].own_grid is not None
    for affine, words in (
        (own_affine(ct[1]) @ np.diag([1.01, 1, 1, 1]), "other voxels"),
        (own_affine(ct[1]) + np.outer([0, 0, 1, 0], [0, 0, 0, 1.5]), "other voxels"),
        (own_affine(ct[1]) + np.outer([0, 0, 1, 0], [0, 0, 0, 30]), "beyond this CT"),
    ):
        with pytest.raises(DagmanError, match=rf"E-MASK .*{words}"):
            segments.read(
                path=str(path), image=None, shape=[22, 18, 16], affine=affine.tolist(), rois=[], max_voxels=10**9
            )


def test_seg_that_declares_too_much_is_refused(ct: tuple[Scan, Volume], tmp_path: Path) -> None:
    path = seg(tmp_path / "seg.dcm", ct[0], {"a": HOLLOW}, NumberOfFrames=10**9)
    with pytest.raises(DagmanError, match="E-DIMS"):
        mask_of(*ct, path)


@pytest.mark.parametrize("name", ["rt", "invalid_reference_rt", "non_existent_reference_rt"])
def test_real_structure_sets(real_data: Path, name: str) -> None:
    """Against matplotlib's point-in-polygon test; two of the three reach beyond the two slices that are there."""
    inside_of = pytest.importorskip("matplotlib.path").Path
    folder = real_data / "dicom_edge" / "rt_utils"
    files = tuple(folder / f"ct_{number}.dcm" for number in (1, 2))
    volume = read.read(Scan(case_id="a", files=files, kind="dicom"), guard.Limits(min_extent_mm=5.0))
    path, affine = folder / f"{name}.dcm", own_affine(volume)
    if name != "rt":
        with pytest.raises(DagmanError, match=r"E-MASK .*beyond the slices"):
            read.read_mask(path, volume, image=files[0], rois=["ROI-1"])
    labels = segments.read(
        path=str(path),
        image=str(files[0]),
        shape=[512, 512, 3],
        affine=affine.tolist(),
        rois=["ROI-1"],
        max_voxels=10**9,
    )[1]
    expected = np.zeros((512, 512, 3), bool)
    centres = np.stack(np.meshgrid(np.arange(512), np.arange(512), indexing="ij"), -1).reshape(-1, 2)
    for one in pydicom.dcmread(path).ROIContourSequence[0].ContourSequence:
        x, y, z = np.array(one.ContourData, float).reshape(-1, 3).T
        line = np.column_stack([(x + 125) / 0.488281, (y + 125) / 0.488281])
        inside = inside_of(np.vstack([line, line[:1]]), closed=True).contains_points(centres).reshape(512, 512)
        expected[:, :, round((z[0] - 60) / 5)] ^= inside
    assert expected.sum() > 20
    assert dice(labels > 0, expected) >= 0.98


@pytest.mark.parametrize(
    ("name", "voxels"), [("pydicom_data/liver", 107098), ("highdicom/seg_image_ct_binary_single_frame", 1832)]
)
def test_real_segmentations_keep_every_voxel(real_data: Path, name: str, voxels: int) -> None:
    pytest.importorskip("highdicom")
    path = real_data / "dicom_edge" / f"{name}.dcm"
    header = pydicom.dcmread(path)
    frames = header.PerFrameFunctionalGroupsSequence
    places = [[float(v) for v in one.PlanePositionSequence[0].ImagePositionPatient] for one in frames]
    row, column = (float(v) for v in header.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing)
    affine = np.diag([-column, -row, places[-1][2] - places[-2][2] if len(places) > 1 else 5.0, 1.0])
    affine[:3, 3] = np.array(places[0]) * [-1, -1, 1]
    shape = [int(header.Columns), int(header.Rows), len(places)]
    labels = segments.read(path=str(path), image=None, shape=shape, affine=affine.tolist(), rois=[], max_voxels=10**9)[
        1
    ]
    assert int((labels == 1).sum()) == voxels
    pixels = header.pixel_array.reshape(len(places), int(header.Rows), int(header.Columns))
    assert (labels == pixels.transpose(2, 1, 0)).all()
