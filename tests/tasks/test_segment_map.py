"""A predicted label map lies where the scan lies, whatever the order and direction of the file's axes."""

import gzip
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from torch import nn

import small_study
from dagman import files
from dagman.ct import crops
from dagman.ct.index import index
from dagman.ct.resample import positions
from dagman.ct.store import AIR_HU, padded_crop
from dagman.errors import DagmanError, ExitCode
from dagman.nets.encoder import build
from dagman.nets.swin import SwinConfig
from dagman.nets.unetr import SegmentationNetwork
from dagman.tasks import segment
from dagman.tasks.classes import Classes
from dagman.tasks.segmenter import Segmenter
from dagman.types import Grid, Preparation

CROP = (32, 32, 64)


class Bright(SegmentationNetwork):
    """A network whose answer is known: class 1 above the middle of the window, class 2 at its upper end."""

    def forward(self, images):
        return torch.cat([0.5 - images, images - 0.5, (images - 0.9) * 20], dim=1) * 40


@pytest.fixture(scope="module")
def bright():
    small = SwinConfig(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), attention=None)
    network = Bright(build(small), 3).eval()
    network.encoder.preparation = Preparation(crop=CROP, window_hu=(-1000.0, 1000.0))
    return Segmenter(network=network, classes=Classes(names=("dense", "bone"), labels=((4,), (9,))), card={})


def body(shape, spacing_mm):
    """A body of water in air with a bright, off-centre box, and denser still a smaller one; and what is where."""
    hu = np.full(shape, -1000, np.int16)
    extent = [num * size for num, size in zip(shape, spacing_mm, strict=True)]

    def fill(low, high, value):
        place = tuple(
            slice(round(a * mm / size), round(b * mm / size))
            for a, b, mm, size in zip(low, high, extent, spacing_mm, strict=True)
        )
        hu[place] = value

    fill((0.1, 0.1, 0.1), (0.9, 0.9, 0.9), -100)
    fill((0.2, 0.3, 0.25), (0.5, 0.8, 0.6), 400)
    fill((0.3, 0.4, 0.3), (0.4, 0.6, 0.5), 950)
    return hu


def truth(hu):
    return np.where(hu > 800, 9, np.where(hu > 0, 4, 0))


TURN = np.linalg.qr(np.array([[1, 0.2, -0.1], [-0.15, 1, 0.25], [0.1, -0.2, 1]]))[0]
TURN = TURN * np.sign(np.diag(TURN))
AXES = {
    "RAS": np.eye(3),
    "LPS": np.diag([-1.0, -1.0, 1.0]),
    "one flipped": np.diag([1.0, -1.0, 1.0]),
    "permuted": np.eye(3)[[2, 0, 1]],
    "permuted, flipped": np.eye(3)[[1, 2, 0]] * [-1, 1, -1],
    "oblique": TURN,
    "oblique, flipped": TURN @ np.diag([-1.0, 1.0, -1.0]),
}


def affine_of(axes, spacing_mm):
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing_mm
    affine[:3, 3] = (-31.5, 17.25, 940.0)
    return affine


@pytest.mark.parametrize("axes", AXES)
def test_nifti_opens_where_the_scan_opens(tmp_path, bright, axes):
    spacing_mm = (2.0, 2.0, 2.0)
    hu, affine = body((40, 36, 34), spacing_mm), affine_of(AXES[axes], spacing_mm)
    image = nibabel.Nifti1Image(hu, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    (scan,), _ = index([tmp_path / "scan.nii.gz"])
    found = segment.predict([bright], scan, tmp_path / "out")
    written = nibabel.load(found.path)
    np.testing.assert_array_equal(np.asarray(written.dataobj), truth(hu))
    for form in ("get_qform", "get_sform"):
        np.testing.assert_allclose(getattr(written, form)(), getattr(image, form)(), atol=2e-5)
    assert np.array_equal(written.affine, image.affine)
    ours, theirs = (SimpleITK.ReadImage(str(path)) for path in (found.path, tmp_path / "scan.nii.gz"))
    for word in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(ours, word)(), getattr(theirs, word)(), atol=1e-4)
    voxels = {4: np.sum(truth(hu) == 4), 9: np.sum(truth(hu) == 9)}
    assert found.volumes_cc["dense"] == pytest.approx(voxels[4] * 0.008)
    assert found.volumes_cc["bone"] == pytest.approx(voxels[9] * 0.008)


def test_of_several_networks_the_mean_of_the_probabilities_counts(tmp_path, bright):
    class Doubtful(SegmentationNetwork):
        """Class 2 wherever it is asked, but never sure of it."""

        def forward(self, images):
            return torch.cat([torch.zeros_like(images), torch.zeros_like(images), torch.ones_like(images)], dim=1)

    other = Doubtful(bright.network.encoder, 3).eval()
    both = [bright, replace(bright, network=other)]
    hu = body((40, 36, 34), (2.0,) * 3)
    nibabel.save(nibabel.Nifti1Image(hu, np.eye(4) * 2), tmp_path / "scan.nii.gz")
    (scan,), _ = index([tmp_path / "scan.nii.gz"])
    told = []
    found = segment.predict(both, scan, tmp_path / "out", progress=lambda *done: told.append(done))
    mean = np.mean([segment.probabilities(each.network, hu) for each in both], axis=0)
    numbers = np.asarray(nibabel.load(found.path).dataobj)
    np.testing.assert_array_equal(numbers, np.array([0, 4, 9])[mean.argmax(axis=0)])
    # The one that is sure decides, the other does not.
    np.testing.assert_array_equal(numbers == 4, truth(hu) == 4)
    assert told[-1][0] == told[-1][1]
    assert sorted(told) == told


def test_a_kill_while_a_prediction_is_noted_costs_that_note_alone(tmp_path, bright):
    named = replace(bright, digest="weights")
    for name in ("one", "two"):
        nibabel.save(nibabel.Nifti1Image(body((40, 36, 34), (2.0,) * 3), np.eye(4) * 2), tmp_path / f"{name}.nii.gz")
    one, two = index([tmp_path / "one.nii.gz", tmp_path / "two.nii.gz"])[0]
    folder = tmp_path / "out"
    made = segment.predict([named], one, folder)
    assert segment.before([named], one, folder) == made
    assert segment.before([replace(named, digest="others")], one, folder) is None
    assert segment.before([bright], one, folder) is None, "weights that no file holds are not known again"
    notes = folder / segment.DONE
    notes.write_text(notes.read_text()[:-20])
    assert segment.before([named], one, folder) is None
    segment.predict([named], two, folder)
    assert segment.before([named], two, folder)
    segment.predict([named], one, folder)
    assert segment.before([named], one, folder) == made


def test_no_prediction_replaces_that_of_another_scan(tmp_path, bright):
    paths = [tmp_path / name / "ct.nii.gz" for name in ("pat1", "pat2", "copy")]
    for path, level in zip(paths, (0, 10, 0), strict=True):
        path.parent.mkdir()
        nibabel.save(nibabel.Nifti1Image(body((40, 36, 34), (2.0,) * 3) + np.int16(level), np.eye(4) * 2), path)
    named, folder = replace(bright, digest="weights"), tmp_path / "out"
    one, two, copy = (index([path])[0][0] for path in paths)
    made = segment.predict([named], one, folder)
    before = made.path.read_bytes()
    row = files.read_lines(folder / segment.DONE)[0]
    assert (row["source"], row["source_sha256"]) == (str(paths[0]), files.sha256_file(paths[0]))
    log = folder / segment.DONE  # as versions before wrote it
    older = {name: value for name, value in row.items() if name != "source_sha256"}
    files.write_text(log, files.json_line(older | {"source": [row["source_sha256"]]}))
    with pytest.raises(DagmanError, match=rf"E-DUPCASE {paths[1]}: "):
        segment.predict([replace(bright, digest="others")], two, folder)
    files.write_text(log, files.json_line(row))
    with pytest.raises(DagmanError, match=rf"E-DUPCASE {paths[1]}: is not the scan that .*, {paths[0]}; ") as caught:
        segment.predict([replace(bright, digest="others")], two, folder)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert made.path.read_bytes() == before
    assert segment.before([named], two, folder) is None
    assert segment.before([named], copy, folder) == made, "the same files, wherever they lie"
    segment.predict([replace(bright, digest="others")], one, folder)
    made.path.unlink()
    segment.predict([named], two, folder)
    assert segment.before([named], two, folder)


@pytest.mark.parametrize(("suffix", "spacing_mm"), [(".nrrd", (0.9, 1.1, 3.0)), (".mha", (3.0, 1.0, 1.0))])
def test_other_formats_and_voxels_keep_place_and_volume(tmp_path, bright, suffix, spacing_mm):
    shape = tuple(round(72 / size) for size in spacing_mm)
    hu = body(shape, spacing_mm)
    image = SimpleITK.GetImageFromArray(hu.transpose(2, 1, 0))
    image.SetSpacing(spacing_mm)
    image.SetOrigin((12.0, -40.0, 7.0))
    image.SetDirection((TURN @ np.diag([1.0, -1.0, 1.0])).ravel().tolist())
    SimpleITK.WriteImage(image, str(tmp_path / f"scan{suffix}"))
    (scan,), _ = index([tmp_path / f"scan{suffix}"])
    written = SimpleITK.ReadImage(str(segment.predict([bright], scan, tmp_path / "out").path))
    for word in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        np.testing.assert_allclose(getattr(written, word)(), getattr(image, word)(), atol=1e-4)
    ours, right = SimpleITK.GetArrayFromImage(written).transpose(2, 1, 0), truth(hu)
    dice = 2 * np.sum((ours > 0) & (right > 0)) / (np.sum(ours > 0) + np.sum(right > 0))
    assert dice > 0.9


def test_probabilities_are_interpolated_so_that_a_border_lies_between_voxels(bright):
    """Two coarse voxels of probability 0 and 1 put the border in the middle; labels would put it at a voxel's edge."""
    likely = np.zeros((2, 4, 3, 3), np.float32)
    likely[1, 2:] = 0.8
    likely[0] = 1 - likely[1]
    fine = Grid((16, 3, 3), np.diag([0.25, 1.0, 1.0, 1.0]))
    fine.affine[0, 3] = -0.375
    along = segment.most_likely(likely, np.eye(4), fine)[:, 1, 1]
    # The probability passes .5 at 1 + .5 / .8 = 1.625 coarse voxels: after 8 of the fine ones.
    np.testing.assert_array_equal(along, np.arange(16) * 0.25 - 0.375 > 1.625)


@pytest.mark.parametrize("axes", ["RAS", "permuted, flipped"])
def test_slab_by_slab_it_is_the_same(monkeypatch, axes):
    likely = np.random.default_rng(0).random((3, 9, 8, 7), np.float32)
    affine = np.eye(4)
    affine[:3, :3] = AXES[axes] * (0.6, 0.7, 0.3)
    affine[:3, 3] = np.where(AXES[axes].sum(axis=1) > 0, -0.4, 7.1)
    fine = Grid((14, 13, 25), affine)
    whole = segment.most_likely(likely, np.eye(4), fine)
    monkeypatch.setattr(segment, "_SLAB_VOXELS", 700)
    assert len(np.unique(whole)) == 3
    np.testing.assert_array_equal(segment.most_likely(likely, np.eye(4), fine), whole)


def test_nothing_is_predicted_where_nothing_was_looked_at(bright):
    likely = np.zeros((2, 3, 3, 3), np.float32)
    likely[1] = 1
    wide = Grid((9, 3, 3), np.eye(4))
    wide.affine[0, 3] = -3
    np.testing.assert_array_equal(segment.most_likely(likely, np.eye(4), wide)[:, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("slices", "size_mm"), [(98, 0.6), (104, 0.7), (203, 0.3), (512, 0.65), (109, 0.625), (61, 1.0)]
)
def test_a_scan_has_labels_up_to_its_last_voxels(slices, size_mm):
    """The prepared grid may end a quarter of its voxel before them."""
    where = positions(slices, size_mm, 2.0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[2, 3] = where[0] * size_mm
    likely = np.stack([np.full((4, 4, len(where)), share, np.float32) for share in (0.2, 0.8)])
    found = segment.most_likely(likely, affine, Grid((4, 4, slices), np.diag([2.0, 2.0, size_mm, 1.0])))
    assert (found == 1).all()
    affine[2, 3] += 40
    found = segment.most_likely(likely, affine, Grid((4, 4, slices), np.diag([2.0, 2.0, size_mm, 1.0])))
    assert (found[..., : int(38 / size_mm)] == 0).all(), "nothing was looked at there"


@pytest.mark.parametrize("shape", [(20, 30, 64), (40, 33, 70), (65, 32, 129)])
def test_progress_counts_every_crop(bright, shape):
    seen = []
    segment.probabilities(bright.network, np.zeros(shape, np.int16), progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] == segment.num_crops(shape, bright.network.encoder.preparation)


@pytest.mark.parametrize(
    ("crop", "together"), [((64, 64, 64), 4), ((32, 32, 64), 16), ((16, 16, 16), 32), ((96, 96, 96), 1)]
)
def test_few_crops_are_segmented_together_as_the_decoders_maps_are_large(crop, together):
    assert segment.crops_at_once(crop) == together


def test_how_many_crops_are_segmented_together_changes_nothing(monkeypatch):
    network = SegmentationNetwork(small_study.encoder(attention=False), 2).eval()
    hu, _ = small_study.case(0)
    many = segment.probabilities(network, hu)
    monkeypatch.setattr(segment, "VOXELS_AT_ONCE", 0)
    np.testing.assert_allclose(segment.probabilities(network, hu), many, atol=1e-6)


def test_a_network_in_training_is_refused(bright):
    class Plain(nn.Module):
        pass

    network = SegmentationNetwork(bright.network.encoder, 2)
    with pytest.raises(ValueError, match=r"eval\(\)"):
        segment.probabilities(network.train(), np.zeros((32, 32, 64), np.int16))
    network.eval()


@pytest.fixture(scope="module")
def series(real_data):
    (scan,) = [each for each in index([real_data / "dicom_series"])[0] if len(each.files) == 30]
    return scan


def test_dicom_seg_refers_to_patient_and_slices(tmp_path, bright, series):
    highdicom = pytest.importorskip("highdicom", reason="the extra `seg` is not installed")
    found = segment.predict([bright], series, tmp_path, to="dicom-seg")
    nifti = np.asarray(nibabel.load(segment.predict([bright], series, tmp_path).path).dataobj)
    written = highdicom.seg.segread(found.path)
    source = {path: pydicom.dcmread(path, stop_before_pixels=True) for path in series.files}
    first = next(iter(source.values()))
    for word in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert written.get(word) == first.get(word)
    assert [each.SegmentLabel for each in written.SegmentSequence] == ["dense", "bone"]
    assert {each.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for each in written.SegmentSequence} == {"Tissue"}
    ordered = sorted(source.values(), key=lambda header: float(header.ImagePositionPatient[2]))
    uids = [header.SOPInstanceUID for header in ordered]
    frames = written.get_pixels_by_source_instance(uids, combine_segments=True, ignore_spatial_locations=True)
    table = np.array([0, 4, 9])
    np.testing.assert_array_equal(table[frames.transpose(2, 1, 0)], nifti)
    assert (nifti > 0).any()


def test_dicom_seg_of_what_nothing_can_refer_to_is_refused_before_the_work(tmp_path, bright, series):
    files = []
    for file in series.files:
        data = pydicom.dcmread(file)
        data.StudyInstanceUID = ""
        data.save_as(tmp_path / file.name)
        files.append(tmp_path / file.name)
    bare = replace(series, files=tuple(files))
    with pytest.raises(DagmanError, match=r"E-DICOM .*lacks StudyInstanceUID, which a segmentation refers to"):
        segment.predict([bright], bare, tmp_path / "out", to="dicom-seg", progress=pytest.fail)


@pytest.mark.parametrize("window_hu", [(-1000.0, 400.0), (-1350.0, 150.0), (-175.0, 250.0)])
def test_a_volume_shorter_than_the_crop_is_padded_with_air_as_in_training(window_hu):
    preparation = Preparation(crop=(64, 64, 64), window_hu=window_hu)
    network = SegmentationNetwork(small_study.encoder(preparation=preparation), 2).eval()
    hu = small_study.case(0)[0]
    found = segment.probabilities(network, hu)
    padded = padded_crop(hu, (-14, -14, -14), (64, 64, 64), AIR_HU)
    with torch.inference_mode():
        scores = network(torch.from_numpy(crops.window(padded, window_hu))[None, None])
    alone = torch.softmax(scores[0], dim=0).numpy()[:, 14:50, 14:50, 14:50]
    np.testing.assert_allclose(found, alone, atol=1e-5)


def test_dicom_seg_of_a_nifti_is_refused(tmp_path, bright):
    image = nibabel.Nifti1Image(body((40, 36, 34), (2, 2, 2)), np.diag([2.0, 2.0, 2.0, 1.0]))
    Path(tmp_path / "scan.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    (scan,), _ = index([tmp_path / "scan.nii.gz"])
    with pytest.raises(DagmanError, match=r"E-FORMAT.*is no DICOM"):
        segment.predict([bright], scan, tmp_path, to="dicom-seg")
