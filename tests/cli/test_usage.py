"""What cannot be meant is one line with a code and the way out, and writes nothing."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dagman.cli import app, run
from dagman.errors import DagmanError, ExitCode
from dagman.train import engine

sys.path.append(str(Path(__file__).parents[1] / "corpus"))
from make_corpus import FILES

NEEDED = {
    "ablate": ["dagman-tiny", "--axis", "losses", "--data", "x"],
    "attention": ["--weights", "x", "-i", "x"],
    "classify finetune": ["--weights", "x", "-i", "x"],
    "classify predict": ["--weights", "x", "-i", "x"],
    "cluster": ["--weights", "x", "-i", "x"],
    "diversity": ["--weights", "x", "-i", "x"],
    "embed": ["--weights", "x", "-i", "x"],
    "pretrain": ["dagman-tiny", "--data", "x", "--dry-run"],
    "segment predict": ["--weights", "x", "-i", "x"],
    "segment train": ["--weights", "x", "-i", "x"],
}
"""Verbs with `--device`, and what else they cannot do without."""


def verbs(group=app, before=""):
    """Names and functions of all verbs."""
    found = {}
    for name in group:
        if not name.startswith("-"):
            one = group[name]
            found |= {before + name: one.default_command} if one.default_command else verbs(one, f"{before}{name} ")
    return found


def test_every_verb_with_a_device_checks_it():
    with_device = {name: one for name, one in verbs().items() if one and "device" in inspect.signature(one).parameters}
    assert with_device.keys() == NEEDED.keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("verb", NEEDED)
def test_a_gpu_that_is_not_there_is_one_line(verb, tmp_path, capsys):
    command = [*verb.split(), *NEEDED[verb], "-o", str(tmp_path / "out"), "--device", "cuda"]
    assert run(command) == 2
    told = capsys.readouterr().err
    assert told == "E-DEVICE --device cuda: no CUDA device is here; leave --device out, or give cpu\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_python_is_told_of_devices_that_are_not_there_too():
    with pytest.raises(DagmanError, match=r"^E-DEVICE device cuda: no CUDA device is here; "):
        engine.fabric(1, "float32", "cuda")
    with pytest.raises(DagmanError, match=r"^E-DEVICE devices 0: is no number of processes; give at least 1$"):
        engine.fabric(0, "float32", "cpu")


def test_a_lost_folder_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run(["info", "dagman-tiny"]) == 2
    assert capsys.readouterr().err.startswith("E-GONE .: the folder that this was called in no longer exists; ")


def test_a_name_that_the_terminal_has_no_letters_for_is_written_all_the_same(tmp_path):
    FILES["good.nii.gz"][1](tmp_path / "\u80ba.nii.gz")
    command = [sys.executable, "-m", "dagman", "check", str(tmp_path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "/\\u80ba.nii.gz" in told


PRETRAIN = ["pretrain", "dagman-tiny", "--data", "nowhere", "-o", "out"]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["pretrian"], "E-USAGE pretrian: is not known; did you mean pretrain?"),
        (["classify", "prob"], "E-USAGE prob: is not known; did you mean probe?"),
        (["info"], "E-USAGE dagman info: lacks THING; see dagman info --help"),
        (["embed", "--weights", "x", "--wich", "all"], "E-USAGE dagman embed: lacks --input; see dagman embed --help"),
        (
            ["embed", "--wights", "x", "-i", "x", "-o", "out"],
            "E-USAGE dagman embed: lacks --weights; did you mean --weights instead of --wights?",
        ),
        (
            ["embed", "--weights", "x", "-i", "x", "-o", "out", "--whch", "all"],
            "E-USAGE --whch: is not known; did you mean --which?",
        ),
        ([*PRETRAIN, "--steps"], "E-USAGE --steps: has no value; write --steps VALUE"),
        ([*PRETRAIN, "--steps", "abc"], "E-USAGE --steps: cannot be 'abc'; give a whole number"),
        ([*PRETRAIN, "--device", "gpu"], "E-USAGE --device: cannot be 'gpu'; give one of cpu, cuda"),
        ([*PRETRAIN, "--dry-rum"], "E-CONFIG --dry-rum: is not known; did you mean --dry-run?"),
        (
            [*PRETRAIN, "--method.loses.ampd"],
            "E-CONFIG --method.loses: is not known; did you mean --method.losses?",
        ),
        (
            [*PRETRAIN, "--method.losses.ampd"],
            "E-USAGE --method.losses.ampd: has no value; write --method.losses.ampd VALUE",
        ),
        (
            [*PRETRAIN, "--data.crop", "64"],
            "E-CONFIG --data.crop: cannot be '64'; give three whole numbers, such as 64,64,64",
        ),
        (
            [*PRETRAIN, "--data.window-hu", "5"],
            "E-CONFIG --data.window-hu: cannot be '5'; give two numbers with commas between them",
        ),
        (
            [*PRETRAIN, "--optimisation.learning-rate", "fast"],
            "E-CONFIG --optimisation.learning-rate: cannot be 'fast'; give a number",
        ),
        (
            [*PRETRAIN, "--optimisation.learning_rat", "1"],
            "E-CONFIG --optimisation.learning-rat: is not known; did you mean --optimisation.learning-rate?",
        ),
        (PRETRAIN, "E-STORE nowhere: does not exist; run `dagman prepare -i SCANS -o prepared` and give that folder"),
        (
            ["classify", "probe", "-i", "missing.csv", "-o", "out"],
            "E-GONE missing.csv: does not exist; give a CSV file that does",
        ),
    ],
)
def test_it_is_one_line_with_the_way_out(command, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(command) == 2
    said = capsys.readouterr()
    assert said.err == told + "\n"
    assert not said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        [*PRETRAIN, "--workers=-1"],
        [*PRETRAIN, "--devices=0"],
        [*PRETRAIN, "--checkpoint-every=0"],
        ["check", "scans", "--workers=0"],
        ["prepare", "-i", "scans", "-o", "out", "--workers=0"],
        ["segment", "train", "--weights=none", "-i", "store", "-o", "out", "--workers=-1"],
        ["classify", "predict", "--weights", "run", "-i", "scans", "-o", "out", "--workers=0"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_numbers_that_cannot_be_are_refused(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flag, _, number = command[-1].partition("=")
    assert run(command) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert said.startswith("E-USAGE ")
    assert said.count("\n") == 1
    assert flag in said
    assert f"cannot be {number}" in said
    assert not list(tmp_path.iterdir())


def test_only_flags_are_proposed(capsys):
    assert run([*PRETRAIN, "--xyzzy", "1"]) == 2
    told = capsys.readouterr().err
    assert "choose one of --data, --output, --steps" in told
    assert "--recipe" not in told
    assert "--settings" not in told


def test_a_file_of_settings_is_answered_as_it_is_written(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("optimisation: {learning_rat: 1}")
    assert run([*PRETRAIN, "-c", str(tmp_path / "c.yaml")]) == 2
    wanted = "E-CONFIG optimisation.learning_rat: is not known; did you mean optimisation.learning_rate?\n"
    assert capsys.readouterr().err == wanted
