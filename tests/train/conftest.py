"""The store that the small runs train on."""

import pytest
from small_run import write_store

from dagman.ct.store import PreparedStore


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    return write_store(tmp_path_factory.mktemp("store"), [None] * 4)
