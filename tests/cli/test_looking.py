"""The verbs that look into encoders, as a user calls them."""

import csv
import json

import pytest

from dagman.cli import looking, run
from dagman.errors import DagmanError


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_diversity_writes_heads_crops_result_and_a_picture(organ_store, two_runs, tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = ["--weights", *map(str, two_runs), "-i", str(organ_store.folder), "-o", str(folder), "--crops", "3"]
    assert run(["diversity", *arguments]) == 0
    said = capsys.readouterr()
    assert "3 crops of 3 cases, seed 0" in said.err
    assert len(said.out.splitlines()) == 10
    heads = rows_of(folder / "heads.csv")
    assert {row["weights"] for row in heads} == {"first", "second"}
    assert len(heads) == 2 * (4 + 4 + 8 + 8 + 8)
    assert all(0 < float(row["row_entropy"]) <= 1 for row in heads)
    assert len(rows_of(folder / "crops.csv")) == 2 * 3 * 5
    result = json.loads((folder / "result.json").read_text())
    assert (result["crops"], result["cases"]) == (3, 3)
    mean = sum(float(row["distance_mm"]) for row in heads[:4]) / 4
    assert result["rows"][0]["distance_mm"]["value"] == pytest.approx(mean)
    assert (folder / "diversity.png").read_bytes().startswith(b"\x89PNG")


def test_weights_are_named_as_shortly_as_they_can_be_told_apart(tmp_path):
    one, two, three = tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c" / "w.safetensors"
    assert looking.names([one]) == ["run"]
    assert looking.names([one, two, three]) == ["a-run", "b-run", "c-w"]
    with pytest.raises(DagmanError, match="twice"):
        looking.names([one, one])
