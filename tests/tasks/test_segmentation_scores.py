"""Means count every case, strata are by size, and what cannot be computed is said, never made up."""

import numpy as np
import pytest

from dagman.tasks import segmentation_scores as scoring
from dagman.tasks.classes import choose
from dagman.tasks.segmentation_scores import compare, summary

ONE = choose(None, [1])
CUBE = np.zeros((24, 24, 24), np.uint8)
CUBE[2:12, 2:12, 2:12] = 1
SMALL = np.zeros_like(CUBE)
SMALL[15:18, 15:18, 15:18] = 1
NOTHING = np.zeros_like(CUBE)


def rows(*pairs, patients=None, spacing_mm=(2.0, 2.0, 2.0)):
    """Rows of `(predicted, reference)` pairs."""
    return [
        row
        for number, (ours, theirs) in enumerate(pairs)
        for row in compare(
            ours, theirs, ONE, spacing_mm, case_id=f"c{number}", patient=patients[number] if patients else f"p{number}"
        )
    ]


def found(made, **given):
    return summary(made, **given)["classes"]["label 1"]


def test_all_four_states_are_counted_and_none_is_dropped():
    result = found(rows((CUBE, CUBE), (NOTHING, NOTHING), (NOTHING, CUBE), (CUBE, NOTHING)))
    assert result["states"] == {"both": 1, "neither": 1, "missed": 1, "invented": 1}
    assert (result["all"]["cases"], result["all"]["dice"]["value"]) == (4, 0.5)
    assert (result["with_reference"]["cases"], result["with_reference"]["dice"]["value"]) == (2, 0.5)
    assert result["all"]["hd95_mm"]["value"] == pytest.approx((0 + 0 + 2 * 48 * 3**0.5) / 4)


def test_size_strata_at_3_cc():
    result = found(rows((CUBE, CUBE), (NOTHING, SMALL), (SMALL, SMALL)))
    assert (result["above_3cc"]["cases"], result["above_3cc"]["dice"]["value"]) == (1, 1.0)
    assert (result["up_to_3cc"]["cases"], result["up_to_3cc"]["dice"]["value"]) == (2, 0.5)


def test_many_small_lesions_are_no_large_one():
    small = np.zeros_like(CUBE)
    for corner in (0, 8, 16):
        small[corner : corner + 7, :7, :7] = 1
    result = found(rows((small, small)))
    assert (result["lesions"], result["large_lesions"]) == (3, 0)
    assert (result["above_3cc"]["cases"], result["up_to_3cc"]["cases"]) == (0, 1)


def test_lesions_are_pooled_and_false_positives_are_per_case():
    both = CUBE | SMALL
    result = found(rows((CUBE, both), (both, CUBE), (both, both)))["all"]
    assert result["lesion_sensitivity"]["value"] == pytest.approx(4 / 5)
    assert result["large_lesion_sensitivity"]["value"] == 1
    assert result["false_positives_per_case"]["value"] == pytest.approx(1 / 3)


def test_without_a_reference_there_is_no_sensitivity_nor_percentage():
    result = found(rows((NOTHING, NOTHING), (CUBE, NOTHING)))
    assert result["all"]["lesion_sensitivity"]["value"] is None
    assert result["all"]["absolute_volume_error_percent"] == {
        "value": None, "low": None, "high": None, "why": "no case counts",
    }  # fmt: skip
    assert result["above_3cc"] == {"cases": 0, **result["above_3cc"]}
    assert result["above_3cc"]["dice"] == {"value": None, "low": None, "high": None, "why": "no cases"}
    assert scoring.shown(rows((CUBE, NOTHING))) == []


def test_one_patient_gets_no_interval():
    made = rows((CUBE, CUBE), (SMALL, CUBE), patients=["same", "same"])
    dice = found(made)["all"]["dice"]
    assert dice["value"] == 0.5
    assert dice["low"] is None
    assert dice["why"] == "1 patient, 2 needed"


def test_intervals_are_over_patients():
    draw = np.random.default_rng(0)
    shifted = [(np.roll(CUBE, int(step), 0), CUBE) for step in draw.integers(0, 8, 12)]
    alone = found(rows(*shifted))["all"]["dice"]
    together = found(rows(*shifted * 4, patients=[f"p{number % 12}" for number in range(48)]))["all"]["dice"]
    assert alone["value"] == pytest.approx(together["value"])
    assert [alone["low"], alone["high"]] == pytest.approx([together["low"], together["high"]], rel=0.02)


def test_intervals_over_cases_draw_cases_although_patients_are_known():
    shifted = [(np.roll(CUBE, step, 0), CUBE) for step in range(8)]
    one = summary(rows(*shifted, patients=["same"] * 8), group_by="case")
    apart = summary(rows(*shifted), group_by="case")
    dice = one["classes"]["label 1"]["all"]["dice"]
    assert dice["low"] < dice["value"] < dice["high"]
    assert one == apart


def test_people_are_told_first_of_cases_that_hold_the_class():
    told = scoring.lines(summary(rows((CUBE, CUBE), (NOTHING, CUBE), (NOTHING, NOTHING), (NOTHING, NOTHING))))
    assert told[0].startswith("label 1: 2 cases that hold it, of 4")
    assert told[1].split()[:2] == ["dice", "0.500"]
    assert told[-1].split()[:5] == ["dice,", "empty", "references", "too", "0.750"]
    assert scoring.mean_dice(rows((NOTHING, NOTHING))) is None


def test_worst_median_and_best_are_shown_once_each():
    made = rows(*[(np.roll(CUBE, step, 0), CUBE) for step in (3, 0, 5, 1, 2)])
    assert scoring.ranked(made) == ["c2", "c0", "c4", "c3", "c1"]
    assert scoring.shown(made) == ["c2", "c4", "c1"]
    assert scoring.shown(made[:1]) == ["c0"]
