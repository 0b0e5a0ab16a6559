"""Whether attention points at a mask: exact shares, means over cases, and what has no answer."""

import csv
import json

import numpy as np
import pytest

from dagman.tasks import pointing
from dagman.tasks.pointing import Pointing, Shares


def cube():
    values, body, mask = np.ones((10, 10, 10), np.float32), np.ones((10, 10, 10), bool), np.zeros((10, 10, 10), bool)
    mask[:5, 0, 0] = True
    return values, body, mask


def test_the_gain_is_the_share_of_attention_over_the_share_of_the_body():
    values, body, mask = cube()
    uniform, _ = pointing.shares(values, mask, body)
    assert uniform == Shares(0.005, 0.005)
    assert uniform.gain == 1
    values[mask] = 3
    found, why = pointing.shares(values, mask, body)
    assert found.of_attention == pytest.approx(15 / 1010)
    assert found.gain == pytest.approx(15 / 1010 * 200)
    assert why == ""


def test_only_what_lies_in_the_body_counts():
    values, body, mask = cube()
    body[3:] = False
    values[3:] = 100
    assert pointing.shares(values, mask, body)[0] == Shares(pytest.approx(3 / 300), pytest.approx(3 / 300))


def test_what_has_no_gain_says_why():
    values, body, mask = cube()
    empty = np.zeros_like(mask)
    assert pointing.shares(values, None, body) == (None, "no mask")
    assert pointing.shares(values, empty, body) == (None, "the mask is empty")
    assert pointing.shares(values, mask, ~mask) == (None, "the mask lies outside the body")
    assert pointing.shares(0 * values, mask, body) == (None, "no attention in the body")


def case(number, weights, gain, patient="own"):
    shares = None if gain is None else Shares(0.01 * gain, 0.01)
    patient = f"p{number}" if patient == "own" else patient
    return Pointing(f"c{number}", patient, weights, 0.5, 2.0, shares, "" if shares else "no mask")


def test_weights_are_compared_on_the_cases_that_both_have():
    rows = [case(0, "a", 1), case(1, "a", 2), case(2, "a", None), case(0, "b", 2), case(1, "b", 4), case(2, "b", 9)]
    first, second = pointing.summary(rows)["rows"]
    assert first["gain"]["value"] == pytest.approx(1.5)
    assert first["cases_with_gain"] == 2
    assert second["gain"]["value"] == pytest.approx(5)
    assert second["gain_above_first"]["value"] == pytest.approx(1.5)
    assert second["gain_above_first"]["low"] < 1.5 < second["gain_above_first"]["high"]


def test_intervals_draw_patients():
    draws = np.random.default_rng(0).uniform(0.5, 3, 12)
    apart = pointing.summary([case(n, "a", gain) for n, gain in enumerate(draws)])["rows"][0]["gain"]
    assert apart["low"] < draws.mean() < apart["high"]
    rows = [case(n, "a", gain, patient="one") for n, gain in enumerate(draws)]
    assert pointing.summary(rows)["rows"][0]["gain"]["why"] == "1 patient, 2 needed"
    rows = [case(n, "a", gain, patient=None) for n, gain in enumerate(draws)]
    assert pointing.summary(rows)["rows"][0]["gain"] == {
        "value": pytest.approx(draws.mean()),
        "low": None,
        "high": None,
        "why": "patients unknown",
    }


def test_no_mask_at_all_is_no_number(tmp_path):
    paths = pointing.write([case(0, "a", None), case(1, "a", None)], tmp_path)
    result = json.loads(paths[1].read_text())
    assert result["rows"][0]["gain"]["value"] is None
    assert result["without_gain"] == {"c0": "no mask", "c1": "no mask"}
    with paths[0].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["gain"] for row in rows] == ["", ""]
    assert [row["why"] for row in rows] == ["no mask"] * 2
