"""A CT to a label map that lies where the CT lies: overlapping crops, blended, on the scan's own grid."""

import functools
import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, Integer, UInt8
from torch import Tensor

from dagman import files
from dagman.ct import crops
from dagman.ct.prepare import PrepareConfig, prepare_volume
from dagman.ct.read import read
from dagman.ct.store import AIR_HU
from dagman.errors import DagmanError, ExitCode
from dagman.nets.unetr import SegmentationNetwork
from dagman.tasks import dicom_seg, provenance
from dagman.tasks.attention import onto
from dagman.tasks.embed import MOST_CROPS, Progress, in_turn
from dagman.tasks.segmenter import Segmenter
from dagman.types import Grid, Precision, Preparation, Scan

OVERLAP_RATIO = 0.5
VOXELS_AT_ONCE = 4 * 64**3
"""Of the crops that are segmented together: a decoder's maps are as fine as the crop, unlike an encoder's."""
To = Literal["nifti", "dicom-seg"]
_SLAB_VOXELS = 2**24
"""Of another grid, at once: a handful of float32 values each."""
DONE = "predictions.jsonl"
"""What was predicted from what, a line for each scan."""


class Outputs(NamedTuple):
    """What `predict` wrote and found."""

    path: Path
    volumes_cc: dict[str, float]
    """By class."""


def predict(
    segmenters: Sequence[Segmenter],
    scan: Scan,
    folder: Path,
    *,
    to: To = "nifti",
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Outputs:
    """Write `CASE.nii.gz`, or `CASE.dcm`, with the labels on the scan's own voxels, and note it in `predictions.jsonl`.

    Args:
        segmenters: From `tasks.segmenter.load`; of several the mean of their probabilities counts.
        scan: Any CT that `ct.index` lists.
        folder: Where the file goes.
        to: `dicom-seg` needs a DICOM series, whose patient and slices the file refers to.
        device: Where to compute.
        precision: `bf16` computes under autocast.
        progress: Hears of each finished batch of crops.

    Raises:
        DagmanError: As `ct.read.read` and `refuse_inputs`; `E-FORMAT` for `dicom-seg` of what is no DICOM series;
            `E-DUPCASE`, exit code 4, where another scan's prediction lies.
    """
    refuse_inputs([scan], folder, to=to)
    if to == "dicom-seg" and scan.kind != "dicom":
        raise DagmanError("FORMAT", scan.source, "is no DICOM, so there is nothing to refer to", "leave out --to")
    if to == "dicom-seg":
        dicom_seg.refuse_bare(scan.files[0])
    path, identity = _place(folder, scan, to), _identity(segmenters, scan)
    provenance.refuse_other(folder / DONE, path, identity)
    volume = read(scan)
    classes, preparation = segmenters[0].classes, segmenters[0].preparation
    prepared = prepare_volume(
        volume, PrepareConfig(spacing_mm=preparation.spacing_mm, resampling=preparation.resampling)
    )
    found = np.zeros((len(classes) + 1, *prepared.hu.shape), np.float32)
    for number, each in enumerate(segmenters):
        tell = progress and functools.partial(in_turn, progress, number, len(segmenters))
        likely = probabilities(each.network, prepared.hu, device=device, precision=precision, progress=tell)
        found += likely / len(segmenters)
    x, y, z = volume.hu.shape
    own = volume.own_grid or Grid((x, y, z), volume.affine)
    numbers = most_likely(found, prepared.affine, own)
    if to == "nifti":
        write_nifti(classes.label_map(numbers), own.affine, path)
    else:
        dicom_seg.write(numbers, own, scan.files, classes.names, path)
    voxel_cc = abs(float(np.linalg.det(own.affine[:3, :3]))) / 1000
    counts = np.bincount(numbers.ravel(), minlength=len(classes) + 1)[1:]
    volumes = dict(zip(classes.names, (counts * voxel_cc).tolist(), strict=True))
    made = {"file": path.name, "sha256": files.sha256_file(path), "volumes_cc": volumes}
    files.repair_log(folder / DONE)
    files.append_line(folder / DONE, identity | made)
    return Outputs(path, volumes)


def before(segmenters: Sequence[Segmenter], scan: Scan, folder: Path, *, to: To = "nifti") -> Outputs | None:
    """What `predict` wrote earlier with the same weights of the same files, if it still lies there unchanged."""
    path = _place(folder, scan, to)
    found = provenance.noted(folder / DONE, path, required=("case_id", "sha256", "volumes_cc"))
    if not (found and all(each.digest for each in segmenters) and found["sha256"] == files.sha256_file(path)):
        return None
    same = all(found.get(name) == value for name, value in _identity(segmenters, scan).items() if name != "source")
    return Outputs(path, found["volumes_cc"]) if same else None


def refuse_inputs(scans: Sequence[Scan], folder: Path, *, to: To = "nifti") -> None:
    """Predictions are never written over what is read.

    Raises:
        DagmanError: `E-OUTPUT`, exit code 4, naming a scan or mask that a prediction would replace.
    """
    read_from = {path.resolve() for scan in scans for path in (*scan.files, *([scan.mask] if scan.mask else []))}
    for scan in scans:
        if (path := _place(folder, scan, to)).resolve() in read_from:
            raise DagmanError(
                "OUTPUT",
                path,
                "is one of the inputs, which a prediction would replace",
                "choose another output folder",
                exit_code=ExitCode.REFUSED,
            )


def _place(folder: Path, scan: Scan, to: To) -> Path:
    return folder / f"{scan.case_id}{'.nii.gz' if to == 'nifti' else '.dcm'}"


def _identity(segmenters: Sequence[Segmenter], scan: Scan) -> dict[str, Any]:
    """What decides a prediction; and where the scan lies, which does not."""
    return provenance.of(scan) | {"weights": [each.digest for each in segmenters]}


def probabilities(
    network: SegmentationNetwork,
    hu: Int16[np.ndarray, "x y z"],
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Float32[np.ndarray, "classes x y z"]:
    """Probability of each class, background first, for a whole prepared volume.

    Crops overlap by half; their scores are blended with Gaussian weights before the softmax.

    Args:
        network: In eval mode.
        hu: Voxels of the size that the encoder's `preparation` says.
        device: Where to compute.
        precision: `bf16` computes under autocast.
        progress: Hears of each finished batch of crops.

    Reference:
        MONAI's `sliding_window_inference`; overlap as in the paper.
    """
    from monai.inferers import sliding_window_inference

    if network.training:
        raise ValueError("a segmentation is taken in eval mode: call network.eval()")
    preparation = network.encoder.preparation
    network.to(device)
    total, done = num_crops(hu.shape, preparation), 0

    def scores(images: Float[Tensor, "batch 1 x y z"]) -> Tensor:
        nonlocal done
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            found: Tensor = network(images.to(device))
        done += len(images)
        if progress:
            progress(min(done, total), total)
        return found.float().cpu()

    images = torch.from_numpy(crops.window(hu, preparation.window_hu))[None, None]
    air = crops.window(np.array([AIR_HU], np.int16), preparation.window_hu).item()
    with torch.inference_mode():
        blended = sliding_window_inference(
            images,
            preparation.crop,
            crops_at_once(preparation.crop),
            scores,
            overlap=OVERLAP_RATIO,
            mode="gaussian",
            cval=air,
        )
        likely: np.ndarray = torch.softmax(blended[0], dim=0).numpy()
    return likely


def crops_at_once(crop: tuple[int, int, int]) -> int:
    """How many crops of these sides are segmented together; no influence on the result beyond rounding."""
    return max(1, min(MOST_CROPS, VOXELS_AT_ONCE // math.prod(crop)))


def num_crops(shape: tuple[int, ...], preparation: Preparation) -> int:
    """Crops that MONAI's sliding window cuts from a volume."""
    strides = [int(side * (1 - OVERLAP_RATIO)) for side in preparation.crop]
    return math.prod(
        math.ceil(max(0, num - side) / stride) + 1
        for num, side, stride in zip(shape, preparation.crop, strides, strict=True)
    )


def most_likely(
    found: Float32[np.ndarray, "classes x y z"], affine: Float[np.ndarray, "4 4"], target: Grid
) -> UInt8[np.ndarray, "other_x other_y other_z"]:
    """The most likely class of each voxel of another grid; background where nothing was looked at.

    Probabilities are interpolated, not labels: a border keeps its place between voxels. Slab by slab, as a scan's own
    voxels may be many more than the prepared ones.
    """
    numbers = np.zeros(target.shape, np.uint8)
    num, width, depth = target.shape
    step = max(1, _SLAB_VOXELS // (width * depth))
    for first in range(0, num, step):
        moved = np.eye(4)
        moved[0, 3] = first
        slab = Grid((min(step, num - first), width, depth), target.affine @ moved)
        numbers[first : first + step] = _most_likely(found, affine, slab)
    return numbers


def _most_likely(found: np.ndarray, affine: np.ndarray, target: Grid) -> np.ndarray:
    best = onto(found[0], affine, target)
    numbers = np.zeros(best.shape, np.uint8)
    for number, likely in enumerate(found[1:], 1):
        other = onto(likely, affine, target)
        above = other > best
        numbers[above] = number
        np.copyto(best, other, where=above)
    return numbers


def write_nifti(label_map: Integer[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"], path: Path) -> None:
    """Write labels as NIfTI with both of its coordinate forms set."""
    import nibabel

    image: Any = nibabel.Nifti1Image(label_map, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"DAGMaN segmentation"
    files.write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))
