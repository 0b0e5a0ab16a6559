"""The encoders there are, as one type each for their settings and for themselves."""

import functools

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dagman.nets.stage import WindowBlock
from dagman.nets.swin import SwinConfig, SwinEncoder
from dagman.nets.transformer import GlobalBlock
from dagman.nets.vit import ViTConfig, ViTEncoder
from dagman.randomness import torch_seed
from dagman.types import Preparation

EncoderConfig = SwinConfig | ViTConfig
"""Told apart by their field `kind`; what names none is a Swin.

All have `cell_side`, `cell_width`, `final_width`, `final_side`, `has_cls` and `grid(crop)`.
"""
Encoder = SwinEncoder | ViTEncoder
"""A module from a crop to `Features`, with its `config`, `preparation` and `report`."""


def build(config: EncoderConfig) -> Encoder:
    """An encoder of these sizes with new random weights."""
    return SwinEncoder(config) if isinstance(config, SwinConfig) else ViTEncoder(config)


def new(config: EncoderConfig, preparation: Preparation, seed: int = 0) -> Encoder:
    """An encoder with random weights that the seed decides, in eval mode.

    Args:
        config: Its sizes.
        preparation: What it is to be shown.
        seed: Of the weights; the global random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "untrained"))
        encoder = build(config)
    encoder.preparation = preparation
    return encoder.eval()


def checkpoint_blocks(encoder: Encoder) -> None:
    """From now on keep only what goes into each block, and compute the rest again for the gradient: it is the same."""
    for block in encoder.modules():
        if isinstance(block, WindowBlock | GlobalBlock):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def layers(encoder: Encoder) -> list[list[nn.Parameter]]:
    """Parameters of each layer in the order they compute: the embedding, then block after block.

    A Swin's merging belongs to the last block before it; what is left over (a last norm) to the last layer.
    """
    modules: list[list[nn.Module]] = []
    if isinstance(encoder, ViTEncoder):
        modules = [[block] for block in encoder.blocks]
    else:
        for number, stage in enumerate(encoder.stages, 1):
            modules += [[block] for block in stage.blocks]  # type: ignore[union-attr]
            modules[-1].append(stage.downsample)  # type: ignore[arg-type]
            if encoder.config.attention and encoder.config.attention.stage == number:
                modules += [[block] for block in encoder.semantic_attention.blocks]
    found = [[parameter for module in layer for parameter in module.parameters()] for layer in modules]
    inside = {id(parameter) for layer in found for parameter in layer}
    others = {name: each for name, each in encoder.named_parameters() if id(each) not in inside}
    last = [each for name, each in others.items() if "norm" in name and not name.startswith("patch_embed")]
    found[-1] += last
    taken = {id(parameter) for parameter in last}
    return [[each for each in others.values() if id(each) not in taken], *found]
