"""From a crop to classes: an encoder with a linear layer, or a 3D ResNet-50 to be compared with."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dagman.errors import DagmanError, ExitCode
from dagman.nets.encoder import Encoder, EncoderConfig
from dagman.nets.weights import read_tensors
from dagman.types import Features, LoadReport, Preparation

Which = Literal["pooled", "cells", "cls", "all"]
SMALLEST_SHARE = 0.95
"""Of a ResNet's parameters, without its last layer, that must be found in a file."""


def width_of(config: EncoderConfig, which: Which) -> int:
    """Features of a crop's vector.

    Raises:
        DagmanError: `E-NOCLS` for `cls` of an encoder without.
    """
    if which in ("cls", "all") and not config.has_cls:
        raise DagmanError("NOCLS", f"--which {which}", "this encoder has no [CLS] token", "use pooled or cells")
    widths = {"pooled": config.final_width, "cells": config.cell_width, "cls": config.cell_width}
    return sum(width for name, width in widths.items() if which in (name, "all"))


def vector(features: Features, which: Which) -> Float[Tensor, "batch width"]:
    """What a crop is told by: mean of the final tokens, mean of the cells, [CLS], or all side by side.

    Raises:
        DagmanError: `E-USAGE` for another word.
    """
    if which not in get_args(Which):
        raise DagmanError("USAGE", "which", f"cannot be {which}", f"give one of {', '.join(get_args(Which))}")
    parts = {"pooled": features.pooled, "cells": features.tokens.mean(dim=1), "cls": features.cls}
    chosen = [part for name, part in parts.items() if which in (name, "all") and part is not None]
    return torch.cat(chosen, dim=1) if len(chosen) > 1 else chosen[0]


class EncoderClassifier(nn.Module):
    """An encoder and a linear layer on one vector a crop.

    Args:
        encoder: Its `preparation` says what it must be shown.
        num_classes: Outputs.
        which: The vector.
    """

    def __init__(self, encoder: Encoder, num_classes: int, which: Which = "pooled") -> None:
        super().__init__()
        self.encoder = encoder
        self.which: Which = which
        self.head = nn.Linear(width_of(encoder.config, which), num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def preparation(self) -> Preparation:
        """What crops it must be shown."""
        return self.encoder.preparation

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the logits."""
        return self.head

    def forward(self, images: Float[Tensor, "batch 1 x y z"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        logits: Tensor = self.head(vector(self.encoder(images), self.which))
        return logits


class ResNet50(nn.Module):
    """MONAI's 3D ResNet-50 as MedicalNet has it: no bias in the shortcuts, a first convolution of stride 2.

    Args:
        num_classes: Outputs.
        preparation: What crops it is shown.
    """

    def __init__(self, num_classes: int, preparation: Preparation) -> None:
        super().__init__()
        from monai.networks.nets import resnet50

        self.preparation = preparation
        self.report: LoadReport | None = None
        self.resnet = resnet50(
            spatial_dims=3, n_input_channels=1, num_classes=num_classes, conv1_t_stride=2, bias_downsample=False
        )

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the logits."""
        layer: nn.Linear = self.resnet.fc
        return layer

    def forward(self, images: Float[Tensor, "batch 1 x y z"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        logits: Tensor = self.resnet(images)
        return logits

    def load(self, path: Path) -> LoadReport:
        """Take the weights of a safetensors file, but the last layer's.

        Raises:
            DagmanError: `E-WEIGHTS`, exit code 4, for a file that cannot be read or fills less than 95 % of it.
        """
        wanted = {name: tensor for name, tensor in self.resnet.state_dict().items() if not name.startswith("fc.")}
        found = {name.removeprefix("module."): tensor for name, tensor in read_tensors(path)[0].items()}
        fitting = {name: found[name] for name, tensor in wanted.items() if _fits(found.get(name), tensor)}
        sizes = {name: tensor.numel() for name, tensor in wanted.items()}
        share = sum(sizes[name] for name in fitting) / sum(sizes.values())
        report = LoadReport(
            source=path,
            kind="ResNet-50",
            loaded=tuple(fitting),
            missing=tuple(sorted(wanted.keys() - found.keys())),
            unexpected=tuple(sorted(name for name in found.keys() - wanted.keys() if not name.startswith("fc."))),
            mismatched=tuple(sorted(wanted.keys() & found.keys() - fitting.keys())),
            share=share,
            network="ResNet-50",
        )
        if share < SMALLEST_SHARE:
            raise DagmanError(
                "WEIGHTS", path, f"fills {share:.1%} of a 3D ResNet-50", str(report), exit_code=ExitCode.REFUSED
            )
        self.resnet.load_state_dict(fitting, strict=False)
        return report


def _fits(found: Any, wanted: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == wanted.shape


Network = EncoderClassifier | ResNet50
"""Anything with `preparation` that turns crops into logits."""
