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
