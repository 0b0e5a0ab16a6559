"""The four losses as pure functions, against values written out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dagman.pretext import losses

quick = settings(derandomize=True, deadline=None, max_examples=60)


def drawn(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@quick
@given(st.integers(0, 999), st.floats(0.02, 2), st.integers(2, 40))
def test_cross_entropy_is_at_least_the_teachers_entropy(seed: int, temperature: float, prototypes: int) -> None:
    teacher = losses.sharpen(drawn(seed, 5, prototypes), torch.zeros(prototypes), temperature)
    entropy = losses.entropy(teacher)
    other = losses.cross_entropy(drawn(seed + 1, 5, prototypes), teacher, temperature=0.1)
    assert (other >= entropy - 1e-9).all()
    same = losses.cross_entropy(drawn(seed, 5, prototypes), teacher, temperature=temperature)
    torch.testing.assert_close(same, entropy, rtol=1e-9, atol=1e-9)


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3) / 10]], dtype=torch.float64)  # over 0.1: probabilities 1/4, 3/4
    teacher = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    expected = -(0.5 * math.log(0.25) + 0.5 * math.log(0.75))
    assert losses.cross_entropy(logits, teacher, temperature=0.1).item() == pytest.approx(expected, abs=1e-12)


def test_a_center_equal_to_the_logits_leaves_a_uniform_distribution() -> None:
    logits = drawn(0, 8)
    torch.testing.assert_close(losses.sharpen(logits[None], logits, 0.04), torch.full((1, 8), 1 / 8).double())


@quick
@given(st.integers(0, 999), st.sampled_from([1e-1, 1e-4, 1e-8, 1e-30]))
def test_a_vanishing_temperature_gives_a_finite_one_hot(seed: int, temperature: float) -> None:
    logits = drawn(seed, 3, 16).float()
    probabilities = losses.sharpen(logits, torch.zeros(16), temperature)
    loss = losses.cross_entropy(logits, probabilities, temperature=0.1)
    assert probabilities.isfinite().all()
    assert loss.isfinite().all()
    assert losses.entropy(probabilities).isfinite().all()
    if temperature <= 1e-8:
        assert torch.equal(probabilities, torch.nn.functional.one_hot(logits.argmax(dim=1), 16).float())


def test_half_precision_logits_are_compared_in_single_precision() -> None:
    logits = torch.full((2, 4), 3e4, dtype=torch.float16)
    logits[:, 0] = -3e4
    probabilities = losses.sharpen(logits, torch.zeros(4), 0.04)
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities[0], torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))
    loss = losses.cross_entropy(logits, probabilities, temperature=0.1)
    torch.testing.assert_close(loss, torch.full((2,), math.log(3)))


def test_each_view_is_averaged_over_its_own_hidden_cells() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]], requires_grad=True)
    hidden = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    mean = losses.mean_over_hidden(values, hidden)
    assert mean.item() == pytest.approx(((1 + 2) / 2 + 4 / 1 + 0) / 3)
    mean.backward()
    assert torch.equal(values.grad != 0, hidden)


def test_image_error_is_the_mean_over_the_voxels_of_hidden_cells() -> None:
    prediction = torch.zeros(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    images = torch.arange(24, dtype=torch.float64).view(3, 2, 2, 2) + 1
    loss = losses.masked_l1(prediction, images)
    assert loss.item() == pytest.approx(sum(range(1, 25)) / (24 + 1e-5), abs=1e-12)
    loss.backward()
    assert torch.equal(prediction.grad, torch.full_like(prediction, -1 / (24 + 1e-5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_hidden_is_a_loss_of_zero_that_stays_in_the_graph(dtype: torch.dtype) -> None:
    prediction = torch.rand(0, 4, 4, 4, dtype=dtype, requires_grad=True)
    image_term = losses.masked_l1(prediction, torch.rand(0, 4, 4, 4))
    values = torch.rand(2, 0, requires_grad=True)
    patch_term = losses.mean_over_hidden(values, torch.zeros(2, 0, dtype=torch.bool))
    (image_term + patch_term).backward()
    assert image_term.item() == patch_term.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))
    assert values.grad.shape == (2, 0)


@quick
@given(st.integers(0, 999), st.integers(4, 30), st.integers(2, 12))
def test_balanced_rows_are_distributions_over_evenly_named_prototypes(seed: int, rows: int, prototypes: int) -> None:
    logits, center = drawn(seed, rows, prototypes), drawn(seed + 1, prototypes)
    found = losses.balanced(logits, center, 0.5)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(rows, dtype=torch.float64))
    torch.testing.assert_close(found, losses.balanced(logits + 3, torch.zeros(prototypes), 0.5))
    biased = losses.balanced(logits + 4 * drawn(seed + 2, prototypes), torch.zeros(prototypes), 0.5)
    assert (biased.mean(dim=0) * prototypes - 1).abs().max() < 0.5, "whatever a prototype is liked for"


def test_balanced_is_sinkhorn_knopp_written_out() -> None:
    logits = drawn(3, 6, 4)
    shares = (logits / 0.2).exp()
    for _ in range(3):
        shares = shares / shares.sum(dim=0)
        shares = shares / shares.sum(dim=1, keepdim=True)
    torch.testing.assert_close(losses.balanced(logits, torch.zeros(4), 0.2), shares)
    cells = losses.balanced(logits.view(2, 3, 4), torch.zeros(2, 3, 4), 0.2)
    torch.testing.assert_close(cells.flatten(0, 1), shares)


def test_one_center_for_all_rows_changes_nothing_and_one_for_each_row_does() -> None:
    logits = drawn(5, 6, 4)
    same = losses.balanced(logits, drawn(6, 4).expand(6, 4), 0.2)
    other = losses.balanced(logits, drawn(7, 6, 4), 0.2)
    assert (same - other).abs().max() > 0.1


def test_rows_that_no_loss_asks_about_do_not_change_the_balance_of_the_others() -> None:
    logits, other = drawn(8, 6, 4), drawn(9, 6, 4)
    counted = torch.tensor([True, True, False, True, False, True])
    mixed = torch.where(counted[:, None], logits, other)
    center = torch.zeros(4)
    found = losses.balanced(mixed, center, 0.2, counted=counted)
    alone = losses.balanced(logits[counted], center, 0.2)
    torch.testing.assert_close(found[counted], alone)
    assert found.isfinite().all()
    nothing = losses.balanced(logits, center, 0.2, counted=torch.zeros(6, dtype=torch.bool))
    torch.testing.assert_close(nothing, (logits / 0.2).softmax(dim=1))
