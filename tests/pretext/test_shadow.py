"""Matrices cast once: the same numbers, and never old ones."""

import copy
from collections import Counter

import pytest
import torch
from torch.profiler import profile

from dagman.nets.encoder import EncoderConfig, build
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.nets.vit import ViTConfig
from dagman.pretext.shadow import Shadow

SWIN = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 4), attention=AttentionConfig(num_heads=4))
VIT = ViTConfig(width=24, depth=2, num_heads=4)


@pytest.mark.parametrize("config", [SWIN, VIT], ids=["Swin", "ViT"])
def test_numbers_are_those_of_the_network_before_and_after_its_weights_move(config: EncoderConfig) -> None:
    torch.manual_seed(0)
    network = build(config).requires_grad_(requires_grad=False).eval()
    shadow, images = Shadow(network), torch.rand(2, 1, 64, 64, 64)
    states = [copy.deepcopy(network.state_dict())]
    for enabled in (False, True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.inference_mode():
            for mine, theirs in zip(shadow(images), network(images), strict=True):
                for one, other in zip(*((x,) if torch.is_tensor(x) else x for x in (mine, theirs)), strict=True):
                    assert torch.equal(one, other)
        with torch.no_grad():
            if enabled:
                network.load_state_dict({name: 1.1 * value for name, value in states[0].items()})
            else:
                torch._foreach_lerp_(list(network.parameters()), [p + 0.1 for p in network.parameters()], 0.3)


def test_each_matrix_is_cast_once_for_all_passes() -> None:
    torch.manual_seed(0)
    network = build(SWIN).requires_grad_(requires_grad=False).eval()
    shadow, images = Shadow(network), torch.rand(1, 1, 64, 64, 64)
    matrices = Counter(tuple(p.shape) for name, p in network.named_parameters() if p.ndim == 2 and "table" not in name)
    with torch.autocast("cpu", torch.bfloat16), profile(record_shapes=True) as record:
        shadow(images)
        shadow(images)
    cast = Counter(tuple(event.input_shapes[0]) for event in record.events() if event.name == "aten::_to_copy")
    assert {shape: cast[shape] for shape in matrices} == matrices
