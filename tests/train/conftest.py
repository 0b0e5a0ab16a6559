"""The store that the small runs train on, and what spares them work."""

from collections.abc import Iterator

import pytest
from small_run import write_store

from dagman.ct.store import PreparedStore


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> PreparedStore:
    return write_store(tmp_path_factory.mktemp("store"), [None] * 4)


@pytest.fixture(scope="module")
def few_examined() -> Iterator[None]:
    """Eight crops of an examination, where a run takes 64: that is eight times the work of a few small steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dagman.train.pretrain.EXAMINED", 8)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs that are looked at by rows and states: pictures would take most of their time."""
    for drawing in ("draw", "draw_crops"):
        monkeypatch.setattr(f"dagman.train.pretrain.{drawing}", lambda *_: None)
