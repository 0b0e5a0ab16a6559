"""Distances and entropies of attention heads, on attention whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch

from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.vit import ViTConfig, ViTEncoder
from dagman.tasks import diversity
from dagman.types import Preparation

SIZES = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), attention=AttentionConfig(num_heads=4))


def mean_distance(sides: tuple[int, int, int]) -> float:
    places = np.array(list(itertools.product(*map(range, sides))))
    return float(np.linalg.norm(places[:, None] - places[None], axis=-1).mean())


@pytest.fixture
def uniform() -> SwinEncoder:
    encoder = SwinEncoder(SIZES).eval()
    encoder.preparation = Preparation(spacing_mm=2.0, crop=(64, 64, 64))
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if "qkv" in name or "table" in name:
                value.zero_()
    return encoder


def test_uniform_attention_reaches_the_mean_distance_and_the_largest_entropy(uniform: SwinEncoder) -> None:
    found = {one.place: one for one in diversity.heads(uniform, torch.rand(1, 1, 64, 64, 64))}
    assert list(found) == ["stage 1", "stage 2", "stage 3", "semantic attention", "stage 4"]
    assert [len(one.distance_mm) for one in found.values()] == [4, 4, 8, 8, 8]
    window = mean_distance((4, 4, 4))
    for number in (1, 2, 3):
        step_mm = 2.0 * 2**number
        one = found[f"stage {number}"]
        assert one.distance_mm[: len(one.distance_mm) // 2] == pytest.approx(step_mm * window, rel=1e-5)
        assert (one.distance_mm[len(one.distance_mm) // 2 :] < step_mm * window).all(), "shifted windows see less far"
        assert one.row_entropy == pytest.approx(1, abs=1e-5)
    assert found["semantic attention"].distance_mm == pytest.approx(32 * window, rel=1e-5)
    assert found["semantic attention"].row_entropy == pytest.approx(1, abs=1e-5)
    assert found["stage 4"].distance_entropy == pytest.approx(math.log(8), abs=1e-6)


def test_a_vit_is_told_block_by_block() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(ViTConfig(width=24, depth=3, num_heads=4)).eval()
    encoder.preparation = Preparation(spacing_mm=2.0, crop=(64, 64, 32))
    with torch.no_grad():
        encoder.blocks[1].qkv.weight.zero_()
    first, uniform, last = diversity.heads(encoder, torch.rand(2, 1, 64, 64, 32))
    assert [one.place for one in (first, uniform, last)] == ["block 1", "block 2", "block 3"]
    assert [len(one.distance_mm) for one in (first, uniform, last)] == [4, 4, 4]
    assert uniform.distance_mm == pytest.approx(2.0 * 16 * mean_distance((4, 4, 2)), rel=1e-5)
    assert uniform.row_entropy == pytest.approx(1, abs=1e-5)
    assert first.row_entropy < 1
    assert last.row_entropy < 1


def test_a_head_that_looks_at_its_own_token_reaches_nowhere(uniform: SwinEncoder) -> None:
    attention = uniform.stages[0].blocks[0].attn
    with torch.no_grad():
        middle = attention.relative_position_bias_table.shape[0] // 2
        attention.relative_position_bias_table[middle, 0] = 100.0
    one = diversity.heads(uniform, torch.rand(1, 1, 32, 32, 64))[0]
    assert one.distance_mm[0] == pytest.approx(0, abs=1e-6)
    assert one.distance_mm[1] > 5
    assert one.row_entropy == pytest.approx(0.75, abs=1e-4), "one of four heads has no entropy"


def test_the_heads_are_those_of_training_too() -> None:
    torch.manual_seed(0)
    encoder = SwinEncoder(SIZES).eval()
    found = diversity.heads(encoder, torch.rand(2, 1, 32, 32, 64))
    assert all(0 < one.row_entropy < 1 for one in found)
    assert not any(module._forward_pre_hooks for module in encoder.modules())
