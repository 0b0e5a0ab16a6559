"""The examples run as they stand, in a process of their own."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, output: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), str(output)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout


@pytest.mark.umap
@pytest.mark.skipif(importlib.util.find_spec("umap") is None, reason="umap-learn is not installed")
def test_clusters_of_organs(tmp_path: Path) -> None:
    said = example("cluster_organs.py", tmp_path)
    assert "classes in 3 cases" in said
    assert all(name in said for name in ("encoder", "untrained", "raw voxels"))
    assert (tmp_path / "clusters" / "clusters.png").exists()


def test_attention_maps(tmp_path: Path) -> None:
    assert example("attention_maps.py", tmp_path).count("gain on the nodule") == 1
    assert len(list((tmp_path / "attention").glob("*.png"))) == 2


@pytest.mark.slow
def test_a_classifier_is_finetuned(tmp_path: Path) -> None:
    said = example("finetune_classifier.py", tmp_path)
    assert "linear probe: AUC" in said
    assert "first minus this" in said
    assert "16 cases are called malignant" in said
    assert (tmp_path / "tuned" / "roc.png").exists()


@pytest.mark.slow
def test_tumours_are_segmented(tmp_path: Path) -> None:
    assert "3 cases scored" in example("segment_tumours.py", tmp_path)
    result = json.loads((tmp_path / "scores" / "result.json").read_text())
    assert result["group_by"] == "patient"
    assert 0 <= result["classes"]["label 1"]["all"]["dice"]["value"] <= 1
    assert (tmp_path / "predicted" / "0_image.nii.gz").exists()
    assert (tmp_path / "scores" / "cases.png").stat().st_size > 10_000


VERBS = ("Probe", "Fine-tune", "Predict", "Segment", "Cluster", "Attention", "Diversity")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_blocks_for_notebooks_run_one_after_the_other(tmp_path: Path) -> None:
    """In a process of their own, in an empty folder; what needs umap-learn is left out where that is not installed."""
    text = (EXAMPLES.parent / "docs" / "python.md").read_text()
    blocks = dict(re.findall(r"^## (.+?)\n\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python")
    assert set(VERBS) < set(blocks)
    if importlib.util.find_spec("umap") is None:
        del blocks["Cluster"]
    for verb in set(VERBS) & set(blocks):
        assert len([line for line in blocks[verb].splitlines() if line]) <= 10, verb
    (tmp_path / "page.py").write_text("\n".join(blocks.values()))
    command = [sys.executable, "page.py"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=580)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "seen in pretraining: 8" in ended.stdout
    assert "first minus this" in ended.stdout
    assert (tmp_path / "outlined" / "phantom_000.nii.gz").exists()
    assert (tmp_path / "attention" / "phantom_000_attention.png").exists()
    assert "semantic attention" in ended.stdout
