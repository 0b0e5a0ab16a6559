"""With the same weights the network is MONAI's SwinUNETR; with semantic attention it is not, and learns."""

import pytest
import torch
from monai.networks.nets import UNETR, SwinUNETR
from torch import nn

from dagman.errors import DagmanError
from dagman.nets.encoder import build
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.nets.unetr import SegmentationNetwork, ViTDecoder
from dagman.nets.vit import ViTConfig
from dagman.nets.weights import export_monai

PLAIN = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), attention=None)
WITH = SwinConfig(
    embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), attention=AttentionConfig(stage=2, num_heads=4)
)


def network(config, num_classes=3):
    torch.manual_seed(0)
    return SegmentationNetwork(build(config), num_classes).eval()


@pytest.mark.parametrize("sides", [(64, 64, 64), (32, 64, 32)])
def test_without_semantic_attention_it_equals_monai(tmp_path, sides):
    from safetensors.torch import load_file

    ours = network(PLAIN)
    theirs = SwinUNETR(1, 3, feature_size=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), window_size=4).eval()
    export_monai(ours.encoder, tmp_path / "swin.safetensors")
    tensors = load_file(tmp_path / "swin.safetensors") | ours.decoder.state_dict()
    theirs.load_state_dict(tensors)
    images = torch.rand(2, 1, *sides)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


def test_a_vit_of_patch_16_decodes_as_monais_unetr():
    config = ViTConfig(width=48, depth=4, num_heads=4)
    torch.manual_seed(0)
    ours = ViTDecoder(config, 3).eval()
    theirs = UNETR(1, 3, (32, 32, 32), hidden_size=48, mlp_dim=96, num_heads=4).eval()
    names = {"skips.0": "encoder2", "skips.1": "encoder3", "skips.2": "encoder4"}
    names |= {f"ups.{level}": f"decoder{level + 2}" for level in range(4)}
    weights = {}
    for name, value in ours.state_dict().items():
        head = next((old for old in names if name.startswith(f"{old}.")), "")
        weights[names[head] + name[len(head) :] if head else name] = value
    assert set(weights) == {name for name in theirs.state_dict() if not name.startswith("vit.")}
    theirs.load_state_dict(weights, strict=False)
    levels = [torch.randn(1, 48, 2, 2, 2) for _ in range(4)]
    flat = [level.flatten(2).transpose(1, 2) for level in levels]

    class Given(nn.Module):
        def forward(self, _):
            return flat[3], {3: flat[0], 6: flat[1], 9: flat[2]}

    theirs.vit = Given()
    images = torch.rand(1, 1, 32, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images, tuple(levels)), theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [WITH, ViTConfig(width=48, depth=4, patch_side=8, num_heads=4)])
def test_every_part_that_the_image_passes_learns(config):
    model = network(config).train()
    model(torch.rand(2, 1, 32, 32, 64)).square().mean().backward()
    idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all(word.endswith("hidden_token") or "semantic_attention.norm" in word for word in idle), idle


def test_semantic_attention_takes_part():
    model = network(WITH)
    images = torch.rand(1, 1, 32, 32, 64)
    with torch.inference_mode():
        before = model(images)
        for parameter in model.encoder.semantic_attention.blocks.parameters():
            parameter.mul_(1.5)
        assert (model(images) - before).abs().max() > 1e-4


def test_a_vit_that_no_unetr_fits_is_refused():
    with pytest.raises(DagmanError, match=r"E-CONFIG.*patches of 12 voxels"):
        network(ViTConfig(width=48, depth=4, patch_side=12, num_heads=4))
