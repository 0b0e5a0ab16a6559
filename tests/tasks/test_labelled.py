"""Half of the crops are on a labelled voxel, every case has its turn, and a sample depends on its number alone."""

import numpy as np
import pytest
import torch

import small_study
from dagman.randomness import generator
from dagman.tasks.classes import choose
from dagman.tasks.labelled import LabelledCrops, corner_of


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    cases = {f"c{number}": small_study.case(number, radius=4, labels=2) for number in range(3)}
    return small_study.store(tmp_path_factory.mktemp("labelled"), cases)


def crops(store, seed=0):
    return LabelledCrops(store, range(3), choose(None, [1, 2]), small_study.PREPARATION, seed)


def test_a_sample_depends_on_its_number_alone(store):
    one, other = crops(store), crops(store)
    last = other[11]
    for number in (11, 3, 11):
        again = one[number]
    assert all(torch.equal(a, b) for a, b in zip(again, last, strict=True))
    assert not torch.equal(crops(store, seed=1)[11].image, last.image)
    assert last.image.shape == last.numbers.shape == (1, *small_study.PREPARATION.crop)
    assert last.image.dtype == torch.float32
    assert last.numbers.dtype == torch.int64


def test_image_and_labels_are_turned_together(store):
    """Label 1 is the brightest thing there is, label 2 the darkest of the body: still so after every alteration."""
    samples = [crops(store)[number] for number in range(12)]
    bright, dark = (
        np.mean([s.image[s.numbers == label].mean() for s in samples if (s.numbers == label).any()]) for label in (1, 2)
    )
    assert bright > 0.75
    assert dark < 0.35


def test_half_of_the_crops_are_centred_on_a_class_and_classes_share(monkeypatch):
    numbers = np.zeros((60, 60, 60), np.uint8)
    numbers[40:42, 40:42, 40:42] = 1
    numbers[20:30, 20:30, 20:30] = 2
    hits = {0: 0, 1: 0, 2: 0}
    for sample in range(600):
        corner = corner_of(numbers, (8, 8, 8), generator(0, "test", sample))
        hits[int(numbers[tuple(np.add(corner, 4))])] += 1
    assert 250 < hits[0] < 350
    assert abs(hits[1] - hits[2]) < 60


@pytest.mark.parametrize("shape", [(10, 40, 9), (8, 8, 8), (5, 6, 30)])
def test_crops_stay_inside_and_are_centred_where_the_volume_is_thin(shape):
    numbers = np.ones(shape, np.uint8)
    for sample in range(40):
        corner = corner_of(numbers, (8, 8, 8), generator(1, "test", sample))
        for first, num in zip(corner, shape, strict=True):
            assert 0 <= first <= num - 8 if num >= 8 else first == -((8 - num) // 2)


def test_an_empty_mask_gives_crops_and_a_full_one_too():
    for value in (0, 1):
        corner_of(np.full((20, 20, 20), value, np.uint8), (8, 8, 8), generator(2, "test", value))
