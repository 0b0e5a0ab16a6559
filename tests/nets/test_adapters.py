"""Layers that somebody waits for, or that were replaced, are called: hooks, adapters, quantisation."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dagman.nets import gpu, kernel
from dagman.nets.encoder import Encoder, build
from dagman.nets.rows import LayerNorm
from dagman.nets.stage import WindowBlock
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.vit import ViTConfig

SWIN = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 4), attention=AttentionConfig(num_heads=4))
PLACED = replace(SWIN, attention=AttentionConfig(num_heads=4, position="attention"), patch_norm=True)
VIT = ViTConfig(width=48, depth=2, num_heads=4)
LAYERS = (nn.Linear, nn.Conv3d, LayerNorm)


class Adapted(nn.Module):
    """A layer, and what an adapter of rank 2 adds to it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))

    def merged(self) -> nn.Linear:
        """The same as one layer."""
        layer = copy.deepcopy(self.layer)
        layer.weight.data += self.up.weight.data @ self.down.weight.data
        return layer


@pytest.fixture(params=["kernels", "plain"], autouse=True)
def _path(request, monkeypatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(kernel, "library", lambda: None)


def layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every layer with its owner and the name it has there."""
    for owner in list(module.modules()):
        for name, child in owner.named_children():
            if isinstance(child, LAYERS):
                yield owner, name, child


def made(config: SwinConfig | ViTConfig) -> Encoder:
    torch.manual_seed(0)
    return build(config).eval()


def unseen(encoder: Encoder, images: Tensor) -> Tensor:
    """Half of the cells, which lie together."""
    cells = torch.zeros(len(images), *encoder.config.grid(tuple(images.shape[2:])), dtype=torch.bool)
    cells[:, 0] = True
    return cells.flatten(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("config", [SWIN, PLACED, VIT])
def test_hooks_of_every_layer_are_called_and_change_nothing(config, hidden, training):
    encoder, images, called = made(config), torch.rand(2, 1, 32, 32, 32), set()
    given = unseen(encoder, images) if hidden else None
    with torch.set_grad_enabled(training):
        expected = encoder(images, given)
        for _, _, layer in layers(encoder):
            layer.register_forward_hook(lambda layer, *_: called.add(layer))
        found = encoder(images, given)
    assert called == {layer for _, _, layer in layers(encoder)}
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [True, False])
@pytest.mark.parametrize("config", [SWIN, PLACED, VIT])
def test_adapters_of_every_layer_compute_and_learn(config, hidden):
    encoder, images = made(config), torch.rand(2, 1, 32, 32, 32)
    given = unseen(encoder, images) if hidden else None
    merged = copy.deepcopy(encoder)
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    for (owner, name, layer), (twin, _, _) in zip(layers(encoder), list(layers(merged)), strict=True):
        if isinstance(layer, nn.Linear):
            setattr(owner, name, adapted := Adapted(layer))
            setattr(twin, name, adapted.merged())
    expected, found = merged(images, given), encoder(images, given)
    torch.testing.assert_close(found.pooled, expected.pooled, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.tokens, expected.tokens, rtol=1e-4, atol=1e-4)
    (found.pooled.square().sum() + found.tokens.square().sum()).backward()
    adapters = [module for module in encoder.modules() if isinstance(module, Adapted)]
    assert all(each.up.weight.grad.abs().sum() > 0 for each in adapters)


def test_gradients_that_somebody_waits_for_come():
    encoder, waited = made(SWIN), []
    qkv = encoder.stages[0].blocks[1].attn.qkv
    for layer in (qkv, encoder.patch_embed.proj):
        layer.register_full_backward_hook(lambda layer, *_: waited.append(layer))
    encoder(torch.rand(1, 1, 32, 32, 64).requires_grad_()).pooled.square().sum().backward()
    assert waited == [qkv, encoder.patch_embed.proj]


def test_layers_of_other_kinds_do_what_they_do():
    encoder, images = made(SWIN), torch.rand(1, 1, 32, 32, 64)
    with warnings.catch_warnings(action="ignore"):  # it moves to another package
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(encoder), {nn.Linear}, dtype=torch.qint8)
    block = encoder.stages[0].blocks[0]
    with torch.no_grad():
        expected = encoder(images)
        assert (quantised(images).pooled - expected.pooled).abs().mean() < 0.1
        bias, block.attn.qkv.bias.data = block.attn.qkv.bias, torch.zeros(36)
        without = encoder(images)
        block.attn.qkv.bias = None
        torch.testing.assert_close(encoder(images).pooled, without.pooled, rtol=1e-4, atol=1e-5)
        block.attn.qkv.bias = bias
        block.norm1, block.mlp.linear2 = nn.Identity(), nn.Sequential(block.mlp.linear2)
        assert isinstance(encoder, SwinEncoder)
        assert encoder(images).pooled.isfinite().all()


@pytest.mark.parametrize("waiting", ["attn", "attn.qkv", "attn.proj", "norm1", "norm2", "mlp", "mlp.linear1"])
def test_half_blocks_on_a_gpu_ask_for_all_their_layers(waiting, monkeypatch):
    block, called = WindowBlock(12, num_heads=1, window=2, shift=1, mlp_ratio=2.0, drop_path=0.0), []
    monkeypatch.setattr(WindowBlock, "_forward_on_chip", lambda *_: pytest.fail("nothing is called there"))
    monkeypatch.setattr(gpu, "window_attention", lambda qkv, *_, **__: qkv[..., :12])
    block.get_submodule(waiting).register_forward_hook(lambda *_: called.append(waiting))
    with gpu.forced("triton"):
        block(torch.rand(1, 4, 4, 3, 12))
    assert called == [waiting]
