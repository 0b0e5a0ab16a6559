"""Scores of hand-made regions are exact, and MONAI's where MONAI has them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from monai.metrics.utils import get_edge_surface_distance

from dagman.tasks.overlap import overlap

MM = (1.0, 1.0, 1.0)


def box(low, high, shape=(24, 24, 24)):
    region = np.zeros(shape, bool)
    region[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return region


CUBE = box((4, 4, 4), (14, 14, 14))
NOTHING = np.zeros_like(CUBE)


def test_equal_regions():
    same = overlap(CUBE, CUBE, MM)
    assert (same.dice, same.hd95_mm, same.nsd_2mm, same.volume_error_cc) == (1, 0, 1, 0)
    assert (same.lesions, same.lesions_found, same.false_positives, same.state) == (1, 1, 0, "both")
    assert same.reference_cc == pytest.approx(1.0)


def test_a_shifted_cube():
    moved = overlap(box((8, 4, 4), (18, 14, 14)), CUBE, MM)
    assert moved.dice == pytest.approx(0.6)
    assert moved.hd95_mm == pytest.approx(4.0)
    assert moved.volume_error_cc == 0


@pytest.mark.parametrize(("axis", "spacing_mm"), [(0, (3.0, 1.0, 1.0)), (1, (1.0, 2.0, 0.5)), (2, (0.7, 0.7, 5.0))])
def test_distances_are_in_mm_along_every_axis(axis, spacing_mm):
    moved = overlap(np.roll(CUBE, 3, axis), CUBE, spacing_mm)
    assert moved.hd95_mm == pytest.approx(3 * spacing_mm[axis], rel=1e-5)
    assert moved.reference_cc == pytest.approx(np.prod(spacing_mm))


def test_a_surface_within_two_mm_counts_and_beyond_does_not():
    grown = box((2, 2, 2), (16, 16, 16))
    assert overlap(grown, CUBE, (0.5, 0.5, 0.5)).nsd_2mm == 1
    assert overlap(grown, CUBE, (5.0, 5.0, 5.0)).nsd_2mm == 0


def test_volumes():
    half = overlap(box((4, 4, 4), (9, 14, 14)), CUBE, (2.0, 2.0, 2.0))
    assert (half.predicted_cc, half.volume_error_cc, half.volume_error_percent) == (4.0, -4.0, -50.0)


@pytest.mark.parametrize(
    ("predicted", "reference", "state", "dice", "hd95_mm", "percent"),
    [
        (NOTHING, NOTHING, "neither", 1, 0, None),
        (CUBE, NOTHING, "invented", 0, 24 * 3**0.5, None),
        (NOTHING, CUBE, "missed", 0, 24 * 3**0.5, -100),
    ],
)
def test_empty_regions_follow_the_rule(predicted, reference, state, dice, hd95_mm, percent):
    found = overlap(predicted, reference, MM)
    assert (found.state, found.dice, found.nsd_2mm, found.volume_error_percent) == (state, dice, dice, percent)
    assert found.hd95_mm == pytest.approx(hd95_mm)
    assert found.false_positives == (state == "invented")


def test_lesions_touching_at_a_corner_are_one_and_are_counted_by_size():
    corner = box((14, 14, 14), (15, 15, 15))
    far = box((20, 20, 20), (23, 23, 23))
    reference = CUBE | corner | far
    predicted = box((5, 5, 5), (6, 6, 6)) | box((0, 0, 0), (2, 2, 2)) | box((2, 2, 2), (3, 3, 3))
    found = overlap(predicted, reference, (2.0, 2.0, 2.0))
    assert (found.lesions, found.lesions_found, found.large_lesions, found.large_lesions_found) == (2, 1, 1, 1)
    assert found.false_positives == 1


@pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_it_is_monais_on_any_two_regions(seed):
    draw = np.random.default_rng(seed)
    ours, theirs = (draw.random((9, 8, 7)) < draw.uniform(0.05, 0.9) for _ in range(2))
    ours[0, 0, 0] = theirs[8, 7, 6] = True
    spacing_mm = tuple(draw.uniform(0.5, 4, 3).tolist())
    found = overlap(ours, theirs, spacing_mm)
    pair = [torch.from_numpy(part)[None, None] for part in (ours, theirs)]
    assert found.dice == pytest.approx(float(compute_dice(*pair)), abs=1e-6)
    how = {"include_background": True, "spacing": list(spacing_mm)}
    _, directed, _ = get_edge_surface_distance(*(part[0, 0] for part in pair), spacing=spacing_mm, symmetric=True)
    exactly = max(np.percentile(one.double().numpy(), 95) for one in directed)  # MONAI's own rank is a float32
    assert found.hd95_mm == pytest.approx(exactly, rel=1e-6)
    assert exactly == pytest.approx(float(compute_hausdorff_distance(*pair, percentile=95, **how)), abs=1e-4)
    assert found.nsd_2mm == pytest.approx(float(compute_surface_dice(*pair, class_thresholds=[2.0], **how)), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_nobody_minds_which_is_which_but_for_signs(seed):
    draw = np.random.default_rng(seed)
    ours, theirs = (draw.random((6, 6, 6)) < 0.2 for _ in range(2))
    one, other = overlap(ours, theirs, MM), overlap(theirs, ours, MM)
    assert one.dice == other.dice
    assert one.hd95_mm == pytest.approx(other.hd95_mm)
    assert one.volume_error_cc == -other.volume_error_cc
    assert one.lesions - one.lesions_found == other.false_positives
