"""Shared fixtures. Real data is found through DAGMAN_TEST_DATA (default: ../shared/data beside the checkout)."""

import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

from dagman import files
from dagman.ct.store import FORMAT, MANIFEST, SETTINGS, PreparedStore, array_path, write_array
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.weights import MODEL_FILE, save_encoder
from dagman.types import Preparation

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first: one that came last would leave all processes but its own without work."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _annotations_unchecked_where_calls_repeat(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every call is held against its annotations, but for slow tests and whole trainings, which make the same calls."""
    whole = request.path.parent.name == "train" or request.path.name in ("test_ablation.py", "test_cli.py")
    before = jaxtyping.config.jaxtyping_disable
    if whole or request.node.get_closest_marker("slow") is not None:
        jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CTs; skips where it is absent."""
    root = Path(os.environ.get("DAGMAN_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set DAGMAN_TEST_DATA")
    return root


ORGAN_HU = {1: -700, 2: 60, 3: 350}
"""What the organs of `organ_store` are made of; label 4 is a speck."""


@pytest.fixture(scope="session")
def organ_store(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    """Five cases of four patients with three organs each and a speck of a fourth; every second case has a label."""
    folder = tmp_path_factory.mktemp("organs")
    rows = []
    for case in range(5):
        draws = np.random.default_rng(case)
        hu, organs = np.full((56, 48, 48), 0, np.int16), np.zeros((56, 48, 48), np.int16)
        for label, value in ORGAN_HU.items():
            low = (4 + 17 * (label - 1), *draws.integers(4, 20, 2))
            box = tuple(slice(first, first + 12) for first in low)
            hu[box], organs[box] = value, label
        organs[0, 0, 0] = 4
        hu += draws.normal(0, 15, hu.shape).astype(np.int16)
        recorded = {}
        for kind, array in (("volumes", hu), ("masks", organs)):
            path = array_path(folder, kind, f"case{case}", "npy")  # type: ignore[arg-type]
            write_array(path, array)
            recorded[kind] = {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
        counts = {str(label): int((organs == label).sum()) for label in np.unique(organs) if label}
        rows.append(
            {
                "case_id": f"case{case}",
                "patient": f"p{min(case, 3)}",
                "label": "odd" if case % 2 else "even",
                "shape": list(hu.shape),
                "affine": np.diag([2.0, 2.0, 2.0, 1.0]).tolist(),
                **recorded["volumes"],
                "mask": recorded["masks"] | {"voxels": counts},
            }
        )
    settings = {"format": FORMAT, "storage": "npy", "spacing_mm": 2.0, "resampling": "antialiased"}
    files.write_json(folder / SETTINGS, settings)
    files.write_text(folder / MANIFEST, "".join(map(files.json_line, rows)))
    return PreparedStore(folder)


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of two small encoders with semantic attention and different random weights."""
    folder = tmp_path_factory.mktemp("runs")
    network = SwinConfig(
        embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), attention=AttentionConfig(stage=2, num_heads=4)
    )
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        encoder = SwinEncoder(network)
        encoder.preparation = Preparation(crop=(32, 32, 32), window_hu=(-1000.0, 400.0))
        save_encoder(encoder, folder / name / MODEL_FILE, {})
    return [folder / "first", folder / "second"]
