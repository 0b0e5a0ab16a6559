"""The Swin equals MONAI's `SwinTransformer` (1.6.1) in outputs and gradients, weights copied by renaming."""

import copy
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder

PAPER = SwinConfig(attention=None)
TINY = SwinConfig(embed_dim=24, depths=(2, 2, 4, 2), attention=None)
ODD = SwinConfig(
    embed_dim=12, depths=(1, 3, 2, 2), num_heads=(2, 3, 4, 6), window=7, mlp_ratio=2.0, patch_norm=True, attention=None
)
THREE = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), window=3, attention=None)


@cache
def monai_swin(config: SwinConfig) -> nn.Module:
    """MONAI's network; what starts at a constant or near zero is drawn too, so that all of it can be seen."""
    from monai.networks.nets.swin_unetr import SwinTransformer

    torch.manual_seed(1)
    net = SwinTransformer(
        in_chans=1,
        embed_dim=config.embed_dim,
        window_size=(config.window,) * 3,
        patch_size=(2, 2, 2),
        depths=config.depths,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=True,
        patch_norm=config.patch_norm,
        downsample="merging",
        use_v2=False,
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name or "table" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return net.eval()


def renamed(name: str) -> str:
    return re.sub(r"layers(\d)\.0", lambda match: f"stages.{int(match[1]) - 1}", name)


def ours_with_their_weights(config: SwinConfig) -> SwinEncoder:
    theirs = {renamed(n): t for n, t in monai_swin(config).state_dict().items() if "position_index" not in n}
    encoder = SwinEncoder(config).eval()
    missing, unexpected = encoder.load_state_dict(theirs, strict=False)
    assert unexpected == []
    assert missing == ["hidden_token"]
    return encoder


def largest_difference(ours, theirs) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("config", "crop"),
    [
        (PAPER, (32, 32, 32)),
        (PAPER, (64, 64, 64)),
        (PAPER, (96, 96, 96)),
        (PAPER, (32, 64, 96)),
        *((config, crop) for config in (TINY, ODD, THREE) for crop in ((32, 32, 32), (64, 64, 64), (64, 32, 96))),
        (ODD, (96, 96, 96)),
        (THREE, (96, 96, 96)),
    ],
)
@torch.no_grad()
def test_every_level_equals_monai(config, crop):
    images = torch.rand(1, 1, *crop, generator=torch.Generator().manual_seed(2))
    encoder = ours_with_their_weights(config)
    raw = [level.movedim(-1, 1) for level in encoder.trunk(images)[0]]
    assert largest_difference(raw, monai_swin(config)(images, normalize=False)) <= 1e-5
    if crop != (96, 96, 96):
        assert largest_difference(encoder(images).pyramid, monai_swin(config)(images, normalize=True)) <= 1e-5


@pytest.mark.parametrize(("config", "crop"), [(PAPER, (64, 64, 64)), (TINY, (32, 64, 96)), (THREE, (32, 32, 32))])
def test_outputs_and_gradients_equal_monai_in_double_precision(config, crop):
    images = torch.rand(1, 1, *crop, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    encoder, net = ours_with_their_weights(config).double(), copy.deepcopy(monai_swin(config)).double()
    ours, theirs = encoder(images).pyramid, net(images, normalize=True)
    assert largest_difference(ours, theirs) <= 1e-6
    for levels in (ours, theirs):
        sum(level.square().mean() for level in levels).backward()
    wanted = {renamed(name): parameter.grad for name, parameter in net.named_parameters()}
    for name, parameter in encoder.named_parameters():
        if name != "hidden_token":
            assert (parameter.grad - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name


@pytest.mark.parametrize(
    ("config", "crop"),
    [
        (PAPER, (32, 32, 32)),
        (TINY, (64, 64, 64)),
        (TINY, (32, 64, 96)),
        (THREE, (96, 96, 96)),
        (ODD, (32, 64, 96)),
    ],
)
def test_gradients_equal_monai(config, crop):
    torch.manual_seed(3)
    images = torch.rand(1, 1, *crop)
    encoder, net = ours_with_their_weights(config), monai_swin(config)
    theirs = net(images, normalize=True)
    probes = [torch.randn_like(level) for level in theirs]
    for levels in (encoder(images).pyramid, theirs):
        sum((level * probe).sum() for level, probe in zip(levels, probes, strict=True)).backward()
    ours = {name: parameter.grad for name, parameter in encoder.named_parameters() if name != "hidden_token"}
    wanted = {renamed(name): parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_levels_up_to_semantic_attention_equal_monai(stage):
    """In series the levels after it differ; beside the trunk none does."""
    images = torch.rand(2, 1, 64, 64, 64)
    theirs = monai_swin(THREE)(images, normalize=True)
    for placement in ("series", "branch"):
        attention = AttentionConfig(stage=stage, placement=placement, num_heads=2)
        encoder = SwinEncoder(replace(THREE, attention=attention))
        encoder.load_state_dict(ours_with_their_weights(THREE).state_dict(), strict=False)
        pyramid = encoder.eval()(images).pyramid
        same = [largest_difference([a], [b]) <= 1e-5 for a, b in zip(pyramid, theirs, strict=True)]
        equal = 5 if placement == "branch" else min(stage + 1, 4)
        assert same == [True] * equal + [False] * (5 - equal)
