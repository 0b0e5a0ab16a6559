"""The example of classification runs as it stands."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_classifier.py"


@pytest.mark.slow
def test_it_runs_and_says_what_it_found(tmp_path):
    command = [sys.executable, EXAMPLE, tmp_path]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert found.returncode == 0, found.stderr
    assert "linear probe: AUC" in found.stdout
    assert "first minus this" in found.stdout
    assert "16 cases are called malignant" in found.stdout
    assert (tmp_path / "tuned" / "roc.png").exists()
