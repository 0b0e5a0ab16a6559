"""The examples run as they stand."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


@pytest.mark.umap
@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is not installed")
def test_clusters_of_organs(tmp_path: Path) -> None:
    result = example("cluster_organs.py", tmp_path)
    assert result.returncode == 0, result.stderr
    assert "classes in 3 cases" in result.stdout
    assert all(name in result.stdout for name in ("encoder", "untrained", "raw voxels"))
    assert (tmp_path / "clusters" / "clusters.png").exists()


def test_attention_maps(tmp_path: Path) -> None:
    result = example("attention_maps.py", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("gain on the nodule") == 1
    assert len(list((tmp_path / "attention").glob("*.png"))) == 2
