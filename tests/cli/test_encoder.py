"""`info` on what the tool itself wrote."""

import json

import pytest

from dagman.cli import run
from dagman.errors import ExitCode


@pytest.mark.parametrize(
    ("name", "content", "verb"),
    [
        ("result.json", json.dumps({"made_by": "attention"}), "attention"),
        ("comparison.json", "{}", "compare"),
        ("predictions.jsonl", "", "segment predict"),
        ("predictions.csv", "case_id\n", "classify predict"),
    ],
)
def test_info_knows_what_verbs_wrote(tmp_path, capsys, name, content, verb):
    (tmp_path / name).write_text(content)
    assert run(["info", str(tmp_path)]) == run(["info", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out == f"the result of `dagman {verb}`\na file in the result of `dagman {verb}`\n"


def test_info_knows_features_by_what_lies_beside_them(organ_store, two_runs, tmp_path, capsys):
    features = tmp_path / "features.csv"
    assert run(["embed", "--weights", str(two_runs[0]), "-i", str(organ_store.folder), "-o", str(features)]) == 0
    for thing in (features, features.with_suffix(".json")):
        assert run(["info", str(thing)]) == 0
        assert capsys.readouterr().out == f"features (pooled) of 5 cases, by {two_runs[0]}\n"


@pytest.mark.parametrize("name", ["cases.csv", "result.json", "ct.nii.gz", ""])
def test_info_says_what_it_knows(tmp_path, capsys, name):
    if name:
        (tmp_path / name).write_text('{"of": "nobody"}' if name == "result.json" else "case_id,image\n")
    assert run(["info", str(tmp_path / name)]) == ExitCode.USAGE
    told = capsys.readouterr().err
    assert told.startswith(f"E-THING {tmp_path / name}: is not known; give a recipe's name, a run folder, weights, ")
    assert len(told.splitlines()) == 1


def test_info_says_what_is_wrong_with_weights(tmp_path, capsys):
    for name, content in (("a.safetensors", b"short"), ("b.pt", b"\x80\x02 pickled")):
        (tmp_path / name).write_bytes(content)
        assert run(["info", str(tmp_path / name)]) == ExitCode.REFUSED
        assert f"E-WEIGHTS {tmp_path / name}: " in capsys.readouterr().err
