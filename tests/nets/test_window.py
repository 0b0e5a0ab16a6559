import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dagman.nets.window import WindowAttention, fused_attention, wide_heads
from dagman.nets.windows import partition, relative_position_index, reverse, window_layout

CPU = torch.device("cpu")
GRIDS = st.tuples(*[st.integers(1, 9)] * 3)


@settings(deadline=None, max_examples=60)
@given(grid=GRIDS, window=st.integers(2, 5), batch=st.integers(1, 3), shifted=st.booleans())
def test_reverse_undoes_partition_for_any_size(grid, window, batch, shifted):
    layout = window_layout(batch, grid, window, window // 2 if shifted else 0, CPU)
    x = torch.randn(batch, *grid, 3)
    windows = partition(x, layout)
    assert windows.shape[1] == layout.tokens
    assert torch.equal(reverse(windows, layout, grid), x)
    assert windows.abs().sum() == pytest.approx(x.abs().sum().item(), rel=1e-5)  # the rest is zeros


def test_a_window_holds_the_tokens_of_one_cube_and_the_last_one_comes_round():
    layout = window_layout(2, (8, 4, 4), 4, 2, CPU)
    x = torch.arange(8.0)[None, :, None, None, None].expand(2, 8, 4, 4, 1)
    places = [sorted(set(window.flatten().tolist())) for window in partition(x, layout)]
    assert places == [[2, 3, 4, 5]] * 2 + [[0, 1, 6, 7]] * 2
    (start, stop, mask), *others = layout.masks
    assert (start, stop, others) == (2, 4, [])
    assert (mask == 0).sum() == 2 * 32**2
    assert mask.unique().exp().tolist() == [0, 1]  # no denormals


def test_gradients_pass_the_gather_as_they_pass_plain_indexing():
    layout = window_layout(2, (3, 4, 6), 4, 2, CPU)
    x = torch.randn(2, 3, 4, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reverse(partition(x, layout).sin(), layout, (3, 4, 6)), x)
    assert torch.autograd.gradgradcheck(lambda x: partition(x, layout).sin(), x)


def plain_attention(module: WindowAttention, x: Tensor) -> Tensor:
    """Shifted-window attention as one dense softmax over all pairs of tokens, every rule written as a comparison."""
    batch, *grid, width = x.shape
    window, heads = module.window, module.num_heads
    sides = [min(side, window) for side in grid]
    shifts = [module.shift if side > window else 0 for side in grid]
    padded = [-(-side // step) * step for side, step in zip(grid, sides, strict=True)]
    tokens = torch.zeros(batch, *padded, width, dtype=x.dtype)
    tokens[:, : grid[0], : grid[1], : grid[2]] = x
    places = torch.tensor(list(itertools.product(*map(range, padded))))
    moved = (places - torch.tensor(shifts)) % torch.tensor(padded)
    in_window = moved // torch.tensor(sides)
    came_round = places < torch.tensor(shifts)
    allowed = ((in_window[:, None] == in_window) & (came_round[:, None] == came_round)).all(-1)
    inside = moved % torch.tensor(sides)
    number = (inside[:, 0] * sides[1] + inside[:, 1]) * sides[2] + inside[:, 2]
    # MONAI reads the bias of the n-th token of a small window where the n-th token of a whole window has it
    corner = torch.stack([number // window**2, number // window % window, number % window], dim=-1)
    offset = corner[:, None] - corner + window - 1
    row = (offset[..., 0] * (2 * window - 1) + offset[..., 1]) * (2 * window - 1) + offset[..., 2]
    bias = module.relative_position_bias_table[row].permute(2, 0, 1)
    qkv = module.qkv(tokens.reshape(batch, -1, width)).view(batch, -1, 3, heads, width // heads)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    logits = query @ key.transpose(-2, -1) / (width // heads) ** 0.5 + bias
    mixed = logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ value
    out = module.proj(mixed.transpose(1, 2).reshape(batch, *padded, width))
    return out[:, : grid[0], : grid[1], : grid[2]]


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((8, 8, 8), 4, 0),
        ((8, 8, 8), 4, 2),
        ((6, 8, 12), 4, 2),  # padded
        ((4, 6, 8), 4, 2),  # one axis loses its shift
        ((2, 4, 8), 4, 2),  # and is smaller than the window
        ((2, 2, 2), 4, 2),
        ((5, 7, 9), 3, 1),
    ],
)
def test_both_paths_equal_dense_attention(grid, window, shift):
    torch.manual_seed(0)
    module = WindowAttention(12, num_heads=3, window=window, shift=shift).double()
    x = torch.randn(2, *grid, 12, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(2, *grid, 12, dtype=torch.float64)
    expected = plain_attention(module, x)
    wanted = torch.autograd.grad((expected * probe).sum(), [x, *module.parameters()])
    explicit = module.proj(module(x))
    found = torch.autograd.grad((explicit * probe).sum(), [x, *module.parameters()])
    with torch.no_grad():
        fused = module.proj(module(x))
    # logits are float32 in the explicit path, as under autocast
    torch.testing.assert_close(explicit, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(fused, expected, rtol=0, atol=1e-6)
    for ours, plain in zip(found, wanted, strict=True):
        assert (ours - plain).norm() <= 1e-5 * plain.norm()


def test_the_far_side_of_the_map_has_no_influence():
    module = WindowAttention(12, num_heads=3, window=4, shift=2)
    x = torch.randn(1, 8, 8, 8, 12, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[0, 0].square().sum(), x)
    assert gradient[0, :2].abs().sum() > 0
    assert gradient[0, 2:].abs().sum() == 0


def test_bfloat16_keeps_logits_in_float32():
    torch.manual_seed(0)
    module = WindowAttention(24, num_heads=4, window=4, shift=2)
    x = torch.randn(2, 8, 8, 8, 24)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        trained = module(x)
        with torch.no_grad():
            fused = module(x)
    assert trained.dtype == fused.dtype == torch.bfloat16
    for rounded in (trained, fused):
        assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_layouts_are_cached_and_usable_for_training_after_inference_mode():
    module = WindowAttention(12, num_heads=3, window=4, shift=2)
    x = torch.randn(1, 4, 8, 12, 12)
    window_layout.cache_clear()
    relative_position_index.cache_clear()
    with torch.inference_mode():
        module(x)
    module(x).sum().backward()
    assert window_layout.cache_info().misses == 1
    assert set(module.state_dict()) == {
        "relative_position_bias_table",
        *(f"{a}.{b}" for a in ("qkv", "proj") for b in ("weight", "bias")),
    }


@pytest.mark.parametrize("head_width", [12, 16, 6])
def test_heads_widened_inside_the_weights_mix_the_same(head_width):
    torch.manual_seed(0)
    width, heads = 4 * head_width, 4
    module = WindowAttention(width, num_heads=heads, window=4, shift=2).double()
    layout = window_layout(1, (8, 4, 4), 4, 2, CPU)
    x = torch.randn(2, 64, width, dtype=torch.float64)
    weight, bias = wide_heads(module.qkv.weight, head_width), wide_heads(module.qkv.bias, head_width)
    wide = (x @ weight.T + bias).view(2, 64, 3, heads, -1).permute(2, 0, 3, 1, 4)
    assert wide.shape[-1] == -(-head_width // 8) * 8
    mixed = fused_attention(*wide, module.bias(64), layout, scale=head_width**-0.5)
    assert not mixed[..., head_width:].any()
    plain = module.qkv(x).view(2, 64, 3, heads, head_width).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(
        mixed[..., :head_width], fused_attention(*plain, module.bias(64), layout, scale=head_width**-0.5)
    )
