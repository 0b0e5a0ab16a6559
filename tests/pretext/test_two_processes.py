"""Two processes that share a batch end with the centers and gradients of one that sees it whole."""

from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn

from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.pretext.method import HeadConfig, MethodConfig
from dagman.types import Views

CROP = (32, 64, 64)
KNOBS = Knobs(class_temperature=0.04, patch_temperature=0.04, attended=True)


def build() -> CoDistillation:
    torch.manual_seed(0)
    attention = AttentionConfig(num_heads=4)
    encoder = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), drop_path=0.0, attention=attention)
    method = MethodConfig(heads=HeadConfig(num_prototypes=16, hidden_width=24, bottleneck_width=8), dropped_ratio=0.0)
    return CoDistillation(encoder, method, mean_intensity=0.5, crop=CROP)


def pairs() -> Views:
    drawn = torch.rand(2, 2, 1, *CROP, generator=torch.Generator().manual_seed(1))
    return Views(drawn[0], drawn[1], torch.arange(2), torch.zeros(2))


def share(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = build()
    mine = Views(*(part[rank : rank + 1] for part in pairs()))
    shared = nn.parallel.DistributedDataParallel(model)
    outcome = shared(mine, KNOBS, torch.Generator())
    outcome.losses.total.backward()
    model.move_centers(outcome.means)
    gradients = {name: value.grad for name, value in model.student.named_parameters()}
    torch.save({"centers": dict(model.named_buffers()), "gradients": gradients}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    multiprocessing.spawn(share, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    whole = build()
    outcome = whole(pairs(), KNOBS, torch.Generator())
    outcome.losses.total.backward()
    whole.move_centers(outcome.means)
    for part in parts:
        for name, center in whole.named_buffers():
            torch.testing.assert_close(part["centers"][name], center, rtol=1e-4, atol=1e-6)
        for name, value in whole.student.named_parameters():
            error = (part["gradients"][name] - value.grad).abs().max() / value.grad.abs().max()
            assert error < 1e-3, name
