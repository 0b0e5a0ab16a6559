"""`classify predict` as a user calls it: what is written is of the scans that were given."""

import csv
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import small_study
from dagman.cli import run
from dagman.errors import ExitCode
from dagman.nets.classifier import EncoderClassifier
from dagman.tasks import classifier

sys.path.append(str(Path(__file__).parents[1] / "corpus"))
import make_corpus


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small classifier that nobody trained."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    network = EncoderClassifier(small_study.encoder(), 2, "pooled").eval()
    classifier.save(classifier.Classifier(network=network, names=("dark", "bright"), threshold=0.5, card={}), folder)
    return folder


def ct(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(small_study.case(number)[0], np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


def predict(weights, output, *sources):
    return run(["classify", "predict", "--weights", str(weights), "-i", *map(str, sources), "-o", str(output)])


def rows_of(output):
    return list(csv.DictReader((output / "predictions.csv").read_text().splitlines()))


def test_another_scan_of_a_stored_name_is_not_answered_with_the_stored_one(weights, tmp_path, capsys):
    first, second, third = (ct(tmp_path / f"pat{n}" / ("ct.nii.gz" if n < 3 else "x.nii.gz"), n) for n in (1, 2, 3))
    output = tmp_path / "out"
    assert predict(weights, output, first) == 0
    before = rows_of(output)
    assert [row["case_id"] for row in before] == ["ct"]
    capsys.readouterr()
    assert predict(weights, output, second) == ExitCode.NOTHING_USABLE
    said = capsys.readouterr().err
    assert "E-DUPCASE ct (ct.nii.gz): the store holds another scan as ct" in said
    assert "no scan can be used" in said
    assert rows_of(output) == before, "nothing is written"
    assert predict(weights, output, second, third) == ExitCode.REJECTED
    assert [row["case_id"] for row in rows_of(output)] == ["x"]
    assert predict(weights, output, first) == 0
    assert [row["case_id"] for row in rows_of(output)] == ["ct", "x"], "what was prepared earlier is told again"
    assert rows_of(output)[0] == before[0]
    assert [row["source"] for row in rows_of(output)] == [str(first), "x.nii.gz"], "of earlier calls, as the store says"
    shutil.copy(second, first)
    assert predict(weights, output, first) == 0, "a scan that changed where it lies is that scan"
    assert rows_of(output)[0] != before[0]


@pytest.mark.parametrize("how", ["emptied", "cut", "row without image", "series with a damaged end"])
def test_a_scan_that_can_no_longer_be_read_is_not_answered_with_what_it_was(weights, tmp_path, how, capsys):
    """Whatever names it: its file, its row of a table, or a slice of it."""
    a, b = (ct(tmp_path / "in" / f"{name}.nii.gz", number) for number, name in enumerate("ab", 1))
    source, output = tmp_path / "in", tmp_path / "out"
    if how == "row without image":
        source = tmp_path / "in" / "t.csv"
        source.write_text(f"case_id,image\na,{a}\nb,{b}\n")
    if how == "series with a damaged end":
        a.unlink()
        make_corpus.SERIES["good"][1](tmp_path / "in" / "s")
    assert predict(weights, output, source) == 0
    assert len(rows_of(output)) == 2
    if how == "emptied":
        a.write_bytes(b"")
    elif how == "cut":
        a.write_bytes(a.read_bytes()[:50])
    elif how == "row without image":
        a.unlink()
    else:
        max((tmp_path / "in" / "s").iterdir()).write_bytes(b"")
    assert predict(weights, output, source) == ExitCode.REJECTED
    assert [row["case_id"] for row in rows_of(output)] == ["b"]
