"""Ways of hiding: exact counts, hints, ties, invariances, repetition."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dagman.pretext import hiding

quick = settings(derandomize=True, deadline=None, max_examples=80)
hundredths = st.integers(0, 100).map(lambda n: Fraction(n, 100))
numbers_of_cells = st.sampled_from([8, 10, 27, 64, 100, 216, 360, 512]) | st.integers(1, 600)


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention_of(seed: int, cells: int, *, batch: int = 2, levels: int | None = None) -> Tensor:
    """Rows that sum to 1; with few `levels`, full of ties."""
    if levels:
        raw = torch.randint(1, levels + 1, (batch, cells), generator=keyed(seed)).double()
    else:
        raw = torch.rand(batch, cells, generator=keyed(seed), dtype=torch.float64) + 1e-3
    return raw / raw.sum(dim=1, keepdim=True)


def ranks(attention: Tensor) -> Tensor:
    """Rank of each cell by value, then index, with Python's own sort."""
    found = torch.empty(attention.shape, dtype=torch.long)
    for row, values in enumerate(attention.tolist()):
        for rank, cell in enumerate(sorted(range(len(values)), key=lambda c: (-values[c], c))):
            found[row, cell] = rank
    return found


@quick
@given(st.integers(0, 10_000).map(lambda n: Fraction(n, 10_000)), st.integers(1, 32_768))
def test_counts_are_those_of_exact_fractions(ratio: Fraction, cells: int) -> None:
    assert hiding.floor_count(float(ratio), cells) == math.floor(ratio * cells)
    assert hiding.ceil_count(float(ratio), cells) == math.ceil(ratio * cells)


def test_counts_where_floats_fall_short() -> None:
    assert math.floor(0.7 * 360) == 251
    assert hiding.floor_count(0.7, 360) == 252
    assert math.ceil(0.07 * 100) == 8
    assert hiding.ceil_count(0.07, 100) == 7
    assert hiding.floor_count(0.7, 512) - hiding.floor_count(0.1, 512) == 307


@quick
@given(hundredths, hundredths, numbers_of_cells, st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_attended_hides_the_ranks_the_method_names(
    r: Fraction, s: Fraction, cells: int, levels: int | None, seed: int
) -> None:
    s = min(r, s)
    attention = attention_of(seed, cells, levels=levels)
    rank, shown, ranked = ranks(attention), math.floor(s * cells), math.floor(r * cells)
    settings_of = {"ratio": float(r), "hint_ratio": float(s)}

    top = hiding.attended(attention, hints="top", **settings_of)
    assert torch.equal(top, (rank >= shown) & (rank < ranked))
    none = hiding.attended(attention, hints="none", **settings_of)
    assert torch.equal(none, rank < ranked)
    shift = hiding.attended(attention, hints="shift", **settings_of)
    assert torch.equal(shift, (rank >= shown) & (rank < shown + ranked))
    lowest = hiding.unattended(attention, ratio=float(r))
    assert torch.equal(lowest, rank >= cells - ranked)

    revealing = hiding.attended(attention, hints="attmask", generator=keyed(seed), **settings_of)
    assert (revealing.sum(dim=1) == ranked - math.floor(s * r * cells)).all()
    revealed = none & ~revealing
    assert (rank[revealed] < shown).all()
    assert not (revealing & ~none).any()


def test_attmask_draws_its_hints_and_draws_them_again_from_the_same_key() -> None:
    attention = attention_of(0, 512, batch=1)
    drawn = [
        hiding.attended(attention, ratio=0.5, hint_ratio=0.2, hints="attmask", generator=keyed(k)) for k in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@quick
@given(st.integers(0, 999), st.sampled_from(["top", "shift", "none"]))
def test_only_the_order_of_attention_counts(seed: int, hints: hiding.Hints) -> None:
    attention = attention_of(seed, 64)
    expected = hiding.attended(attention, ratio=0.6, hint_ratio=0.1, hints=hints)
    for rescaled in (attention * 7 + 3, attention.log(), attention**3):
        assert torch.equal(hiding.attended(rescaled, ratio=0.6, hint_ratio=0.1, hints=hints), expected)


@quick
@given(st.integers(0, 999))
def test_hiding_moves_with_the_cells(seed: int) -> None:
    attention = attention_of(seed, 64)
    order = torch.randperm(64, generator=keyed(seed))
    moved = hiding.attended(attention[:, order], ratio=0.7, hint_ratio=0.1)
    assert torch.equal(moved, hiding.attended(attention, ratio=0.7, hint_ratio=0.1)[:, order])


@quick
@given(numbers_of_cells, st.integers(1, 5), st.integers(0, 999), st.data())
def test_random_hides_exactly_what_it_is_told(cells: int, batch: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, cells))
    hidden = hiding.random(batch, cells, count=count, generator=keyed(seed))
    assert hidden.shape == (batch, cells)
    assert (hidden.sum(dim=1) == count).all()
    assert torch.equal(hidden, hiding.random(batch, cells, count=count, generator=keyed(seed)))


def test_random_favours_no_cell() -> None:
    chosen = hiding.random(20_000, 10, count=3, generator=keyed(0)).double().mean(dim=0)
    assert (chosen - 0.3).abs().max() < 4 * math.sqrt(0.3 * 0.7 / 20_000)


@quick
@given(
    st.sampled_from([(2, 2, 2), (2, 4, 4), (4, 4, 4), (6, 6, 6), (8, 8, 8), (4, 8, 6)]), hundredths, st.integers(0, 99)
)
def test_blocks_meet_their_budget(grid: tuple[int, int, int], r: Fraction, seed: int) -> None:
    hidden = hiding.blocks(grid, ratio=float(r), generator=keyed(seed))
    assert int(hidden.sum()) == math.floor(r * math.prod(grid))


def neighbours_alike(hidden: Tensor) -> float:
    """Share of pairs of neighbours along x that are both hidden or both visible, over views."""
    return (hidden[:, 1:] == hidden[:, :-1]).double().mean().item()


def test_blocks_are_blocks() -> None:
    boxes = torch.stack([hiding.blocks((8, 8, 8), ratio=0.4, generator=keyed(k)) for k in range(40)])
    singles = hiding.random(40, 512, count=204, generator=keyed(0))
    alike, by_chance = (neighbours_alike(hidden.view(40, 8, 8, 8)) for hidden in (boxes, singles))
    assert by_chance == pytest.approx(0.4**2 + 0.6**2, abs=0.01)
    assert alike > 0.75


@quick
@given(st.integers(0, 999), st.sampled_from([1, 2, 4, 8]))
def test_repetition_gives_every_voxel_the_value_of_its_cell(seed: int, times: int) -> None:
    grid = (2, 3, 4)
    hidden = hiding.random(2, 24, count=11, generator=keyed(seed))
    voxels = hiding.repeat(hidden, grid, times)
    assert voxels.shape == (2, 2 * times, 3 * times, 4 * times)
    x, y, z = (torch.arange(side * times) // times for side in grid)
    cell = (x[:, None, None] * 3 + y[:, None]) * 4 + z
    assert torch.equal(voxels, hidden[:, cell])
