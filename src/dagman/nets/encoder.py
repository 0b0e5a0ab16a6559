"""The encoders there are, as one type each for their settings and for themselves."""

from dagman.nets.swin import SwinConfig, SwinEncoder
from dagman.nets.vit import ViTConfig, ViTEncoder

EncoderConfig = SwinConfig | ViTConfig
"""Told apart by their field `kind`; what names none is a Swin.

All have `cell_side`, `cell_width`, `final_width`, `final_side`, `has_cls` and `grid(crop)`.
"""
Encoder = SwinEncoder | ViTEncoder
"""A module from a crop to `Features`, with its `config`, `preparation` and `report`."""


def build(config: EncoderConfig) -> Encoder:
    """An encoder of these sizes with new random weights."""
    return SwinEncoder(config) if isinstance(config, SwinConfig) else ViTEncoder(config)
