"""Decoders that turn an encoder's feature maps into one score for each class and voxel, of MONAI's blocks.

Around a Swin: SwinUNETR's, whose fifth level has seen semantic attention where the encoder has it. Around a ViT:
UNETR's. Names of the parts are MONAI's, so that weights can be carried over.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from dagman.errors import DagmanError
from dagman.nets.encoder import Encoder
from dagman.nets.swin import SwinEncoder
from dagman.nets.vit import ViTConfig

VIT_WIDTH = 16
"""Channels of UNETR's finest level (MONAI's default)."""


class SwinDecoder(nn.Module):
    """SwinUNETR's decoder.

    Args:
        width: Channels of the finest level, the Swin's `embed_dim`.
        num_classes: Output channels, background included.

    Reference:
        Hatamizadeh et al., Swin UNETR, 2022; `monai.networks.nets.SwinUNETR`.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        basic, up, _, last = _blocks()
        self.encoder1 = basic(1, width)
        self.encoder2 = basic(width, width)
        self.encoder3 = basic(2 * width, 2 * width)
        self.encoder4 = basic(4 * width, 4 * width)
        self.encoder10 = basic(16 * width, 16 * width)
        self.decoder5 = up(16 * width, 8 * width)
        self.decoder4 = up(8 * width, 4 * width)
        self.decoder3 = up(4 * width, 2 * width)
        self.decoder2 = up(2 * width, width)
        self.decoder1 = up(width, width)
        self.out = last(width, num_classes)

    def forward(
        self, images: Float[Tensor, "batch 1 x y z"], pyramid: tuple[Tensor, ...]
    ) -> Float[Tensor, "batch classes x y z"]:
        """Class scores before the softmax.

        Args:
            images: What the encoder saw.
            pyramid: The five levels of `Features`, finest first.
        """
        x = self.decoder5(self.encoder10(pyramid[4]), pyramid[3])
        x = self.decoder4(x, self.encoder4(pyramid[2]))
        x = self.decoder3(x, self.encoder3(pyramid[1]))
        x = self.decoder2(x, self.encoder2(pyramid[0]))
        scores: Tensor = self.out(self.decoder1(x, self.encoder1(images)))
        return scores


class ViTDecoder(nn.Module):
    """UNETR's decoder, with as many doublings as the ViT's patch is wide.

    Args:
        config: The ViT's.
        num_classes: Output channels, background included.

    Raises:
        DagmanError: `E-CONFIG` for patches that are no power of two, or wider than the ViT has levels.

    Reference:
        Hatamizadeh et al., UNETR, 2022; `monai.networks.nets.UNETR` for patches of 16.
    """

    def __init__(self, config: ViTConfig, num_classes: int) -> None:
        super().__init__()
        doublings = config.patch_side.bit_length() - 1
        if config.patch_side != 2**doublings or not 1 <= doublings <= len(config.levels):
            raise DagmanError(
                "CONFIG",
                "encoder.patch_side",
                f"patches of {config.patch_side} voxels and {len(config.levels)} levels make no UNETR",
                "segment with a Swin, or a ViT with patches of 8 or 16 voxels",
            )
        basic, up, rise, last = _blocks()
        widths = [VIT_WIDTH << level for level in range(doublings)]
        self.encoder1 = basic(1, widths[0])
        self.skips = nn.ModuleList(
            rise(config.width, width, doublings - 2 - level) for level, width in enumerate(widths[1:])
        )
        self.ups = nn.ModuleList(up(*pair) for pair in zip(widths[1:], widths[:-1], strict=True))
        self.ups.append(up(config.width, widths[-1]))
        self.out = last(widths[0], num_classes)

    def forward(
        self, images: Float[Tensor, "batch 1 x y z"], pyramid: tuple[Tensor, ...]
    ) -> Float[Tensor, "batch classes x y z"]:
        """Class scores before the softmax.

        Args:
            images: What the encoder saw.
            pyramid: The levels of `Features`, in the order the ViT computes them.
        """
        skips = [self.encoder1(images), *(skip(level) for skip, level in zip(self.skips, pyramid, strict=False))]
        x = pyramid[-1]
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            x = up(x, skip)
        scores: Tensor = self.out(x)
        return scores


def _blocks() -> tuple[Callable[..., nn.Module], ...]:
    """MONAI's blocks with the settings of SwinUNETR and UNETR: basic, up, rise (several ups), out."""
    from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock

    settings: dict[str, Any] = {"kernel_size": 3, "norm_name": "instance", "res_block": True}

    def basic(into: int, out: int) -> nn.Module:
        block: nn.Module = UnetrBasicBlock(3, into, out, stride=1, **settings)
        return block

    def up(into: int, out: int) -> nn.Module:
        block: nn.Module = UnetrUpBlock(3, into, out, upsample_kernel_size=2, **settings)
        return block

    def rise(into: int, out: int, more: int) -> nn.Module:
        block: nn.Module = UnetrPrUpBlock(
            3, into, out, num_layer=more, stride=1, upsample_kernel_size=2, conv_block=True, **settings
        )
        return block

    def last(into: int, out: int) -> nn.Module:
        block: nn.Module = UnetOutBlock(3, into, out)
        return block

    return basic, up, rise, last


class SegmentationNetwork(nn.Module):
    """An encoder and a new decoder.

    Args:
        encoder: Its weights are shared, not copied.
        num_classes: Output channels, background included.
    """

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder: nn.Module = (
            SwinDecoder(encoder.config.embed_dim, num_classes)
            if isinstance(encoder, SwinEncoder)
            else ViTDecoder(encoder.config, num_classes)
        )

    def forward(self, images: Float[Tensor, "batch 1 x y z"]) -> Float[Tensor, "batch classes x y z"]:
        """Class scores before the softmax, background first.

        Args:
            images: Intensities in [0, 1], as the encoder's `preparation` says.
        """
        scores: Tensor = self.decoder(images, self.encoder(images).pyramid)
        return scores
