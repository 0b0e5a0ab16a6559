"""Two segmentations of the same cases: what is read is what was scored, and differences are paired by case."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from dagman.cli import run
from dagman.errors import DagmanError, ExitCode
from dagman.tasks import leakage, segmentation_scores, statistics
from dagman.tasks import segmentation_comparison as comparison
from dagman.tasks.classes import Classes

BLOB = Classes(names=("blob",), labels=((1,),))


def scored(shift, cases=20):
    """Balls, found `shift` voxels beside where they are; the last case holds none and nothing is found."""
    rows = []
    for number in range(cases):
        grid = np.indices((24, 24, 24))
        truth = np.linalg.norm(grid - 11.0, axis=0) < 4 + (number % 7) / 2
        ours = np.linalg.norm(grid - (11.0 + shift), axis=0) < 5
        if number == cases - 1:
            truth, ours = np.zeros_like(truth), np.zeros_like(ours)
        masks = (one.astype(np.uint8) for one in (ours, truth))
        patient = f"p{number // 2}"
        rows += segmentation_scores.compare(*masks, BLOB, (1.0, 1.0, 2.0), case_id=f"c{number}", patient=patient)
    return rows


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = scored(1)
    segmentation_scores.write(rows, segmentation_scores.summary(rows), tmp_path)
    assert [replace(row, note="") for row in rows] == comparison.read(tmp_path)


def test_differences_are_those_of_the_means_over_cases_that_hold_the_class():
    near, far = scored(0), scored(2)
    found = comparison.differences({"near": near, "far": far})
    assert [row.difference for row in found if row.name == "near"] == [None] * len(comparison.TOLD)
    (dice,) = [row for row in found if (row.name, row.score) == ("far", "dice")]
    means = [np.mean([row.scores.dice for row in rows if row.scores.lesions]) for rows in (near, far)]
    assert dice.value.value == pytest.approx(means[1])
    assert dice.difference.value == pytest.approx(means[0] - means[1])
    assert 0 < dice.difference.low < dice.difference.value < dice.difference.high
    # Paired: the interval is that of the differences, case by case.
    pairs = [(one, other) for one, other in zip(near, far, strict=True) if one.scores.lesions]
    gains = np.array([one.scores.dice - other.scores.dice for one, other in pairs])
    patients = np.array([one.patient for one, _ in pairs])
    alone = statistics.estimate(lambda weights: statistics.mean(gains, weights), patients, seed=0)
    assert (dice.difference.low, dice.difference.high) == pytest.approx((alone.low, alone.high), rel=0.02)


def test_n_is_of_the_class_and_the_score():
    """A class that some cases lack counts those that hold it, and a score those that have a value."""
    rows = [replace(row, name=name) for name in ("blob", "other") for row in scored(0)]
    rows = [
        replace(row, scores=replace(row.scores, lesions=0)) if row.name == "other" and row.case_id < "c14" else row
        for row in rows
    ]
    rows[0] = replace(rows[0], scores=replace(rows[0].scores, volume_error_percent=None))
    found = comparison.differences({"one": rows})
    holding = sum(row.name == "other" and row.scores.lesions > 0 for row in rows)
    counts = {(row.label, row.score): (row.cases, row.patients, row.lesions) for row in found}
    assert counts["blob", "dice"] == (19, 10, None)
    assert counts["blob", "absolute_volume_error_percent"] == (18, 10, None)
    assert counts["other", "lesion_sensitivity"][::2] == (holding, holding)
    assert 0 < holding < 19
    assert "other, lesion sensitivity of " in "\n".join(comparison.lines(found))


def test_a_case_without_the_class_may_lack_a_prediction():
    """Its row is written where a tool predicted, and says nothing where none did."""
    first, other = scored(0), scored(2)
    assert not first[-1].scores.lesions
    assert comparison.differences({"a": first, "b": other[:-1]}) == comparison.differences({"a": first, "b": other})
    with pytest.raises(DagmanError, match="E-COMPARE a: no reference holds any class"):
        comparison.differences({"a": first[-1:], "b": other[-1:]})


@pytest.mark.parametrize("what", ["case", "patient", "reference"])
def test_other_cases_are_no_comparison(what):
    first, other = scored(0), scored(2)
    row = other[2]
    other[2] = {
        "case": replace(row, case_id="another"),
        "patient": replace(row, patient="another"),
        "reference": replace(row, scores=replace(row.scores, reference_cc=99.0)),
    }[what]
    said = r"E-COMPARE second: its cases, patients, classes or references differ from the first one's, such as blob of "
    with pytest.raises(DagmanError, match=said + ("another" if what == "case" else "c2")):
        comparison.differences({"first": first, "second": other})


def test_the_verb_compares_segmentations_and_writes_the_table(tmp_path, capsys):
    for name, shift in (("near", 0), ("far", 2)):
        rows = scored(shift)
        cases = [row.case_id for row in rows]
        seen = leakage.report(leakage.Seen(True, {cases[shift]: leakage.VOXELS}, {}), dict.fromkeys(cases))
        found = segmentation_scores.summary(rows) | {"pretraining_overlap": seen}
        segmentation_scores.write(rows, found, tmp_path / name)
    folders = [str(tmp_path / name) for name in ("near", "far")]
    assert run(["compare", *folders, "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "first minus this" in shown
    assert "blob, dice  " in shown
    assert "19        10  " in shown
    table = list(csv.DictReader((tmp_path / "out" / "comparison.csv").read_text().splitlines()))
    assert [(row["cases"], row["patients"]) for row in table] == [("19", "10")] * 2 * len(comparison.TOLD)
    assert [row["lesions"] for row in table[: len(comparison.TOLD)]] == ["", "", "", "", "19"]
    overlap = json.loads((tmp_path / "out" / "comparison.json").read_text())["pretraining_overlap"]
    assert (overlap["known"], overlap["tested"]) == (True, len(set(cases)))
    assert overlap["same_voxels"] == {"count": 2, "cases": sorted([cases[0], cases[2]])}
    (tmp_path / "far" / "result.json").unlink()
    assert run(["compare", *folders]) == 0
    assert "whether pretraining saw the tested cases is unknown" in capsys.readouterr().err
    (tmp_path / "far" / "cases.csv").write_text("case_id,patient\na,b\n")
    assert run(["compare", *folders]) == ExitCode.REFUSED
    assert "E-COMPARE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"pretraining_overlap": {}}', "its `pretraining_overlap` does not say what pretraining saw (KeyError)"),
        ('{"pretraining_overlap": [1]}', "its `pretraining_overlap` does not say what pretraining saw ("),
        ("{", "cannot be read (JSONDecodeError)"),
        ("3", "cannot be read (TypeError)"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, capsys, text, said):
    rows = scored(0)
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        segmentation_scores.write(rows, segmentation_scores.summary(rows), folder)
    (folders[1] / "result.json").write_text(text)
    assert run(["compare", *map(str, folders)]) == ExitCode.REFUSED
    told = capsys.readouterr()
    assert f"E-COMPARE {folders[1] / 'result.json'}: {said}" in told.err
    assert told.out == ""


def test_results_of_no_case_are_named(tmp_path, capsys):
    rows = scored(0, cases=2)
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        paths = segmentation_scores.write(rows, segmentation_scores.summary(rows), folder)
        paths[0].write_text(paths[0].read_text().splitlines()[0] + "\n")
    assert run(["compare", *map(str, folders)]) == ExitCode.REFUSED
    assert f"E-COMPARE {folders[0] / 'cases.csv'}: holds no case; " in capsys.readouterr().err
