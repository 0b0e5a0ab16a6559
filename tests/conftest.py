"""Shared fixtures. Real data is found through DAGMAN_TEST_DATA (default: ../shared/data beside the checkout)."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CTs; skips where it is absent."""
    root = Path(os.environ.get("DAGMAN_TEST_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set DAGMAN_TEST_DATA")
    return root
