"""The sheet shows outlines where they are, right on the left, and works without a CT or without a reference."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from dagman.figures.segmentation import Scene, _legend, png


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


def test_each_of_several_classes_has_its_colour():
    maps = scene()
    reference, predicted = maps.reference.copy(), maps.predicted.copy()
    reference[2:8, 10:20, 5:15] = 2
    predicted[:] = reference
    picture = imread(io.BytesIO(png([scene(reference=reference, predicted=predicted)], "title", ("liver", "tumour"))))
    liver, tumour = places(picture, (0xE6, 0x9F, 0x00)), places(picture, (0x56, 0xB4, 0xE9))
    assert liver.max() < tumour.min()  # the patient's right is on the left
    assert not len(places(picture, (0x37, 0xD6, 0x7A)))


def test_the_legend_names_the_classes_that_are_there():
    reference = np.where(scene().reference, 9, 0).astype(np.uint8)
    reference[0, 0, 0] = 2
    told = _legend([scene(reference=reference, predicted=reference)], [f"label {number}" for number in range(1, 10)])
    assert [line.get_label() for line in told] == ["reference", "prediction", "label 2, label 9"]  # seven colours


@pytest.mark.parametrize("changes", [{"hu": None}, {"reference": np.zeros((40, 30, 20), np.uint8)}])
def test_it_draws_what_there_is(changes):
    one, three = png([scene(**changes)], "title"), png([scene(**changes)] * 3, "title")
    assert imread(io.BytesIO(three)).shape[0] > 2 * imread(io.BytesIO(one)).shape[0]
