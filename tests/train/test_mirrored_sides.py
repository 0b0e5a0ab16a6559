"""Mirrored crops swap sides: names that tell a side are refused, and numbers are asked about."""

import pytest

from dagman.errors import DagmanError
from dagman.train.parts import refuse_mirrored_sides


@pytest.mark.parametrize(
    "name",
    ["left", "kidney_left", "left lung", "Right-Kidney", "LeftLung", "heartAtriumRight", "kidney_l", "Lung_R", "l"],
)
def test_names_of_sides_are_refused(name):
    with pytest.raises(DagmanError, match=r"E-CONFIG keep_sides.*add --keep-sides"):
        refuse_mirrored_sides(["tumour", name], keep_sides=False, say=pytest.fail)
    refuse_mirrored_sides(["tumour", name], keep_sides=True, say=pytest.fail)


@pytest.mark.parametrize("name", ["bright", "leftover", "cleft", "vertebrae_L1", "L1", "lung", "label 2", "atrial"])
def test_other_names_are_not(name):
    refuse_mirrored_sides(["tumour", name], keep_sides=False, say=pytest.fail)


def test_several_numbers_are_asked_about():
    said = []
    refuse_mirrored_sides(["label 2", "label 3"], keep_sides=False, say=said.append)
    assert said == ["crops are mirrored: where label 2, label 3 are left and right of one thing, add --keep-sides"]
