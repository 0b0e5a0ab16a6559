"""Projection heads for distillation and the head that predicts voxels (paper, section 3.2)."""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dagman.errors import DagmanError

FEW_ROWS = 32
"""Where both types take as long on processors with matrix tiles; 76 rows take two thirds as long in bfloat16."""


def apply_to_rows(layers: nn.Module, features: Float[Tensor, "*rows width"]) -> Tensor:
    """Layers on features; a CPU computes few rows in float32: to cast large weights costs more than it saves."""
    if features.device.type != "cpu" or features.shape[:-1].numel() >= FEW_ROWS:
        return cast("Tensor", layers(features))
    with torch.autocast("cpu", enabled=False):
        return cast(Tensor, layers(features.to(torch.promote_types(features.dtype, torch.float32))))


def moved(indices: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Indices counted on the host, for a device that does not wait for them."""
    return tuple(each.to(device, non_blocking=True) for each in indices)


class ProjectionHead(nn.Module):
    """Three linear layers to a unit vector (the bottleneck), then similarities to `num_prototypes` unit vectors.

    Args:
        in_width: Width of the features.
        num_prototypes: K, the number of outputs (the SMIT authors' code: 8192).
        hidden_width: Width between the layers (iBOT's).
        bottleneck_width: Width of the unit vector (iBOT's).

    Reference: section 3.2; the last layer is weight-normalised with its gain fixed at 1.
    """

    def __init__(
        self, in_width: int, *, num_prototypes: int, hidden_width: int = 2048, bottleneck_width: int = 256
    ) -> None:
        super().__init__()
        if num_prototypes < 2:
            raise DagmanError("CONFIG", "num_prototypes", f"cannot be {num_prototypes}", "give at least 2")
        self.layers = nn.Sequential(
            nn.Linear(in_width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, hidden_width),
            nn.GELU(),
            nn.Linear(hidden_width, bottleneck_width),
        )
        self.prototypes = nn.Parameter(torch.zeros(num_prototypes, bottleneck_width))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def project(self, features: Float[Tensor, "*shape in_width"]) -> Float[Tensor, "*shape bottleneck"]:
        """The bottleneck: vectors of length 1, in at least float32."""
        bottleneck: Tensor = apply_to_rows(self.layers, features)
        unit: Tensor = functional.normalize(bottleneck.to(torch.promote_types(bottleneck.dtype, torch.float32)), dim=-1)
        return unit

    def logits(self, bottleneck: Float[Tensor, "*shape bottleneck"]) -> Float[Tensor, "*shape prototypes"]:
        """Cosines with the prototypes: linear in the bottleneck, so the mean's logits are the mean logits."""
        logits: Tensor = WeightNorm.apply(bottleneck, self.prototypes)  # type: ignore[no-untyped-call]
        return logits

    def forward(self, features: Float[Tensor, "*shape in_width"]) -> Float[Tensor, "*shape prototypes"]:
        """Features to logits."""
        return self.logits(self.project(features))


class WeightNorm(torch.autograd.Function):
    """A linear layer over the lengths of its weights; its gradient passes over these once, where autograd would thrice.

    Reference: Salimans and Kingma 2016, equation 3, with the gain fixed at 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Products with the weights as unit vectors."""
        length = torch.linalg.vector_norm(weight, dim=-1).clamp_min(1e-12)
        out: Tensor = functional.linear(x, weight) / length
        ctx.save_for_backward(x, weight, length, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Of features and weights; what would only lengthen a weight is taken away."""
        x, weight, length, out = ctx.saved_tensors
        along = (gradients[0] * out).reshape(-1, len(length)).sum(dim=0) / length.square()
        shorter = gradients[0].reshape(-1, len(length)) / length
        to_weight = (shorter.t() @ x.reshape(-1, weight.shape[1])).addcmul_(weight, along[:, None], value=-1)
        return (shorter @ weight).view(x.shape), to_weight


class LinearHead(nn.Module):
    """One linear layer from the features to K logits.

    Args:
        in_width: Width of the features.
        num_prototypes: K.

    Reference: section 3.2, the wording "a linear projection layer".
    """

    def __init__(self, in_width: int, *, num_prototypes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.zeros(num_prototypes, in_width))
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def project(self, features: Float[Tensor, "*shape in_width"]) -> Float[Tensor, "*shape in_width"]:
        """The features in float32 at least: what the logits are linear in."""
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def logits(self, bottleneck: Float[Tensor, "*shape in_width"]) -> Float[Tensor, "*shape prototypes"]:
        """Products with the prototypes."""
        return functional.linear(bottleneck, self.prototypes)


class NoHead(nn.Module):
    """The features are the logits; K is their width."""

    prototypes: None = None

    def project(self, features: Float[Tensor, "*shape in_width"]) -> Float[Tensor, "*shape in_width"]:
        """The features in float32 at least."""
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def logits(self, bottleneck: Float[Tensor, "*shape in_width"]) -> Float[Tensor, "*shape in_width"]:
        """The features."""
        return bottleneck


Head = ProjectionHead | LinearHead | NoHead


class VoxelHead(nn.Module):
    """One linear layer from a final token to the voxels it stands for.

    Args:
        in_width: Width of the final tokens.
        cell_side: Voxels a side of a final token.
        mean_intensity: Of the training data; the prediction before training.

    Reference: section 3.2, AMIP.
    """

    def __init__(self, in_width: int, *, cell_side: int = 32, mean_intensity: float) -> None:
        super().__init__()
        self.cell_side = cell_side
        self.linear = nn.Linear(in_width, cell_side**3)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.constant_(self.linear.bias, mean_intensity)

    def forward(self, final: Float[Tensor, "batch in_width gx gy gz"]) -> Float[Tensor, "batch 1 x y z"]:
        """Predict a crop from the final map, `Features.pyramid[-1]`."""
        batch, _, gx, gy, gz = final.shape
        side = self.cell_side
        voxels: Tensor = apply_to_rows(self.linear, final.movedim(1, -1)).view(batch, gx, gy, gz, side, side, side)
        return voxels.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, 1, gx * side, gy * side, gz * side)

    def predict_cells(
        self, final: Float[Tensor, "batch in_width gx gy gz"], wanted: Bool[Tensor, "batch x y z"]
    ) -> Float[Tensor, "num side side side"]:
        """Predict some cells alone, in C order of `wanted`; tokens without one are left out of the layer.

        Args:
            final: As for `forward`.
            wanted: On cells, as many in a final token along each axis as the grid is finer than the final map; on the
                CPU, where a GPU is not to wait for counts.
        """
        batch, _, gx, gy, gz = final.shape
        times = wanted.shape[1] // gx
        of_token = wanted.view(batch, gx, times, gy, times, gz, times).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
        asked = of_token.any(dim=-1)
        row = (asked.flatten().cumsum(dim=0) - 1).view(batch, gx, 1, gy, 1, gz, 1)
        place = torch.arange(times**3, device=wanted.device).view(1, 1, times, 1, times, 1, times)
        rows, places = (
            each.expand(batch, gx, times, gy, times, gz, times).reshape(wanted.shape)[wanted] for each in (row, place)
        )
        side = self.cell_side // times
        voxels: Tensor = apply_to_rows(
            self.linear, final.movedim(1, -1)[moved(asked.nonzero(as_tuple=True), final.device)]
        )
        cells = voxels.view(-1, times, side, times, side, times, side)
        inside = places // times**2, places // times % times, places % times
        return cells.permute(0, 1, 3, 5, 2, 4, 6)[moved((rows, *inside), final.device)]
