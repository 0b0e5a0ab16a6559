"""Where crops lie, and what a network sees of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import make_store, noise

from dagman.ct.crops import (
    centred,
    centred_corner,
    centroid,
    first_corners,
    near,
    overlapping_corners,
    sliding,
    two_views,
    window,
)
from dagman.errors import DagmanError
from dagman.randomness import generator

sides = st.tuples(*[st.integers(1, 90)] * 3)


@given(hu=st.integers(-1024, 32767), low=st.integers(-1000, 500), width=st.integers(1, 3000))
def test_window_maps_its_edges_to_0_and_1(hu, low, width):
    seen = window(np.array([low, low + width, hu], np.int16), (float(low), float(low + width)))
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, [0, 1, min(max((hu - low) / width, 0), 1)], atol=1e-6)
    assert seen.min() >= 0
    assert seen.max() <= 1


@settings(max_examples=300)
@given(shape=sides, crop=sides, overlap_ratio=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_two_corners_overlap_enough_and_leave_the_volume_only_where_it_is_too_small(shape, crop, overlap_ratio, seed):
    u, v = overlapping_corners(shape, crop, overlap_ratio, generator(seed, "crops", 0))
    for first, second, num, side in zip(u, v, shape, crop, strict=True):
        assert side - abs(first - second) >= overlap_ratio * side - 1e-6
        for corner in (first, second):
            if num >= side:
                assert 0 <= corner <= num - side
            else:
                before, after = -corner, corner + side - num
                assert before in {after, after + 1, after - 1}


def test_corners_reach_every_place_and_both_directions():
    pairs = [overlapping_corners((40, 40, 40), (32, 32, 32), 0.5, generator(0, "crops", i)) for i in range(2000)]
    firsts = np.array([u for u, _ in pairs])
    assert {*firsts.ravel().tolist()} == set(range(9))
    shifts = np.array([np.subtract(v, u) for u, v in pairs])
    assert (shifts > 0).any(axis=0).all()
    assert (shifts < 0).any(axis=0).all()
    # Nothing prefers the second view's side: the mean shift is 0 within four standard errors.
    assert (np.abs(shifts.mean(axis=0)) < 4 * shifts.std(axis=0) / np.sqrt(len(shifts))).all()


def test_views_hold_a_quarter_of_body_where_the_volume_allows_it(tmp_path):
    hu = np.full((96, 96, 96), -1000, np.int16)
    hu[48:] = 40
    hu[:20, :20, :20] = -800
    store = make_store(tmp_path, {"half": hu, "air": np.full_like(hu, -1000), "small": hu[40:60, 40:60, 40:60]})
    rows = {row["case_id"]: i for i, row in enumerate(store.rows)}
    shares = []
    ratios = {"overlap_ratio": 0.5, "body_ratio": 0.25}
    for i in range(100):
        pair = two_views(store, rows["half"], (32, 32, 32), **ratios, generator=generator(1, "crops", i))
        for view, corner in zip((pair.u, pair.v), pair.corners, strict=True):
            np.testing.assert_array_equal(view, hu[tuple(slice(c, c + 32) for c in corner)])
            shares.append((view >= -950).mean())
    assert min(shares) >= 0.25
    assert min(shares) < 0.5, "views at the edge of the body are wanted, too"
    draws = ratios | {"generator": generator(1, "crops", 0)}
    assert (two_views(store, rows["air"], (32, 32, 32), **draws).u == -1000).all()
    small = two_views(store, rows["small"], (32, 32, 32), **draws)
    assert small.corners == ((-6, -6, -6), (-6, -6, -6))
    np.testing.assert_array_equal(small.u[6:26, 6:26, 6:26], hu[40:60, 40:60, 40:60])
    assert (small.u == -1024).sum() == 32**3 - 20**3


def test_a_centred_crop_has_the_mask_in_its_middle(tmp_path):
    hu, mask = noise((50, 40, 30)), np.zeros((50, 40, 30), np.uint8)
    mask[30:40, 4:8, 20:30] = 2
    store = make_store(tmp_path, {"case": hu, "plain": hu, "empty": hu}, {"case": mask, "empty": mask * 0})
    crop = centred(store, 0, (16, 16, 16), "mask")
    expected = np.pad(hu, 16, constant_values=-1024)[35 - 8 + 16 :, 6 - 8 + 16 :, 25 - 8 + 16 :][:16, :16, :16]
    np.testing.assert_array_equal(crop, expected)
    np.testing.assert_array_equal(centred(store, 0, (16, 16, 16), "centre"), hu[17:33, 12:28, 7:23])
    for row in (1, 2):
        with pytest.raises(DagmanError, match=r"E-NOMASK (empty|plain)"):
            centred(store, row, (16, 16, 16), "mask")


def test_random_crops_stay_in_the_middle_of_what_is_no_longer_than_they_are_and_go_anywhere_else(tmp_path):
    store, draws = make_store(tmp_path, {"case": noise((28, 32, 50))}), generator(0, "test")
    corners = {near(store, 0, (32, 32, 32), 0.125, draws) for _ in range(200)}
    assert {(x, y) for x, y, _ in corners} == {(-2, 0)}
    assert {z for _, _, z in corners} == set(range(19))


def test_a_crop_goes_round_the_centroid_and_not_the_middle_of_the_box(tmp_path):
    """An L: 20 voxels along x, 4 along y at its end, 2 thick; its centroid, by hand, is (12.25, 10.75, 5.5)."""
    hu, mask = noise((40, 30, 20)), np.zeros((40, 30, 20), np.uint8)
    mask[4:24, 10, 5:7] = 1
    mask[23, 11:15, 5:7] = 3
    by_hand = np.array([(20 * 13.5 + 4 * 23) / 24, (20 * 10 + 4 * 12.5) / 24, 5.5])
    np.testing.assert_allclose(centroid(mask), by_hand)
    store = make_store(tmp_path, {"case": hu}, {"case": mask})
    for crop, corner in (((8, 8, 8), (12, 7, 2)), ((9, 9, 9), (11, 6, 1))):
        np.testing.assert_array_equal(centred(store, 0, crop, "mask"), store.hu(0, corner, crop))
        assert np.abs(np.array(corner) + (np.array(crop) - 1) / 2 - by_hand).max() <= 0.5
    assert np.abs(by_hand - [13.5, 12, 5.5]).max() > 1, "the middle of the box lies elsewhere"


@given(place=st.tuples(*[st.floats(-5, 60)] * 3), crop=sides)
def test_the_middle_of_a_crop_misses_the_centroid_by_half_a_voxel_at_most(tmp_path_factory, place, crop):
    store = make_store(tmp_path_factory.mktemp("store"), {"case": np.zeros((2, 2, 2), np.int16)})
    store.rows[0]["mask"] = {"voxels": {"1": 1}, "centroid": list(place)}
    corner = np.array(centred_corner(store, 0, crop, "mask"))
    assert np.abs(corner + (np.array(crop) - 1) / 2 - place).max() <= 0.5 + 1e-6


@given(shape=sides, crop=sides, overlap_ratio=st.floats(0, 0.9))
def test_sliding_crops_cover_the_volume_and_overlap(shape, crop, overlap_ratio):
    corners = np.array(sliding(shape, crop, overlap_ratio))
    assert len({tuple(corner) for corner in corners.tolist()}) == len(corners)
    for axis, (num, side) in enumerate(zip(shape, crop, strict=True)):
        starts = np.unique(corners[:, axis])
        low, high = first_corners(num, side)
        assert (starts[0], starts[-1]) == (low, high)
        assert starts[0] <= 0
        assert starts[-1] + side >= num
        if len(starts) > 1:
            assert side - np.diff(starts).max() >= min(overlap_ratio * side - 1, side - 1)
            # No crop more than needed.
            assert (len(starts) - 2) * max(1, int((1 - overlap_ratio) * side + 1e-9)) < high - low


def test_sliding_crops_of_the_paper_size():
    assert sliding((128, 192, 100), (128, 128, 128)) == [(0, 0, -14), (0, 64, -14)]
