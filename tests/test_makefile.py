"""What `make` cannot do is one line with the true cause."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
MAKEFILE = Path(__file__).parents[1] / "Makefile"


@pytest.fixture
def make(tmp_path):
    """Runs `make setup` where the sources are named but nothing can be built."""
    (tmp_path / "constraints").mkdir()
    for name in ("pyproject.toml", "hatch_build.py", "constraints/cpu-py311.txt"):
        (tmp_path / name).touch()

    def run(*given):
        command = ["make", "--no-print-directory", "-f", MAKEFILE, "setup", *given]
        bare = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=bare)

    return run


def test_an_environment_with_spaces_is_refused_and_nothing_is_made(make, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = make("VENV=my venv", f"PYTHON={sys.executable}")
    assert result.returncode == 2
    assert "E-VENV my venv: make cannot build what has spaces in its name; give a path without" in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("code", "cause"), [(None, "does not run"), (127, "does not run"), (0, "is older than 3.11")])
def test_an_interpreter_that_is_absent_is_not_called_old(make, tmp_path, code, cause):
    python = tmp_path / "python"
    if code is not None:
        python.write_text(f'#!/bin/sh\n[ -z "$2" ] && exit {code}\nexit 1\n')
        python.chmod(0o755)
    result = make(f"PYTHON={python}")
    assert result.returncode == 2
    assert result.stdout.startswith(f"E-PYTHON {python}: {cause}; run make PYTHON=python3.11")
    assert result.stdout.count("\n") == 1
