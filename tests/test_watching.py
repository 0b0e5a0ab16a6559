"""The time left is that of the piece of work under way, not of those before it."""

import time

from dagman.cli import watching


def test_the_time_left_starts_anew_with_each_fold(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with watching.progress("Folds") as tell:
        for _ in range(2):
            for done in range(1, 11):
                now[0] += 20
                tell(done, 10, "")
    lines = capsys.readouterr().err.splitlines()
    assert lines[4] == lines[14] == "Folds 5/10, 100 s left"


def test_the_first_unit_is_no_measure_of_the_others(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with watching.progress("Work") as tell:
        for done, seconds in ((0, 0), (1, 100), (2, 10), (3, 10)):
            now[0] += seconds
            tell(done, 5)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Work 0/5", "Work 1/5", "Work 2/5", "Work 3/5, 20 s left"]


def test_no_time_is_told_before_three_units_are_done(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with watching.progress("Work") as tell:
        for done in (10, 11, 12, 13):  # a run that goes on
            now[0] += 20
            tell(done, 20)
    assert capsys.readouterr().err.splitlines() == [
        "Work 10/20",
        "Work 11/20",
        "Work 12/20",
        "Work 13/20, 2.3 min left",
    ]


def test_a_pretraining_step_is_told_beside_what_knowing_nothing_gives(capsys):
    with watching.progress("Pretraining") as tell:
        watcher = watching.Watcher(tell)
        watcher.on_start(0, 2)
        watcher.on_step({"step": 2, "total": 9.0, "image_error_ratio": 0.614, "ampd_loss_ratio": 0.5})
    assert (
        capsys.readouterr().err.splitlines()[-1] == "Pretraining 2/2, image error / visible mean 0.61, ampd / ln K 0.50"
    )
