"""The sheet shows outlines where they are, right on the left, and works without a CT or without a reference."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from dagman.figures.segmentation import Scene, png


def scene(**changes):
    reference = np.zeros((40, 30, 20), np.uint8)
    reference[26:34, 10:20, 5:15] = 1
    given = {"title": "case", "hu": np.zeros((40, 30, 20), np.int16), "reference": reference}
    return Scene(**{**given, "predicted": np.roll(reference, -14, 0), "spacing_mm": (2.0, 2.0, 3.0), **changes})


def places(picture, colour):
    """Columns, as a share of the first panel's width, where a colour stands, below the title."""
    height, width, _ = picture.shape
    panel = picture[int(0.3 * height) :, : width // 3, :3]
    close = np.abs(panel - np.array(colour) / 255).max(axis=-1) < 0.12
    return np.flatnonzero(close.any(axis=0)) / panel.shape[1]


def test_the_patients_right_is_on_the_left():
    picture = imread(io.BytesIO(png([scene()], "title")))
    reference, predicted = places(picture, (0x37, 0xD6, 0x7A)), places(picture, (0xFF, 0x5A, 0x5F))
    assert len(reference)
    assert len(predicted)
    assert reference.max() < predicted.min()


def test_what_fills_the_picture_has_an_outline():
    full = np.ones((40, 30, 20), np.uint8)
    empty = {"hu": None, "predicted": np.zeros_like(full)}
    picture = imread(io.BytesIO(png([scene(reference=full, **empty)], "title")))
    found = places(picture, (0x37, 0xD6, 0x7A))
    assert found.max() - found.min() > 0.5


@pytest.mark.parametrize("changes", [{"hu": None}, {"reference": np.zeros((40, 30, 20), np.uint8)}])
def test_it_draws_what_there_is(changes):
    one, three = png([scene(**changes)], "title"), png([scene(**changes)] * 3, "title")
    assert imread(io.BytesIO(three)).shape[0] > 2 * imread(io.BytesIO(one)).shape[0]
