"""The verbs that train, as a user calls them."""

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

import small_study
from dagman import cli, demo
from dagman.cli import run, training
from dagman.ct.store import MANIFEST, SETTINGS
from dagman.errors import DagmanError, ExitCode
from dagman.train.pretrain import Result

SMALL = [
    *("--encoder.embed-dim", "12", "--encoder.depths", "1,1,1,1", "--encoder.num-heads", "1,1,2,4"),
    *("--method.heads.hidden-width", "32", "--optimisation.batch-size", "1", "--steps", "2"),
]


def content(folder):
    return sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))


@pytest.mark.parametrize("status", ["stopped", "finished"])
def test_the_demo_goes_no_further_once_a_stop_was_asked_for(status, tmp_path):
    ended = Result(status=status, step=2, total_steps=2, folder=tmp_path, stop_asked=True)
    with pytest.raises(DagmanError, match="E-STOPPED") as caught:
        demo._require_finished(ended)
    assert caught.value.exit_code == ExitCode.STOPPED


def test_a_demo_that_cannot_begin_claims_no_folder_and_writes_into_no_source(tmp_path, capsys):
    """`make demo DATA=...` has one folder for all data: the next call, with the right name, must be able to begin."""
    scans = tmp_path / "scans"
    (scans / "deep").mkdir(parents=True)
    for data, output, code in (
        (tmp_path / "typo", tmp_path / "own", "E-GONE"),
        (scans, scans / "deep", "E-OUTPUT"),
        (scans, scans, "E-OUTPUT"),
        (scans, tmp_path / "own", "E-NODATA"),
        (scans / "deep", tmp_path / "own", "E-NODATA"),
    ):
        assert run(["demo", "-o", str(output), "--data", str(data)]) > 0
        assert f"{code} " in capsys.readouterr().err
    assert [path.name for path in scans.rglob("*")] == ["deep"]


@pytest.mark.parametrize(("labels", "positive"), [(("2", "10", "n/a"), "10"), (("no", "yes", ""), "yes")])
def test_the_demo_reads_labels_as_the_probe_does(labels, positive, tmp_path):
    cases = {f"c{number}": small_study.case(number) for number in range(18)}
    store = small_study.store(tmp_path, cases, patients={case: case for case in cases})
    store.rows = [{**row, "label": labels[number % 3]} for number, row in enumerate(store.rows)]
    said = []

    @contextlib.contextmanager
    def quietly(_what):
        yield lambda *_: None

    rows = demo._probe(small_study.encoder(), store, tmp_path, said.append, quietly)
    assert said == []
    assert [row["positive_label"] for row in rows] == [positive] * 3
    assert [row["cases"] for row in rows] == [12] * 3


@pytest.mark.parametrize("verb", [["pretrain"], ["pretrain", "--dry-run"], ["pretrain", "--fresh"], ["ablate"]])
def test_a_run_folder_is_no_store_and_lies_in_none(verb, organ_store, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for name in (SETTINGS, MANIFEST):
        (other / name).write_bytes((organ_store.folder / name).read_bytes())
    before = content(tmp_path), content(organ_store.folder)
    axis = ["--axis", "hiding"] if verb == ["ablate"] else []
    for output, told in (
        (organ_store.folder, "is a prepared store"),
        (organ_store.folder / "runs" / "first", f"lies inside the prepared store {organ_store.folder}"),
        (other, "is a prepared store"),
    ):
        command = [*verb, *axis, "dagman-tiny", *SMALL, "--data", str(organ_store.folder), "-o", str(output)]
        assert run(command) == ExitCode.REFUSED
        assert capsys.readouterr().err.endswith(
            f"E-OUTPUT {output}: {told}; choose an output folder beside the store\n"
        )
        assert (content(tmp_path), content(organ_store.folder)) == before


def test_a_run_in_the_folder_one_stands_in_is_moved_aside_too(tmp_path, monkeypatch, capsys):
    """`-o .` has no name of its own, and `../store` does not lie in it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("a: 1")
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    training._move_aside(Path(), [Path("../store")])
    (aside,) = (path for path in tmp_path.iterdir() if path.name.startswith("run."))
    assert (aside / "config.yaml").read_text() == "a: 1"
    assert f"moved the earlier run to {aside}" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["trained on", "labelled", "a link"])
def test_a_store_inside_a_run_is_not_moved_away_with_it(how, organ_store, tmp_path, capsys):
    store, output = tmp_path / "run" / "store", str(tmp_path / "run")
    store.parent.mkdir()
    if how == "a link":
        store.symlink_to(organ_store.folder)
    else:
        shutil.copytree(organ_store.folder, store)
    before = content(tmp_path)
    given = (
        ["--data", str(organ_store.folder), "--labelled", str(store)] if how == "labelled" else ["--data", str(store)]
    )
    assert run(["pretrain", "--fresh", "dagman-tiny", *SMALL, *given, "-o", output]) == ExitCode.REFUSED
    assert f"E-OUTPUT {output}: holds the store {store}, which --fresh would move away" in capsys.readouterr().err
    assert content(tmp_path) == before


def test_a_family_says_what_it_would_cost_and_writes_nothing(organ_store, tmp_path, capsys):
    out = tmp_path / "out"
    common = ["ablate", "dagman-tiny", "--axis", "hiding", "--data", str(organ_store.folder), "-o", str(out), *SMALL]
    assert run([*common, "--seeds", "2", "--dry-run"]) == 0
    begun, *lines = capsys.readouterr().err.splitlines()
    assert begun == "timing a step of each member"
    assert [line.partition(", about ")[0] for line in lines[:-1]] == [
        f"{name}: 0 of 2 seeds finished"
        for name in ("random", "attended", "random, noisy teacher", "attended, noisy teacher")
    ]
    assert all(line.endswith(" a run") for line in lines[:-1])
    assert lines[-1].startswith("8 runs are left, about ")
    assert lines[-1].endswith(" in all without examinations, probes, fine-tuning and scores")
    assert not out.exists()
    assert run([*common, "--dry-rum", "1"]) == 2
    assert "did you mean --dry-run?" in capsys.readouterr().err


def test_missing_fonts_do_not_interrupt_progress(caplog):
    from matplotlib import font_manager

    import dagman.figures  # noqa: F401

    with caplog.at_level(logging.WARNING):
        font_manager.findfont("no font of this name")
    assert not caplog.records


def test_a_forecast_refuses_labelled_cases_that_could_not_watch_the_run(organ_store, tmp_path, capsys):
    table = tmp_path / "cases.csv"
    table.write_text("case_id,image,label\n")
    command = ["pretrain", "dagman-tiny", *SMALL, "--data", str(organ_store.folder), "-o", str(tmp_path / "run")]
    assert run([*command, "--dry-run", "--labelled", str(table)]) == ExitCode.USAGE
    assert f"run `dagman prepare -i {table} -o prepared`" in capsys.readouterr().err
    alike = tmp_path / "alike"
    shutil.copytree(organ_store.folder, alike)
    text = (alike / MANIFEST).read_text().replace('"label": "even"', '"label": "odd"')
    (alike / MANIFEST).write_text(text.replace('"label":"even"', '"label":"odd"'))
    assert run([*command, "--dry-run", "--labelled", str(alike)]) == ExitCode.USAGE
    assert "E-LABEL labels: 1 classes over 5 cases (odd: 5)" in capsys.readouterr().err
    text = re.sub(r'"label": ?"[a-z]+"', '"label": null', (organ_store.folder / MANIFEST).read_text())
    (alike / MANIFEST).write_text(text)
    assert run([*command, "--dry-run", "--labelled", str(alike)]) == ExitCode.USAGE
    assert f"E-LABEL {alike}: holds no case with a label; prepare its cases from a table" in capsys.readouterr().err


def test_a_method_that_its_encoder_cannot_serve_leaves_no_folder(organ_store, tmp_path, capsys):
    command = [
        "pretrain",
        "smit-swin-tiny",
        "--data",
        organ_store.folder,
        "-o",
        tmp_path / "run",
        "--method.hidden.kind",
        "attended",
    ]
    assert run(list(map(str, command))) == ExitCode.USAGE
    assert capsys.readouterr().err.startswith("E-CONFIG method.hidden.kind: cannot be attended without semantic")
    assert not (tmp_path / "run").exists()


class BeginError(Exception):
    """In place of a program that takes this one's place."""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone is told")
@pytest.mark.parametrize(
    ("words", "own", "begins"),
    [
        (["pretrain"], {}, {}),
        (["ablate"], {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}, {"GLIBC_TUNABLES": "glibc.pthread.rseq=0"}),
        (["pretrain"], {"MALLOC_ARENA_MAX": "2"}, None),
        (["check"], {}, None),
    ],
)
def test_trainings_begin_again_with_memory_that_is_kept_unless_it_is_set(monkeypatch, words, own, begins):
    def begin(program: str, given: list[str], environment: dict[str, str]) -> None:
        assert given == [program, "-P", "-m", "dagman", *words]
        raise BeginError({name: environment[name] for name in cli.KEEP_MEMORY})

    for name in cli.KEEP_MEMORY:
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "execve", begin)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["dagman", *words])
    monkeypatch.setattr(cli, "run", lambda _: 0)
    for name in ("stdout", "stderr"):  # which are replaced
        monkeypatch.setattr(sys, name, getattr(sys, name))
    with pytest.raises(BeginError if begins is not None else SystemExit) as ended:
        cli.main()
    if begins is not None:
        assert ended.value.args[0] == cli.KEEP_MEMORY | begins
