"""What a run will cost, against PyTorch's own count."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dagman.ct.datasets import DataConfig
from dagman.errors import duration
from dagman.figures import progress
from dagman.nets import kernel
from dagman.nets.encoder import build
from dagman.nets.swin import SwinConfig
from dagman.nets.vit import ViTConfig
from dagman.pretext.codistill import CoDistillation
from dagman.train import cost, engine
from dagman.types import Precision


@pytest.mark.parametrize(
    ("config", "crop", "tolerance"),
    [(small().encoder, (64, 64, 64), 0.05), (ViTConfig(width=96, depth=3, patch_side=8), (32, 64, 48), 1e-12)],
)
def test_operations_are_those_that_pytorch_counts(config, crop, tolerance, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "library", lambda: None)
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
        torch.no_grad(),
    ):
        build(config).eval()(torch.rand(1, 1, *crop))
    assert cost.encoder_flops(config, crop) == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_the_paper_size_is_extrapolated_by_operations() -> None:
    factor = cost.encoder_flops(SwinConfig(), (128, 128, 128)) / cost.encoder_flops(small().encoder, small().data.crop)
    line = cost.time_line(small(batch_size=2), cost.Measured(1.0, 0.5, 0.25), 30, 10, 1)
    assert line.startswith(
        "about 2.00 s a step, 60 s in all without examinations (step 1, every 100, the last), probes and pictures; "
        "about 1.0 GiB; the paper's size"
    )
    assert f"on these 10 volumes would take about {duration(factor * 8000)} here" in line
    assert "(embedding 48, crop 128^3, 800 epochs)" in line
    often = cost.time_line(small(batch_size=2, examine_every=7), cost.Measured(1.0, 0.5, 0.25), 30, 10, 1)
    assert "without examinations (step 1, every 7, the last), probes" in often
    vit = replace(small(), encoder=ViTConfig(), data=DataConfig(crop=(64, 64, 64)))
    factor = cost.encoder_flops(ViTConfig(), (128, 128, 128)) / cost.encoder_flops(ViTConfig(), (64, 64, 64))
    line = cost.time_line(vit, cost.Measured(1.0, 0.5, 0.25), 30, 10, 1)
    assert f"(width 768, crop 128^3, 800 epochs) on these 10 volumes would take about {duration(factor * 8000)}" in line


def test_the_paper_size_says_nothing_of_itself_and_digits_no_more_than_is_known() -> None:
    paper = replace(small(batch_size=2), encoder=SwinConfig(), data=DataConfig())
    line = cost.time_line(paper, cost.Measured(601.19, 0.5, 8.0, 15.6), 30, 10, 1)
    assert line.startswith("about 1200 s a step, 10 h in all without examinations")
    assert line.endswith("; about 16.5 GiB, more than the 15.6 GiB there are")
    for seconds, words in ((0.012345, "0.0123"), (0.9996, "1.00"), (14.26, "14.3"), (1234.5, "1230")):
        line = cost.time_line(small(), cost.Measured(seconds, 0.5, 8.0), 30, 10, 1)
        assert line.startswith(f"about {words} s a step, ")
        assert "more than" not in line


def test_measuring_a_pair_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small()
    torch.manual_seed(0)
    module = CoDistillation(config.encoder, config.method, mean_intensity=0.5, crop=config.data.crop).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.random.get_rng_state()
    forked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: (forked.extend(devices), fork(devices))[1])
    measured = cost.measure(module, config)
    assert not forked, "on a CPU no GPU is asked for its random numbers, nor on a GPU another one"
    assert min(measured[:2]) > 0
    assert measured.base_gib < measured.machine_gib < float("inf")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_picture_is_drawn_of_few_of_many_and_of_missing_values() -> None:
    for count in (1, 40, 5000):
        rows = [{"step": step + 1, "amip": 1 / (step + 1), "ampd": None} for step in range(count)]
        assert progress.png(rows, "run").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("device", "precision", "can", "slow"),
    [
        ("cpu", "bf16", {"architecture": "x86_64"}, True),
        ("cpu", "bf16", {"architecture": "x86_64", "amx_bf16": True}, False),
        ("cpu", "bf16", {"architecture": "x86_64", "avx512_bf16": True}, False),
        ("cpu", "bf16", {"architecture": "aarch64"}, False),
        ("cpu", "float32", {"architecture": "x86_64"}, False),
        ("cuda", "bf16", {"architecture": "x86_64"}, False),
    ],
)
def test_bf16_is_called_slow_where_the_processor_lacks_it(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: Precision, can: dict[str, Any], slow: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert engine.slow_bf16(torch.device(device), precision) is slow


@pytest.mark.parametrize(
    ("own", "files", "granted"),
    [
        ("0::/\n", {"memory.max": "8000\n"}, [8000]),  # a container, whose group is its root
        (
            "0::/job/step\n",
            {"job/memory.max": "4000", "job/step/memory.max": "max", "memory.max": "9000"},
            [4000, 9000],
        ),
        ("4:cpu:/a\n7:memory:/a\n", {"memory/a/memory.limit_in_bytes": "5000", "cpu/a/memory.max": "1"}, [5000]),
        ("0::/\n", {}, []),
    ],
)
def test_memory_is_what_control_groups_grant(
    tmp_path: Path, own: str, files: dict[str, str], granted: list[int]
) -> None:
    (tmp_path / "self").write_text(own)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    assert list(cost.allowances(tmp_path / "self", tmp_path / "groups")) == granted
    assert not list(cost.allowances(tmp_path / "nothing", tmp_path / "groups"))


def test_a_grant_below_what_is_installed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "allowances", lambda *_: [2**30, 2**31])
    assert cost._machine_gib(torch.device("cpu")) == 1
    monkeypatch.setattr(cost, "allowances", lambda *_: [2**60])
    assert 1 < cost._machine_gib(torch.device("cpu")) < 2**30
