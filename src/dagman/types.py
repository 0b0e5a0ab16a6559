"""The nouns that travel between parts.

Conventions: arrays are x, y, z in RAS+ (indices grow towards the patient's right, front and head, as in nibabel);
spacing is (x, y, z) in mm; `hidden` is boolean, True where a network cannot see a patch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

if TYPE_CHECKING:  # scans are read, and features judged, without it
    from torch import Tensor

Precision = Literal["bf16", "float32"]
"""Of products; `bf16` is mixed: weights, losses and centers stay float32."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One row of the scan table: where a CT lies and whose it is. Nothing is read yet."""

    case_id: str
    """Name of the case in every output: letters, digits, `-`, `_`, `.` only."""
    files: tuple[Path, ...]
    """One file (NIfTI, NRRD, MHA, multi-frame DICOM) or the slices of one DICOM series."""
    kind: str
    """`nifti`, `nrrd`, `mha`, `dicom` or `medmnist`."""
    index: int | None = None
    """Which item of a file that holds many; None for a file of one scan."""
    patient: str | None = None
    """Whose scan: the CSV's value, or a keyed hash of the DICOM PatientID."""
    label: str | None = None
    mask: Path | None = None
    rois: tuple[str, ...] = ()
    """Names or numbers of the structures of a DICOM mask, which become labels 1, 2, ...; none: all of them."""
    label_names: tuple[tuple[int, str], ...] = ()
    """What the mask's labels are called, where that is known."""
    split: str | None = None

    @property
    def called(self) -> dict[int, str]:
        """What the labels of its mask are called: structures as they were chosen, else as the data set says."""
        chosen = {number: roi for number, roi in enumerate(self.rois, 1) if not roi.isdecimal()}
        return chosen or dict(self.label_names)

    @property
    def source(self) -> Path:
        """The file, or the folder that holds the series."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent


class Grid(NamedTuple):
    """A voxel grid in the world."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    """(4, 4), voxel index to RAS+ world in mm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """One CT in memory, oriented to RAS+."""

    hu: np.ndarray
    """Hounsfield units, (x, y, z); int16 or float32."""
    affine: np.ndarray
    """(4, 4), voxel index to RAS+ world in mm."""
    own_grid: Grid | None = None
    """The same voxels in the order and direction that the file has them; None for a volume made in memory."""

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size (x, y, z) in mm."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What an encoder saw in pretraining, and so what it must be shown: travels with its weights."""

    spacing_mm: float = 2.0
    orientation: str = "RAS"
    resampling: Literal["antialiased", "linear"] = "antialiased"
    window_hu: tuple[float, float] = (-175.0, 250.0)
    """Mapped to [0, 1] and clipped."""
    crop: tuple[int, int, int] = (128, 128, 128)
    """Voxels (x, y, z)."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """What became of the tensors of a file; printed as one line."""

    source: Path
    kind: str
    """`DAGMaN`, `MONAI` or `SMIT`."""
    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    """Wanted by the encoder, not in the file."""
    unexpected: tuple[str, ...] = ()
    """In the file, without a place in the encoder."""
    mismatched: tuple[str, ...] = ()
    """In both, of different shapes."""
    share: float = 1.0
    """Of the parameters that were loaded, 0 to 1; a Swin's without semantic attention and the hidden token."""
    network: str = "Swin"
    """Or `ViT`."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, word))} {word}" for word in ("missing", "unexpected", "mismatched"))
        loaded = f"{len(self.loaded)} tensors loaded ({self.share:.1%} of the {self.network})"
        return "; ".join([f"{self.source}: {self.kind} weights, {loaded}, {counts}", *self.notes])


class Views(NamedTuple):
    """Two overlapping crops of each volume of a batch, intensities in [0, 1]."""

    u: 'Float[Tensor, "batch 1 x y z"]'
    v: 'Float[Tensor, "batch 1 x y z"]'
    rows: 'Int[Tensor, " batch"]'
    """Row of the prepared store each pair was cut from."""
    padding: 'Float[Tensor, " batch"]'
    """Share of the pair's voxels that lie outside the stored volume."""


class Features(NamedTuple):
    """What every encoder returns. Cells are in C order of their (x, y, z) grid."""

    tokens: 'Float[Tensor, "batch cells width"]'
    """Normalised cell tokens: semantic attention's, the grid of stage 3 without it, or a ViT's."""
    cls: 'Float[Tensor, "batch width"] | None'
    """Normalised [CLS] token; None for an encoder without one."""
    attention: 'Float[Tensor, "batch cells"] | None'
    """Equation 1: mean over heads of the [CLS] row over the cells, summing to 1."""
    pooled: 'Float[Tensor, "batch final_width"]'
    """Mean over the normalised final tokens."""
    pyramid: 'tuple[Float[Tensor, "batch level_width level_x level_y level_z"], ...]'
    """Normalised feature maps in the order they are computed, so a Swin's finest first; the last is the final map."""


class Losses(NamedTuple):
    """The four losses of section 3.2 under the paper's names, and their weighted sum (equations 2-5)."""

    total: 'Float[Tensor, ""]'
    amip: 'Float[Tensor, ""]'
    ampd: 'Float[Tensor, ""]'
    aitd: 'Float[Tensor, ""]'
    gitd: 'Float[Tensor, ""]'
