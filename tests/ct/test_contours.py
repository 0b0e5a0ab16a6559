"""Filling contours: hand-made cases, holes, borders, and the same answer as another library's point-in-polygon test."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagman.ct.contours import fill

SQUARE = np.array([[1.0, 1], [5, 1], [5, 4], [1, 4]])


def test_a_square_holds_its_left_and_lower_border_only() -> None:
    expected = np.zeros((8, 7), bool)
    expected[1:5, 1:4] = True
    assert (fill([SQUARE], (8, 7)) == expected).all()


def test_two_halves_share_no_pixel_and_leave_none_out() -> None:
    left, right = SQUARE * [0.5, 1], SQUARE * [0.5, 1] + [2, 0]
    both = fill([left], (8, 7)).astype(int) + fill([right], (8, 7))
    assert (both == fill([np.array([[0.5, 1], [4.5, 1], [4.5, 4], [0.5, 4]])], (8, 7))).all()


def test_what_two_contours_share_is_a_hole() -> None:
    ring = fill([SQUARE * 3, (SQUARE - 2) + 8], (20, 20))
    assert (ring == fill([SQUARE * 3], (20, 20)) ^ fill([(SQUARE - 2) + 8], (20, 20))).all()
    assert not ring[8, 8]


def test_a_keyhole_contour_is_a_ring() -> None:
    outer, inner = SQUARE * 4, (SQUARE - [3, 2.5]) + [12, 10]
    keyhole = np.vstack([outer, outer[:1], inner[::-1][-1:], inner[::-1], outer[:1]])
    assert (fill([keyhole], (24, 20)) == fill([outer, inner], (24, 20))).mean() > 0.99


def test_a_contour_may_leave_the_image_and_may_be_outside() -> None:
    assert fill([SQUARE * 100 - 200], (8, 7)).all()
    assert not fill([SQUARE + 100], (8, 7)).any()
    assert not fill([SQUARE - 100], (8, 7)).any()
    assert not fill([], (8, 7)).any()


def test_points_and_lines_hold_nothing() -> None:
    assert not fill([np.array([[3.0, 3.0]]), np.array([[1.0, 1], [6, 5]])], (8, 7)).any()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-3, 12), st.floats(-3, 12)), min_size=3, max_size=12))
def test_every_pixel_agrees_with_another_library(points: list[tuple[float, float]]) -> None:
    """Where no centre lies within rounding of an edge, matplotlib's test of a simple triangle says the same."""
    path = pytest.importorskip("matplotlib.path")
    triangle = np.array(points[:3]) + np.array([0.1234567, 0.0765432])
    centres = np.stack(np.meshgrid(np.arange(10.0), np.arange(9.0), indexing="ij"), -1).reshape(-1, 2)
    if abs(np.linalg.det(np.c_[triangle, np.ones(3)])) < 1e-2:
        return
    inside, near = (
        path.Path(np.vstack([triangle, triangle[:1]]), closed=True).contains_points(centres, radius=radius)
        for radius in (1e-6, -1e-6)
    )
    clear = (inside == near).reshape(10, 9)
    assert (fill([triangle], (10, 9)) == inside.reshape(10, 9))[clear].all()


def test_the_area_of_a_disc() -> None:
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    disc = np.c_[50.3 + 30.2 * np.cos(angles), 49.1 + 30.2 * np.sin(angles)]
    assert fill([disc], (100, 100)).sum() == pytest.approx(np.pi * 30.2**2, rel=0.005)
