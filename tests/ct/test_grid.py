"""Axes of volumes: what was turned to RAS+ passes, whatever its angles."""

import itertools

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagman.ct import grid
from dagman.errors import DagmanError

ANGLES = st.one_of(st.sampled_from([0, np.pi / 4, np.pi / 2, -np.pi / 4, np.pi]), st.floats(-np.pi, np.pi))


def turned(angles: tuple[float, float, float], sizes: tuple[float, float, float]) -> np.ndarray:
    affine = np.eye(4)
    for (first, second), angle in zip(itertools.combinations(range(3), 2), angles, strict=True):
        about = np.eye(4)
        about[[first, second], [first, second]] = np.cos(angle)
        about[first, second], about[second, first] = -np.sin(angle), np.sin(angle)
        affine = affine @ about
    affine[:3, :3] *= sizes
    return affine


@given(st.tuples(ANGLES, ANGLES, ANGLES), st.tuples(*[st.floats(0.3, 5)] * 3))
def test_what_was_turned_to_ras_is_not_refused(
    angles: tuple[float, float, float], sizes: tuple[float, float, float]
) -> None:
    affine = turned(angles, sizes)
    grid.check_ras(grid.to_ras(np.zeros((2, 3, 4)), affine)[1])
    grid.check_ras(nibabel.as_closest_canonical(nibabel.Nifti1Image(np.zeros((2, 3, 4), np.int16), affine)).affine)


@pytest.mark.parametrize("axis", range(3))
def test_flipped_and_permuted_axes_are_refused(axis: int) -> None:
    ras = turned((0.3, 0.1, -0.2), (1, 2, 3))
    flipped = ras.copy()
    flipped[:, axis] *= -1
    for affine in (flipped, ras[:, [1, 2, 0, 3]]):
        with pytest.raises(DagmanError, match="E-ORIENT"):
            grid.check_ras(affine)
