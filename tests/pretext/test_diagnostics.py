"""What is watched, on inputs whose answer is known."""

import math

import pytest
import torch

from dagman.pretext import diagnostics, hiding


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_spread_is_zero_for_one_direction_and_one_for_all() -> None:
    length = torch.rand(64, 1) + 0.5
    assert diagnostics.spread(length * drawn(32)).item() == pytest.approx(0, abs=1e-6)
    assert diagnostics.spread(drawn(4000, 32)).item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rows", [4, 60, 1000])
def test_effective_rank_counts_directions(rows: int) -> None:
    basis = torch.linalg.qr(drawn(16, 16)).Q
    assert diagnostics.effective_rank(drawn(16).expand(rows, 16)).item() == pytest.approx(1, abs=1e-3)
    for rank in (2, 4):
        spanned = basis[torch.arange(rows) % rank]
        assert diagnostics.effective_rank(spanned).item() == pytest.approx(rank, rel=0.01)


@pytest.mark.parametrize("rows", [129, 140, 144, 160, 200, 5000])
def test_effective_rank_counts_no_row_twice(rows: int) -> None:
    """Of rows at right angles each adds one."""
    assert diagnostics.effective_rank(torch.eye(rows)).item() == pytest.approx(diagnostics.RANK_ROWS, rel=1e-3)


def test_effective_rank_against_singular_values() -> None:
    vectors = drawn(40, 24)
    share = torch.linalg.svdvals(vectors.double())
    share /= share.sum()
    assert diagnostics.effective_rank(vectors).item() == pytest.approx(math.exp(-(share * share.log()).sum()), rel=1e-6)


def test_effective_rank_survives_what_is_not_finite() -> None:
    vectors = torch.full((4, 8), math.nan)
    assert diagnostics.effective_rank(vectors).isfinite()


def test_attention_that_is_uniform_and_attention_on_one_cell() -> None:
    attention = torch.stack([torch.full((64,), 1 / 64), torch.eye(64)[5]])
    dropped = torch.zeros(2, 64, dtype=torch.bool)
    dropped[1, 5] = dropped[0, :16] = True
    hidden = torch.zeros(2, 64, dtype=torch.bool)
    hidden[0, 8:24] = True
    found = diagnostics.of_hiding(hidden, dropped, attention)
    assert found["attention_entropy"].item() == pytest.approx((1 + 0) / 2)
    assert found["attention_peak"].item() == pytest.approx((1 + 64) / 2)
    assert found["attention_dropped_ratio"].item() == pytest.approx((0.25 + 1) / 2)
    assert found["hidden_ratio"].item() == pytest.approx(16 / 128)
    assert found["hidden_dropped_ratio"].item() == pytest.approx(8 / 16)


def entropy_share(rows: torch.Tensor, counted: torch.Tensor | None = None) -> float:
    return diagnostics.entropy_share(diagnostics.told(rows, counted)).item()


def variety(rows: torch.Tensor, counted: torch.Tensor | None = None) -> float:
    return diagnostics.variety(diagnostics.told(rows, counted)).item()


def test_entropy_share_counts_hidden_rows_only() -> None:
    rows = torch.stack([torch.full((8,), 1 / 8), torch.eye(8)[0], torch.eye(8)[1]])
    assert entropy_share(rows) == pytest.approx(1 / 3)
    assert entropy_share(rows, torch.tensor([True, True, False])) == pytest.approx(1 / 2)
    assert math.isnan(entropy_share(rows, torch.zeros(3, dtype=torch.bool)))


def test_variety_is_what_tells_rows_apart() -> None:
    same, apart = torch.eye(8)[[3, 3, 3, 3]], torch.eye(8)[:4]
    assert variety(same) == 0
    assert variety(apart) == pytest.approx(1)
    assert variety(torch.full((4, 8), 1 / 8)) == pytest.approx(0, abs=1e-6)
    assert variety(torch.eye(8)[[0, 1, 0, 1]]) == pytest.approx(1 / 2)
    assert variety(apart, torch.tensor([True, True, False, False])) == pytest.approx(1)
    assert variety(apart, torch.tensor([True, False, False, False])) == 0


def test_what_chunks_say_adds_up_to_what_all_rows_say() -> None:
    rows, counted = drawn(12, 8).softmax(dim=1), torch.arange(12) % 3 > 0
    whole = diagnostics.told(rows, counted)
    parts = diagnostics.told(rows[:5], counted[:5]) + diagnostics.told(rows[5:], counted[5:])
    for mine, others in zip(whole, parts, strict=True):
        torch.testing.assert_close(mine, others)


def test_visible_mean_leaves_hidden_voxels_out() -> None:
    images = torch.rand(2, 1, 4, 4, 4)
    hidden = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    hidden[0, 0], hidden[1] = True, True
    mean = diagnostics.visible_mean(hiding.cut(images, 2), hidden)
    torch.testing.assert_close(mean[0], images[0, :, 2:].mean())
    assert mean[1] == 0


@pytest.mark.parametrize("rows", [16, 32])
def test_what_is_told_is_the_same_under_autocast(rows: int) -> None:
    nearly = (1e-2 * drawn(rows, 128)).softmax(dim=1)
    exact = diagnostics.told(nearly.double())
    with torch.autocast("cpu", torch.bfloat16):
        said = diagnostics.told(nearly)
    assert 0 < diagnostics.variety(exact) < 1e-3
    assert diagnostics.variety(said).item() == pytest.approx(diagnostics.variety(exact).item(), rel=0.1)
    assert diagnostics.entropy_share(said).item() == pytest.approx(diagnostics.entropy_share(exact).item(), abs=1e-5)
