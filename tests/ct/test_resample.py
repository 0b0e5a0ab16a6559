"""Resampling and the body's box: what must pass through unchanged, and what must not be cut off."""

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st

from dagman.ct.resample import body_box, nearest, positions, resample, resampled_affine, taps

spacings = st.floats(0.3, 6.0)


@given(num=st.integers(1, 400), spacing_mm=spacings, target_mm=st.sampled_from([1.0, 1.5, 2.0, 3.0]))
def test_the_new_grid_has_the_same_centre_and_extent(num, spacing_mm, target_mm):
    where = positions(num, spacing_mm, target_mm)
    assert where.mean() == pytest.approx((num - 1) / 2, abs=1e-6)
    np.testing.assert_allclose(np.diff(where) * spacing_mm, target_mm, rtol=1e-9)
    if num * spacing_mm >= target_mm:
        assert abs(len(where) * target_mm - num * spacing_mm) <= target_mm / 2 + 1e-6


@given(num=st.integers(2, 200), spacing_mm=spacings, antialias=st.booleans())
def test_constants_pass_everywhere_and_ramps_away_from_the_edge(num, spacing_mm, antialias):
    axis = taps(num, spacing_mm, 2.0, antialias=antialias)
    where = positions(num, spacing_mm, 2.0)
    np.testing.assert_allclose(axis.weights.sum(axis=1), 1, atol=1e-5)
    reach = np.ceil(2.0 / spacing_mm) + 1
    inner = (where > reach) & (where < num - 1 - reach)
    ramp = (axis.weights * axis.source).sum(axis=1)
    np.testing.assert_allclose(ramp[inner], where[inner], atol=1e-3)
    # Beyond the edge stands the last voxel again: nothing is extrapolated.
    assert ramp.min() >= -1e-3
    assert ramp.max() <= num - 1 + 1e-3


@given(num=st.integers(2, 100), spacing_mm=spacings)
def test_no_weight_is_far_below_zero(num, spacing_mm):
    # Negative weights would ring at the skin.
    assert taps(num, spacing_mm, 2.0, antialias=True).weights.min() > -0.02


@pytest.mark.parametrize("antialias", [True, False])
def test_the_same_spacing_is_an_exact_copy(antialias):
    hu = np.random.default_rng(0).integers(-1024, 3000, (7, 8, 9)).astype(np.int16)
    result = resample(hu, (2.0, 2.0, 2.0), 2.0, antialias=antialias)
    assert result.dtype == np.int16
    np.testing.assert_array_equal(result, hu)


def test_linear_resampling_is_that_of_simpleitk():
    hu = np.random.default_rng(1).normal(0, 200, (40, 30, 20)).astype(np.float32)
    spacing_mm = (0.8, 1.25, 5.0)
    ours = resample(hu, spacing_mm, 2.0, antialias=False)
    affine = resampled_affine(np.diag([*spacing_mm, 1.0]), hu.shape, 2.0)
    image = sitk.GetImageFromArray(hu.transpose(2, 1, 0))
    image.SetSpacing(spacing_mm)
    grid = sitk.Image([*ours.shape], sitk.sitkFloat32)
    grid.SetSpacing((2.0, 2.0, 2.0))
    grid.SetOrigin(affine[:3, 3].tolist())
    theirs = sitk.GetArrayFromImage(sitk.Resample(image, grid, sitk.Transform(), sitk.sitkLinear, -9999)).transpose(
        2, 1, 0
    )
    known = theirs > -5000  # ITK leaves out what lies beyond the last voxel's centre
    assert known.mean() > 0.5
    np.testing.assert_allclose(ours[known], theirs[known], atol=0.01)


def test_antialiasing_keeps_a_third_of_the_noise_of_plain_linear():
    hu = np.random.default_rng(2).normal(0, 12, (160, 160, 120)).astype(np.float32)
    left = {
        antialias: resample(hu, (0.8, 0.8, 1.25), 2.0, antialias=antialias)[4:-4, 4:-4, 4:-4].std()
        for antialias in (True, False)
    }
    assert left[True] == pytest.approx(2.1, abs=0.2)
    assert 6 < left[False] < 7.2, "how much plain linear keeps depends on where the grids meet"


@settings(max_examples=25, deadline=None)
@given(perm=st.permutations([0, 1, 2]), flips=st.tuples(*[st.booleans()] * 3), seed=st.integers(0, 99))
def test_turned_input_gives_turned_output(perm, flips, seed):
    hu = np.random.default_rng(seed).integers(-1000, 1000, (13, 16, 11)).astype(np.int16)
    spacing_mm = (0.7, 2.0, 3.3)
    mirrored = tuple(axis for axis in range(3) if flips[axis])
    plain = resample(hu, spacing_mm, 2.0, antialias=True)
    turned = resample(
        np.flip(hu, mirrored).transpose(perm), tuple(spacing_mm[axis] for axis in perm), 2.0, antialias=True
    )
    np.testing.assert_allclose(turned, np.flip(plain, mirrored).transpose(perm), atol=1e-2)


@settings(max_examples=50)
@given(
    shape=st.tuples(*[st.integers(2, 40)] * 3),
    spacing_mm=st.tuples(spacings, spacings, spacings),
    angle=st.floats(-0.3, 0.3),
)
def test_world_coordinates_stay(shape, spacing_mm, angle):
    """A function of world position, sampled on the old grid, is the same function on the new one."""
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing_mm
    affine[:3, 3] = (-120.5, 33.25, 900.0)
    new = resampled_affine(affine, shape, 2.0)
    centre = affine @ [*(np.array(shape) - 1) / 2, 1]
    num_new = [len(positions(num, axis_mm, 2.0)) for num, axis_mm in zip(shape, spacing_mm, strict=True)]
    np.testing.assert_allclose(new @ [*(np.array(num_new) - 1) / 2, 1], centre, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(new[:3, :3], axis=0), 2.0)
    np.testing.assert_allclose(new[:3, :3] / 2.0, turn, atol=1e-9)


def test_a_linear_field_of_world_mm_is_found_at_the_same_mm():
    spacing_mm, slope = (0.8, 1.5, 4.0), np.array([3.0, -2.0, 1.5])
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = (-50, 20, 7)
    index = np.indices((60, 40, 25)).reshape(3, -1)
    world = affine[:3, :3] @ index + affine[:3, 3:]
    field = (slope @ world).reshape(60, 40, 25).astype(np.float32)
    result = resample(field, spacing_mm, 2.0, antialias=True)
    new = resampled_affine(affine, field.shape, 2.0)
    found = new[:3, :3] @ np.indices(result.shape).reshape(3, -1) + new[:3, 3:]
    inner = (slice(4, -4),) * 3
    error = np.abs(result - (slope @ found).reshape(result.shape))[inner]
    assert error.max() < 3e-3  # slope 3 HU/mm: 1e-3 mm


@given(shape=st.tuples(*[st.integers(1, 20)] * 3), spacing_mm=st.tuples(spacings, spacings, spacings))
def test_labels_take_the_nearest_voxel_on_the_same_grid(shape, spacing_mm):
    labels = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    result = nearest(labels, spacing_mm, 2.0)
    found = np.stack(np.unravel_index(result.ravel(), shape), axis=1).reshape(*result.shape, 3)
    for axis, (num, axis_mm) in enumerate(zip(shape, spacing_mm, strict=True)):
        where = positions(num, axis_mm, 2.0)
        line = np.moveaxis(found[..., axis], axis, 0)
        assert (line == line[:, :1, :1]).all()
        assert np.abs(np.clip(where, 0, num - 1) - line[:, 0, 0]).max() <= 0.5 + 1e-5


def _patient() -> np.ndarray:
    """Body of 80 mm across with an arm beside it, over a table top 4 mm thin with a rail."""
    x, y, _ = np.indices((90, 90, 60))
    hu = np.full(x.shape, -1000, np.int16)
    hu[(x - 40) ** 2 + (y - 50) ** 2 < 20**2] = 40
    hu[(x - 74) ** 2 + (y - 50) ** 2 < 5**2] = 40
    hu[:, 20:22] = -50
    hu[5:9, 4:8, :] = 300
    return hu


def test_the_box_holds_body_and_arm_with_air_around_and_leaves_the_table():
    x, y, z = body_box(_patient(), 2.0)
    assert 40 - 19 - 9 <= x.start <= 40 - 19 - 5
    assert 74 + 5 + 5 <= x.stop <= 74 + 5 + 9
    assert 23 <= y.start <= 26
    assert 69 + 5 <= y.stop <= 69 + 9
    assert (z.start, z.stop) == (0, 60)


def test_the_box_holds_the_mask_and_a_volume_without_body_stays_whole():
    keep = np.zeros((90, 90, 60), bool)
    keep[88, 3, 30] = True
    box = body_box(_patient(), 2.0, keep)
    assert keep[box].any()
    assert body_box(np.full((20, 21, 22), -1000, np.int16), 2.0) == (slice(0, 20), slice(0, 21), slice(0, 22))


def test_no_real_anatomy_is_cut_off(real_data):
    """What lies outside the box of a sarcoma patient's leg is the table: it touches the edge of the scan."""
    import nibabel as nib
    from scipy import ndimage

    image = nib.as_closest_canonical(nib.load(real_data / "sts" / "STS_004_ct.nii.gz"))
    spacing_mm = tuple(float(size) for size in np.linalg.norm(image.affine[:3, :3], axis=0))
    hu = resample(np.asarray(image.dataobj, dtype=np.float32), spacing_mm, 2.0, antialias=True)
    box = body_box(hu, 2.0)
    assert box != tuple(slice(0, num) for num in hu.shape), "this scan shows a table to remove"
    outside = hu > -300
    outside[box] = False
    assert outside.sum() > 1000
    # Nothing outside hangs together with the largest part inside, once sheets of a few mm are opened.
    inner = ndimage.binary_opening(hu > -300, iterations=2)
    parts, _ = ndimage.label(inner)
    largest = parts == np.bincount(parts[parts > 0]).argmax()
    assert not (largest & outside).any()
