"""Processes that share a work or read for it, and clipping within the fused optimizer, against PyTorch's alone."""

import copy
import math
import os
import signal

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import distributed, multiprocessing, nn
from torch.utils.data import Dataset, default_collate

from dagman.ct.datasets import SampleOrder
from dagman.errors import DagmanError, ExitCode
from dagman.train import engine


def taught(size: float) -> nn.Module:
    """A network with gradients, one parameter without."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    (size * network(torch.randn(4, 5))).square().sum().backward()
    network[2].bias.grad = None
    return network


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_a_clipped_step_is_that_of_torch(size: float, wrapped: bool) -> None:
    ours = taught(size)
    plain = copy.deepcopy(ours)
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        other.grad = None if mine.grad is None else mine.grad.clone()
    optimizer = engine.adamw(ours)
    stepper = Fabric(accelerator="cpu").setup(nn.Linear(1, 1), optimizer)[1] if wrapped else optimizer
    groups = [{**group, "fused": False, "foreach": False} for group in engine.adamw(plain).param_groups]
    other_optimizer = torch.optim.AdamW(groups)
    for again in range(2):
        for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
            if mine.grad is not None and again:  # of another size: Adam does not see one factor on all its gradients
                mine.grad, other.grad = 1e6 * mine.grad, 1e6 * mine.grad
        norm = engine.clip(stepper, 3.0)
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 3.0)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
        assert (norm.item() > 3) == (size > 1 or again)
        stepper.step()
        other_optimizer.step()
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-8)


def test_a_gradient_that_is_no_number_shows_in_the_norm() -> None:
    network = taught(1.0)
    network[0].weight.grad[2, 3] = math.nan
    assert math.isnan(engine.clip(engine.adamw(network), 3.0).item())


def test_the_norm_is_that_of_float64_and_0_without_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3000, 2000, bias=False)
    optimizer = engine.adamw(layer)
    assert engine.clip(optimizer, 3.0).item() == 0
    layer.weight.grad = torch.randn(2000, 3000)
    exact = layer.weight.grad.double().norm().item()
    assert engine.clip(optimizer, 3.0).item() == pytest.approx(exact, rel=1e-6)


class Numbers(Dataset[int]):
    """Whole numbers; the fifth cannot be read."""

    def __init__(self, ill: str) -> None:
        self.ill = ill

    def __getitem__(self, sample: int) -> int:
        if sample == 5 and self.ill == "damaged":
            raise DagmanError("CHECKSUM", "five", "is damaged", "prepare again", exit_code=ExitCode.REFUSED)
        if sample == 5 and self.ill == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sample == 5 and self.ill == "too large":
            np.empty(1 << 60, np.uint8)
        if sample == 5 and self.ill == "a bug":
            raise RuntimeError("shapes differ")
        return sample


@pytest.mark.parametrize(("ill", "workers"), [("damaged", 0), ("damaged", 1), ("killed", 1)])
def test_what_a_reader_meets_is_told_whichever_process_reads(ill: str, workers: int) -> None:
    """A damaged file is the same error in a process of its own: run again, it would be met again."""
    fabric = engine.fabric(1, "float32", "cpu")
    source = engine.batches(fabric, Numbers(ill), SampleOrder(0, 8), default_collate, batch=2, workers=workers)
    assert next(source).tolist() == [0, 1]
    with pytest.raises(DagmanError) as caught:
        list(source)
    wanted = ("READER", ExitCode.STOPPED) if ill == "killed" else ("CHECKSUM", ExitCode.REFUSED)
    assert (caught.value.code, caught.value.exit_code) == wanted


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_out_of_memory_is_no_fault_of_what_it_reads(workers: int) -> None:
    fabric = engine.fabric(1, "float32", "cpu")
    source = engine.batches(fabric, Numbers("too large"), SampleOrder(0, 8), default_collate, batch=2, workers=workers)
    with pytest.raises(DagmanError) as caught, engine.memory_guard("lower the batch size"):
        list(source)
    assert (caught.value.code, caught.value.exit_code) == ("MEMORY", ExitCode.RESOURCES)


def test_a_bug_where_no_other_process_reads_stays_one() -> None:
    fabric = engine.fabric(1, "float32", "cpu")
    source = engine.batches(fabric, Numbers("a bug"), SampleOrder(0, 8), default_collate, batch=2, workers=0)
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(source)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SLURM |= {"SLURM_NNODES": "1", "SLURM_NODELIST": "node", "SLURM_NTASKS": "4"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "7", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "4"}])
def test_a_slurm_job_alone_starts_no_processes(monkeypatch: pytest.MonkeyPatch, step: dict[str, str]) -> None:
    """`sbatch --ntasks=4` and no `srun`, or four works side by side: each process is one of its own."""
    for name, value in (SLURM | step).items():
        monkeypatch.setenv(name, value)
    assert engine.fabric(1, "float32", "cpu").world_size == 1


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (TORCHRUN, "E-DEVICE devices 1: but torchrun started 2 processes here; give devices 2"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, "E-DEVICE devices 3: but srun started 4 processes here"),
    ],
)
def test_a_launcher_that_started_others_than_asked_for_is_told(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DagmanError, match=said):
        engine.fabric(int(said.split()[2].strip(":")), "float32", "cpu")


def test_what_srun_cannot_do_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --ntasks=4`, without the tasks of a node, of which Lightning wants to know."""
    for name, value in (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DagmanError, match="E-DEVICE srun: what it started cannot work together"):
        engine.fabric(4, "float32", "cpu")


def leave_or_go_on(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    distributed.all_reduce(torch.ones(1))
    if rank == 1:
        os._exit(0)
    with pytest.raises(DagmanError, match="another process of the run ended") as caught, engine.company_guard():
        distributed.all_reduce(torch.ones(1))
    assert (caught.value.code, caught.value.exit_code) == ("PROCESS", ExitCode.RESOURCES)
    os._exit(0)


def test_the_end_of_another_process_is_told(tmp_path: object) -> None:
    multiprocessing.spawn(leave_or_go_on, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), distributed.DistBackendError("Duplicate GPU detected : rank 0 and rank 1")]
)
def test_other_errors_pass_the_guard(error: RuntimeError) -> None:
    with pytest.raises(type(error), match=str(error)), engine.company_guard():
        raise error
