"""Bright balls in small bodies: a study that a minute network learns in a dozen steps."""

import csv

import nibabel
import numpy as np
import torch

from dagman.ct.prepare import PrepareConfig, prepare
from dagman.ct.store import PreparedStore
from dagman.nets.encoder import build
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.types import Preparation

SMALL = SwinConfig(
    embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), drop_path=0.0, attention=AttentionConfig(stage=2)
)
PREPARATION = Preparation(crop=(32, 32, 64))


def encoder(attention=True, preparation=PREPARATION):
    torch.manual_seed(3)
    made = build(SMALL if attention else SwinConfig(**{**vars(SMALL), "attention": None}))
    made.preparation = preparation
    return made.eval()


def ball(shape, centre, radius):
    grids = np.meshgrid(*map(np.arange, shape), indexing="ij")
    return sum((grid - place) ** 2 for grid, place in zip(grids, centre, strict=True)) <= radius**2


def case(number, *, radius=7, labels=1):
    """HU and labels, 36 voxels a side: a body in air, one bright ball for each label."""
    draw = np.random.default_rng(number)
    hu = np.full((36, 36, 36), -1000, np.int16)
    hu[2:34, 2:34, 2:34] = draw.normal(0, 15, (32, 32, 32))
    mask = np.zeros(hu.shape, np.uint8)
    for label in range(1, labels + 1):
        where = ball(hu.shape, draw.uniform(11, 25, 3), radius) & (mask == 0)
        mask[where] = label
        hu[where] += np.int16(220 if label == 1 else -140)
    return hu, mask


def write_cases(folder, cases, *, split=None, patients=None, affine=None):
    """NIfTI files and a table of `{name: (hu, mask or None)}`; the table."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
    header = ["case_id", "image", "mask", "patient"] + (["split"] if split else [])
    rows = []
    for name, (hu, mask) in cases.items():
        nibabel.save(nibabel.Nifti1Image(hu, affine), folder / f"{name}.nii.gz")
        if mask is not None:
            (folder / "masks").mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(mask, affine), folder / "masks" / f"{name}.nii.gz")
        row = [name, f"{name}.nii.gz", f"masks/{name}.nii.gz" if mask is not None else ""]
        rows.append([*row, (patients or {}).get(name, f"p-{name}"), *([split[name]] if split else [])])
    with (folder / "cases.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return folder / "cases.csv"


def store(folder, cases, **given):
    prepare([write_cases(folder / "raw", cases, **given)], folder / "store", PrepareConfig(storage="npy"))
    return PreparedStore(folder / "store")
