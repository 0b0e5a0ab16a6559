"""Student or teacher of the pretext task: an encoder with its heads."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dagman.nets.encoder import EncoderConfig, build
from dagman.nets.heads import Head, LinearHead, NoHead, ProjectionHead, VoxelHead
from dagman.pretext import losses
from dagman.pretext.method import HeadConfig, MethodConfig

DISTILLED = ("aitd", "ampd", "gitd")
"""The distillation losses; each has a head of its name on student and teacher."""


class Network(nn.Module):
    """Student or teacher: an encoder and one projection head for each distillation loss that counts."""

    def __init__(self, encoder: EncoderConfig, method: MethodConfig) -> None:
        super().__init__()
        self.encoder = build(encoder)
        pooled = encoder.final_width if method.pooled_stage == 4 else encoder.final_width // 2
        widths = {"aitd": encoder.cell_width, "ampd": encoder.cell_width, "gitd": pooled}
        made = {name: _make_head(widths[name], method.heads) for name in DISTILLED if getattr(method.losses, name)}
        self.num_prototypes = {
            name: widths[name] if head.prototypes is None else len(head.prototypes) for name, head in made.items()
        }
        """K of each head."""
        if method.heads.shared:
            made["ampd"] = made["aitd"]
        self.heads = nn.ModuleDict(made)
        self.voxel_head: VoxelHead | None = None

    def head(self, name: str) -> Head:
        """The head of a distillation loss."""
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    def logits(self, name: str, bottleneck: Float[Tensor, "*rows bottleneck"]) -> Float[Tensor, "*rows prototypes"]:
        """Logits in float32, whatever the autocast: a temperature of 0.04 magnifies bfloat16's steps 25 times."""
        with torch.autocast(bottleneck.device.type, enabled=False):
            return self.head(name).logits(losses.at_least_single(bottleneck))


def _make_head(width: int, config: HeadConfig) -> Head:
    """An untrained head on features of that width."""
    if config.kind == "none":
        return NoHead()
    if config.kind == "linear":
        return LinearHead(width, num_prototypes=config.num_prototypes)
    return ProjectionHead(
        width,
        num_prototypes=config.num_prototypes,
        hidden_width=config.hidden_width,
        bottleneck_width=config.bottleneck_width,
    )
