"""Two processes on one machine train as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import small
from test_resume import final_state, rows

from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.train.pretrain import pretrain

SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from small_run import small
from dagman.ct.store import PreparedStore
from dagman.train import pretrain
pretrain.EXAMINED = 8
config = small(steps=3)
pretrain.pretrain(config, PreparedStore(Path(sys.argv[1])), Path(sys.argv[2]), devices=2, device="cpu")
"""


@pytest.mark.slow
def test_two_ranks_share_a_step_and_one_cannot_go_on_alone(store: PreparedStore, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(store.folder), str(tmp_path / "run"), str(Path(__file__).parent)]
    assert subprocess.run(command, env=environment, check=False, timeout=120).returncode == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert len(final_state(tmp_path / "run")) == 3
    assert "2 x cpu, float32, 2 pairs a step" in (tmp_path / "run" / "log.txt").read_text()
    with pytest.raises(DagmanError, match="devices: 2 -> 1"):
        pretrain(small(steps=3), store, tmp_path / "run")
