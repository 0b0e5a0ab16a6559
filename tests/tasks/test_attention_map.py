"""The map lies where the scan lies, on one scale, whatever the order of the file's axes."""

import dataclasses
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from torch.nn import functional

from dagman.ct.index import index
from dagman.ct.phantom import make as make_phantom
from dagman.ct.read import Limits, read
from dagman.errors import DagmanError
from dagman.figures import attention as figure
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.vit import ViTConfig, ViTEncoder
from dagman.tasks import attention
from dagman.types import Features, Preparation, Scan, Volume

CROP = (32, 32, 32)
NETWORK = SwinConfig(
    embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), attention=AttentionConfig(stage=1, num_heads=4)
)


class Planted(SwinEncoder):
    """An encoder whose attention is known: `look` of the images, in place of what the network would compute."""

    def look(self, images):
        raise NotImplementedError

    def forward(self, images, hidden=None, dropped=None):
        looks = self.look(images).flatten(1)
        batch, cells = looks.shape
        nothing = torch.zeros(batch, self.config.cell_width)
        return Features(
            tokens=nothing[:, None].expand(batch, cells, -1),
            cls=nothing,
            attention=looks / looks.sum(dim=1, keepdim=True),
            pooled=torch.zeros(batch, self.config.final_width),
            pyramid=(),
        )


class Brightness(Planted):
    """Attends to a cell by the square of its brightness."""

    def look(self, images):
        return functional.avg_pool3d(images, self.config.cell_side) ** 2 + 1e-3


class UpThenDown(Planted):
    """Attends to the upper half of every second crop and to the lower half of the others."""

    calls = 0
    """Crops seen."""

    def look(self, images):
        looks = torch.full((len(images), 8, 8, 8), 1e-9)
        for look in looks:
            self.calls += 1
            look[..., slice(4, None) if self.calls % 2 else slice(4)] = 1
        return looks


def make(kind=SwinEncoder, crop=CROP, stage=1):
    torch.manual_seed(0)
    encoder = kind(dataclasses.replace(NETWORK, attention=AttentionConfig(stage=stage, num_heads=4))).eval()
    encoder.preparation = Preparation(crop=crop)
    return encoder


def body(shape=(60, 50, 36)):
    """A body of water-like tissue in air with one bright block, whose middle is returned in voxels."""
    hu = np.full(shape, -1000, np.int16)
    hu[4:-4, 4:-4, 3:-3] = -60 + np.random.default_rng(0).integers(-20, 20, (shape[0] - 8, shape[1] - 8, shape[2] - 6))
    hu[40:47, 12:20, 22:26] = 400
    return hu, np.array([43.0, 15.5, 23.5])


def oblique(spacing, order, signs):
    """An affine whose voxel axes follow world axes in this order and direction, turned by about 20 degrees."""
    a, b = 0.3, 0.15
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ np.eye(3)[:, list(order)] * np.multiply(spacing, signs)
    affine[:3, 3] = (-57.3, 21.9, 803.4)
    return affine


def centre_of_mass(values, above):
    hot = np.where(values > above, values, 0)
    return (np.indices(hot.shape) * hot).sum(axis=(1, 2, 3)) / hot.sum()


AXES = [
    ((0, 1, 2), (1, 1, 1)),
    ((0, 1, 2), (-1, -1, 1)),
    ((1, 0, 2), (1, -1, -1)),
    ((2, 0, 1), (-1, 1, 1)),
    ((1, 2, 0), (1, 1, -1)),
]


@pytest.mark.parametrize(("order", "signs"), AXES)
def test_a_bright_block_lights_up_at_its_place_in_the_world_and_on_the_inputs_grid(tmp_path, order, signs):
    hu, block = body()
    affine = oblique((1.4, 1.6, 2.5), order, signs)
    path = tmp_path / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(hu, affine), path)
    (scan,), _ = index([path])
    (found,) = attention.explain({"bright": make(Brightness)}, scan, tmp_path).looks.values()
    source, written = nibabel.load(path), nibabel.load(found.nifti)
    assert written.shape == source.shape
    np.testing.assert_array_equal(written.affine, source.affine)
    assert written.get_data_dtype() == np.float32
    values = written.get_fdata()
    shift_mm = written.affine[:3, :3] @ (centre_of_mass(values, values.max() / 2) - block)
    assert np.linalg.norm(shift_mm) < 2.5
    assert values.max() == pytest.approx(found.pointing.highest, rel=1e-4)
    assert values.max() > 4
    ours, theirs = (SimpleITK.ReadImage(str(file)) for file in (found.nifti, path))
    for what in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(ours, what)(), getattr(theirs, what)(), atol=1e-4)


def test_uniform_attention_is_one_everywhere():
    encoder = make()
    with torch.no_grad():
        for block in encoder.semantic_attention.blocks:
            block.qkv.weight.zero_()
            block.qkv.bias.zero_()
    hu = np.full((70, 45, 30), 40, np.int16)
    values = attention.attention_map(encoder, Volume(hu=hu, affine=np.diag([1.0, 2.0, 3.0, 1.0])))
    assert values.shape == hu.shape
    np.testing.assert_allclose(values, 1, atol=1e-4)


def test_a_map_of_one_crop_is_its_row_times_the_number_of_cells():
    encoder = make()
    hu = np.random.default_rng(1).integers(-100, 200, CROP).astype(np.int16)
    values = attention.attention_map(encoder, Volume(hu=hu, affine=np.diag([2.0, 2.0, 2.0, 1.0])))
    image = torch.from_numpy((np.clip(hu, -175, 250) + 175) / np.float32(425))[None, None]
    with torch.inference_mode():
        row = encoder(image).attention[0].numpy().reshape(8, 8, 8) * 512
    # The middle of a cell of 4 voxels lies between its second and third.
    middles = values.reshape(8, 4, 8, 4, 8, 4)[:, 1:3, :, 1:3, :, 1:3].mean(axis=(1, 3, 5))
    assert np.corrcoef(middles.ravel(), row.ravel())[0, 1] > 0.97
    assert values.mean() == pytest.approx(1, abs=0.02)


def test_the_map_does_not_depend_on_how_the_scan_is_sampled():
    """The same object on fine and on coarse voxels: the maps agree where both are seen."""
    grid = np.indices((64, 48, 40)).transpose(1, 2, 3, 0) + 0.5
    smooth = (60 * np.sin(grid / 7).sum(axis=-1)).astype(np.int16)
    fine = smooth.repeat(2, 0).repeat(2, 1).repeat(2, 2)
    affine, half = np.diag([2.0, 2.0, 2.0, 1.0]), np.diag([1.0, 1.0, 1.0, 1.0])
    half[:3, 3] = -0.5
    encoder = make(Brightness)
    coarse_map = attention.attention_map(encoder, Volume(hu=smooth, affine=affine))
    fine_map = attention.attention_map(encoder, Volume(hu=fine, affine=half))
    blocks = fine_map.reshape(64, 2, 48, 2, 40, 2).mean(axis=(1, 3, 5))
    assert np.abs(blocks - coarse_map).mean() < 0.05 * coarse_map.mean()


def test_far_from_the_body_nothing_was_looked_at():
    hu = np.full((120, 60, 40), -1000, np.int16)
    hu[80:, 4:-4, 3:-3] = 40
    values = attention.attention_map(make(), Volume(hu=hu, affine=np.diag([2.0, 2.0, 2.0, 1.0])))
    assert (values[:60] == 0).all()
    assert (values[80:] > 0).all()


@settings(max_examples=40, deadline=None)
@given(st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3), st.integers(0, 10**6))
def test_onto_a_grid_in_another_order_is_the_transposed_and_flipped_array(order, flips, seed):
    values = np.random.default_rng(seed).random((5, 6, 7)).astype(np.float32)
    affine = oblique((1.0, 2.0, 3.0), (0, 1, 2), (1, 1, 1))
    wanted = np.flip(values.transpose(order), [axis for axis in range(3) if flips[axis]])
    turn = np.zeros((4, 4))
    turn[3, 3] = 1
    for axis, source in enumerate(order):
        turn[source, axis] = -1 if flips[axis] else 1
        turn[source, 3] = values.shape[source] - 1 if flips[axis] else 0
    found = attention.onto(values, affine, attention.Grid(wanted.shape, affine @ turn))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_the_mean_of_the_heads_is_the_attention_of_the_features(kind):
    torch.manual_seed(0)
    encoder = make() if kind == "swin" else ViTEncoder(ViTConfig(width=24, depth=2, num_heads=4)).eval()
    images = torch.rand(2, 1, 32, 32, 64)
    rows = attention.head_rows(encoder, images)
    with torch.inference_mode():
        wanted = encoder(images).attention
    assert rows.shape == (2, 4, wanted.shape[1])
    torch.testing.assert_close(rows.mean(dim=1), wanted, rtol=1e-5, atol=1e-8)
    assert (rows.std(dim=1) > 0).any(), "heads differ"
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_maps_of_the_heads_have_the_map_as_their_mean():
    encoder = make()
    hu = np.random.default_rng(1).integers(-100, 200, (40, 36, 32)).astype(np.int16)
    volume = Volume(hu=hu, affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    maps = attention.head_maps(encoder, volume)
    assert maps.shape == (4, *hu.shape)
    np.testing.assert_allclose(maps.mean(axis=0), attention.attention_map(encoder, volume), rtol=1e-4, atol=1e-5)
    level = np.diag([2.0, 2.0, 2.0, 1.0])
    level[2, 3] = 2.0 * 11
    plane = attention.head_maps(encoder, volume, attention.Grid((40, 36, 1), level))
    np.testing.assert_allclose(plane[..., 0], maps[..., 11], atol=1e-5)


def test_a_volume_of_other_axes_or_with_nan_is_refused():
    """What nibabel gives of an LPS file: its map would be that of a mirrored patient."""
    hu = np.full((40, 36, 32), 40, np.int16)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for other, codes in ((np.diag([-2.0, -2.0, 2.0, 1.0]), "LPS"), (affine[[1, 0, 2, 3]], "ARS")):
        with pytest.raises(DagmanError, match=f"E-ORIENT.*run to {codes}, where RAS is wanted"):
            attention.attention_map(make(), Volume(hu=hu, affine=other))
    broken = hu.astype(np.float32)
    broken[3, 3, 3] = np.nan
    with pytest.raises(DagmanError, match="E-NONFINITE"):
        attention.attention_map(make(), Volume(hu=broken, affine=affine))


def test_of_several_encoders_the_one_without_attention_is_named_before_the_work(tmp_path):
    encoders = {
        "with": make(),
        "without": SwinEncoder(SwinConfig(embed_dim=12, num_heads=(2, 2, 4, 4), attention=None)),
    }
    with pytest.raises(DagmanError, match="E-NOATTENTION without: has no semantic attention"):
        attention.explain(
            encoders, Scan(case_id="a", files=(tmp_path / "none.nii.gz",), kind="nifti"), tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_an_encoder_without_semantic_attention_is_refused():
    plain = SwinEncoder(SwinConfig(embed_dim=12, num_heads=(2, 2, 4, 4), depths=(2, 2, 2, 2), attention=None)).eval()
    with pytest.raises(DagmanError, match="E-NOATTENTION"):
        attention.attention_map(plain, Volume(hu=np.zeros((40, 40, 40), np.int16), affine=np.eye(4)))


def test_planes_go_through_the_mask_or_the_most_attended_voxel_of_the_body():
    values, inside = np.random.default_rng(0).random((9, 8, 7)).astype(np.float32), np.zeros((9, 8, 7), bool)
    values[0, 0, 0], values[3, 4, 5], inside[2:6, 2:6, 2:6] = 9, 5, True
    mask = np.zeros_like(inside)
    mask[6:9, 1:4, 0:3] = True
    assert attention.centre(values, inside) == (3, 4, 5)
    assert attention.centre(values, inside, mask) == (7, 2, 1)


def test_planes_without_a_mask_show_the_body_and_do_not_graze_its_skin() -> None:
    where = np.indices((40, 30, 20)) - np.array([20, 15, 10])[:, None, None, None]
    body = (where**2 / np.array([18, 13, 9])[:, None, None, None] ** 2).sum(axis=0) <= 1
    values = np.zeros(body.shape, np.float32)
    values[20, 27, 10] = 9  # the skin of the back
    values[25, 18, 12] = 3
    x, y, z = attention.centre(values, body)
    assert (x, y, z) == (25, 18, 12)
    areas = body[x].sum(), body[:, y].sum(), body[:, :, z].sum()
    most = (body.sum(axis=tuple({0, 1, 2} - {axis})).max() for axis in range(3))
    assert all(2 * area >= largest for area, largest in zip(areas, most, strict=True))
    lonely = np.zeros((3, 3, 3), bool)
    lonely[[0, 1, 2], [0, 1, 2], [0, 1, 2]] = True
    assert lonely[attention.centre(np.where(lonely, 1, 0).astype(np.float32), lonely)]


def test_a_dicom_series_gets_its_map_on_its_own_rows_and_columns(tmp_path, real_data):
    folder = real_data / "dicom_series" / "lung_dx_A0002_B40f"
    (scan,), _ = index([folder])
    encoders = {"bright": make(Brightness, (128, 128, 128), stage=3)}
    (found,) = attention.explain(encoders, scan, tmp_path).looks.values()
    series = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    written = SimpleITK.ReadImage(str(found.nifti))
    for what in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(written, what)(), getattr(series, what)(), atol=1e-3)
    # It looks at what is bright, and knows the patient from the air around.
    values, hu = (SimpleITK.GetArrayFromImage(image) for image in (written, series))
    assert values[hu > 100].mean() > 2 * values[hu < -900].mean()
    assert 0.2 < attention.body_of(read(scan)).mean() < 0.8


def test_a_metaimage_gets_its_map_on_its_own_grid(tmp_path):
    made = make_phantom(0, 0).volume
    image = SimpleITK.GetImageFromArray(made.hu.transpose(2, 1, 0)[::-1].copy())
    image.SetSpacing(made.spacing_mm)
    image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, -1))
    SimpleITK.WriteImage(image, str(tmp_path / "scan.mha"))
    (scan,), _ = index([tmp_path / "scan.mha"])
    (found,) = attention.explain({"made": make()}, scan, tmp_path).looks.values()
    written = SimpleITK.ReadImage(str(found.nifti))
    for what in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(written, what)(), getattr(image, what)(), atol=1e-3)


def test_a_part_of_a_scan_is_shown_with_air_around_it_where_limits_allow_that(tmp_path, real_data):
    image = real_data / "lidc" / "LIDC-IDRI-0002_substack_native.nii.gz"
    (scan,), _ = index([image])
    with pytest.raises(DagmanError, match="E-SMALL"):
        attention.explain({"made": make()}, scan, tmp_path)
    (found,) = attention.explain({"made": make()}, scan, tmp_path, limits=Limits(min_extent_mm=10.0)).looks.values()
    written = nibabel.load(found.nifti)
    assert written.shape == nibabel.load(image).shape
    assert (written.get_fdata() > 0).any(axis=(0, 1)).all()


def test_the_body_is_the_patient_with_lungs_and_without_the_table():
    phantom = make_phantom(0, 0)
    found = attention.body_of(phantom.volume)
    truth = phantom.organs > 0
    assert (found & truth).sum() / truth.sum() > 0.95
    assert (found & ~truth).sum() / found.sum() < 0.05
    air = Volume(hu=np.full((20, 20, 20), -1000, np.int16), affine=np.eye(4))
    assert attention.body_of(air).all()


def test_neighbouring_crops_blend_without_seams_also_at_the_border():
    hu = np.full((48, 32, 32), 40, np.int16)
    values = attention.attention_map(make(UpThenDown), Volume(hu=hu, affine=np.diag([2.0, 2.0, 2.0, 1.0])))
    assert values[0, :, 31].min() == pytest.approx(2, abs=0.01)
    assert values[47, :, 31].max() == pytest.approx(0, abs=0.01)
    # The Gaussian weights let the map change by half a unit a voxel; a seam would be a step of one.
    assert np.abs(np.diff(values, axis=0)).max() < 0.6


@pytest.mark.parametrize(
    ("name", "corners"),
    [
        # Value of a voxel is 100 x + 10 y + z: top left, top right, bottom left of each picture.
        ("axial", (100 * 3 + 10 * 2 + 1, 10 * 2 + 1, 100 * 3 + 1)),
        ("coronal", (100 * 3 + 10 + 4, 10 + 4, 100 * 3 + 10)),
        ("sagittal", (100 + 10 * 2 + 4, 100 + 4, 100 + 10 * 2)),
    ],
)
def test_planes_are_shown_in_radiological_convention(name, corners):
    """The patient's right (or front) is at the left of the picture, the front (or head) at its top."""
    x, y, z = np.indices((4, 3, 5))
    plane = next(plane for plane in figure.PLANES if plane.name == name)
    picture = figure.shown(100 * x + 10 * y + z, plane, (1, 1, 1))
    assert (picture[0, 0], picture[0, -1], picture[-1, 0]) == corners


def scene(values, shape=(60, 40, 50), **changes):
    hu = np.full(shape, 40, np.int16)
    return figure.Scene(
        **{
            "title": "case",
            "hu": hu,
            "attention": {"run": np.full(shape, values, np.float32)},
            "spacing_mm": (2.0, 2.0, 3.0),
            "centre": (30, 20, 25),
            "window_hu": (-175.0, 250.0),
            **changes,
        }
    )


def test_colours_are_red_above_uniform_blue_below_and_none_at_it(tmp_path):
    for values, wanted in ((1.0, "grey"), (4.0, "red"), (0.25, "blue")):
        path = tmp_path / f"{wanted}.png"
        figure.write_png(scene(values), path)
        picture = imread(path)  # the CT, and below it the attention over it
        part = picture[len(picture) - 330 : len(picture) - 240, 120:250, :3]
        red, _, blue = np.median(part.reshape(-1, 3), axis=0)
        assert {"grey": abs(red - blue) < 0.02, "red": red > blue + 0.2, "blue": blue > red + 0.1}[wanted]


def test_a_voxel_that_was_not_measured_has_no_colour(tmp_path):
    for values in (0.0, 1.0):
        figure.write_png(scene(values), tmp_path / f"{values}.png")
    nothing, uniform = (imread(tmp_path / f"{values}.png")[60:-60] for values in (0.0, 1.0))
    np.testing.assert_allclose(nothing, uniform, atol=1e-6)


@pytest.mark.parametrize("shape", [(200, 20, 20), (20, 20, 400), (33, 200, 17)])
def test_pictures_of_long_and_flat_scans_keep_their_proportions_and_a_readable_size(tmp_path: Path, shape):
    mask = np.zeros(shape, bool)
    mask[5:9, 5:9, 5:9] = True
    figure.write_png(scene(2.0, shape, centre=(7, 7, 7), mask=mask), tmp_path / "case.png")
    height, width, _ = imread(tmp_path / "case.png").shape
    assert 100 < height < 1100
    assert 700 < width < 1500
