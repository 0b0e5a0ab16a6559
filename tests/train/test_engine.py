"""Clipping within the fused optimizer, against PyTorch's in a pass of its own."""

import copy
import math

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

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
