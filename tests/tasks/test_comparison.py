"""Two classifications of the same cases: what is told beside their AUCs."""

import csv

import numpy as np
import pytest

from dagman.cli import run
from dagman.errors import ExitCode
from dagman.tasks import comparison, delong, predictions
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
    told = comparison.rows(found, untrained=[["b", "c"]])
    assert comparison.lines(told)[0] == said
    written = list(csv.DictReader(comparison.write(told, tmp_path).read_text().splitlines()))
    assert len(written) == 4
    assert {(row["cases"], row["patients"], row["positive"]) for row in written} == {counts}
    assert [row["difference"] == "" for row in written] == [True, False, False, False]


def test_untrained_ones_of_two_kinds_are_two_rows(tmp_path):
    found = {name: predicted(seed, each=2) for seed, name in enumerate("abcdef")}
    told = comparison.rows(found, untrained=[["b", "c"], ["d"], ["e", "f"]])
    assert [row.name for row in told[6:]] == ["any of 2 untrained of kind 1", "any of 2 untrained of kind 2"]
    assert told[6].difference.value == pytest.approx(np.mean([row.difference.value for row in told[1:3]]))


@pytest.mark.parametrize(
    ("changes", "pooled"),
    [
        ({}, True),
        ({"method": "fine-tuning"}, False),
        ({"encoder": {"kind": "vit"}}, False),
        ({"which": "cls"}, False),
        ({"source": "runs/a"}, False),
    ],
)
def test_only_probes_that_differ_by_random_weights_are_pooled(tmp_path, capsys, changes, pooled):
    probe = {"method": "linear probe", "source": "new random weights", "encoder": {"kind": "swin"}, "which": "all"}
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for seed, (folder, more) in enumerate(zip(folders, ({"source": "runs/a"}, {}, changes), strict=True)):
        predictions.write(predicted(seed), folder, {"pretraining_overlap": None} | probe | more)
    assert run(["compare", *map(str, folders)]) == 0
    said = capsys.readouterr()
    assert ("any of 2 untrained" in said.out) == pooled
    assert (comparison.ONE_DRAW in said.err) == (not pooled)


def test_a_result_that_does_not_say_what_pretraining_saw_is_named(tmp_path, capsys):
    folders = [tmp_path / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        predictions.write(predicted(seed), folder, {"pretraining_overlap": {} if seed else None})
    assert run(["compare", *map(str, folders)]) == ExitCode.REFUSED
    told = capsys.readouterr().err
    assert f"E-COMPARE {folders[1] / 'result.json'}: its `pretraining_overlap` does not say" in told
    assert len(told.splitlines()) == 1


def test_predictions_of_no_case_are_named(tmp_path, capsys):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        path = predictions.write(predicted(0), folder)[0]
        path.write_text(path.read_text().splitlines()[0] + "\n")
    assert run(["compare", *map(str, folders)]) == ExitCode.REFUSED
    assert f"E-COMPARE {folders[0] / 'predictions.csv'}: holds no case; " in capsys.readouterr().err
