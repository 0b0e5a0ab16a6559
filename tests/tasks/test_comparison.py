"""Two classifications of the same cases: what is told beside their AUCs."""

import csv

import numpy as np
import pytest

from dagman.tasks import comparison, delong
from dagman.tasks.predictions import Predictions


def predicted(seed, each=1, patients=30, names=("no", "yes"), **changes):
    """Scores of two folds; a patient has `each` cases, all of one class, and is in one fold."""
    cases = each * patients
    person = np.arange(cases) // each
    labels = person % len(names)
    draws = np.random.default_rng(seed)
    scores = np.eye(len(names))[labels] + draws.gamma(1.0, size=(cases, len(names)))
    values = {
        "case_ids": tuple(f"c{number:03d}" for number in range(cases)),
        "groups": np.array([f"p{number}" for number in person]),
        "labels": labels,
        "names": names,
        "fold": person // len(names) % 2,
        "probabilities": scores / scores.sum(axis=1, keepdims=True),
        "thresholds": (0.5, 0.5),
    }
    return Predictions(**(values | changes))


@pytest.mark.parametrize("each", [1, 3])
def test_p_takes_the_cases_of_a_patient_together(each):
    first, other = predicted(0, each), predicted(1, each)
    told = comparison.rows({"a": first, "b": other})
    scores = first.probability, other.probability
    alone = delong.compare(*scores, first.positive, first.fold, 2).p
    assert told[1].p == delong.compare(*scores, first.positive, first.fold, 2, patients=first.groups).p
    assert (told[1].p == pytest.approx(alone)) == (each == 1)
    assert told[0].p is None


@pytest.mark.parametrize(
    ("changes", "counts", "said"),
    [
        ({}, ("60", "30", "30"), "60 cases (30 positive), 30 patients"),
        ({"group_by": "case"}, ("60", "", "30"), "60 cases (30 positive), patients unknown"),
        ({"names": ("no", "yes", "both")}, ("60", "30", ""), "60 cases, 30 patients"),
    ],
)
def test_it_says_of_how_many(tmp_path, changes, counts, said):
    found = {name: predicted(seed, each=2, **changes) for seed, name in enumerate(("a", "b", "c"))}
    told = comparison.rows(found, untrained=["b", "c"])
    assert comparison.lines(told)[0] == said
    written = list(csv.DictReader(comparison.write(told, tmp_path).read_text().splitlines()))
    assert len(written) == 4
    assert {(row["cases"], row["patients"], row["positive"]) for row in written} == {counts}
    assert [row["difference"] == "" for row in written] == [True, False, False, False]
