"""The example runs as it stands, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_it_ends_with_scores_and_files_in_place(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "segment_tumours.py"), str(tmp_path / "work")]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=280)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "3 cases scored" in ended.stdout
    result = json.loads((tmp_path / "work" / "scores" / "result.json").read_text())
    assert result["group_by"] == "patient"
    assert 0 <= result["classes"]["label 1"]["all"]["dice"]["value"] <= 1
    assert (tmp_path / "work" / "predicted" / "0_image.nii.gz").exists()
    assert (tmp_path / "work" / "scores" / "cases.png").stat().st_size > 10_000
