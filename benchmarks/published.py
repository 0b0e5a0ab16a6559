"""The published SMIT's pretraining step, from a checkout of its repository, as `train_self_supervised.py` takes it.

Two modules that it imports for little (timm, ml_collections) are replaced by what it takes from them; data and CUDA
calls of its script are left out.
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dagman.types import Views

CELL = 16
"""Voxels a side of what its mask hides."""


class _Settings(argparse.Namespace):
    """Stands for `ml_collections.ConfigDict`."""


def _imported(folder: Path) -> Any:
    """Its module of networks."""
    from monai.networks import blocks
    from monai.networks.layers import DropPath, trunc_normal_

    layers = types.ModuleType("timm.models.layers")
    layers.__dict__.update(DropPath=DropPath, trunc_normal_=trunc_normal_, to_3tuple=lambda x: (x, x, x))
    collections = types.ModuleType("ml_collections")
    collections.__dict__["ConfigDict"] = _Settings
    sys.modules |= {
        "timm": types.ModuleType("timm"),
        "timm.models": types.ModuleType("timm.models"),
        "timm.models.layers": layers,
        "ml_collections": collections,
    }
    blocks.UnetrUpOnlyBlock = blocks.UnetrUpBlock  # a block of its fork of MONAI, unused here
    sys.path.insert(0, str(folder))
    from models import Trans  # type: ignore[import-not-found]

    return Trans


class PublishedStep:
    """A whole pretraining step of SMIT."""

    def __init__(self, folder: Path, crop: int) -> None:
        networks = _imported(folder)
        config = networks.CONFIGS["Trans-Small_SMIT_pre_train"]
        config.img_size = (crop,) * 3
        self.student = networks.Trans_SMIT_pre_train_Student_No_Share(config)
        self.teacher = networks.Trans_SMIT_pre_train_Teacher_No_Share(config).requires_grad_(requires_grad=False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5)
        self.cells = crop // CELL
        self.centers = [torch.zeros(1, 8192), torch.zeros(1, 1, 8192)]

    def step(self, views: Views, number: int, *, bf16: bool) -> float:
        """Forward, backward, optimizer, teacher, centers; the loss."""
        images, cells = torch.cat([views.u, views.v]), self.cells**3
        draws = torch.Generator().manual_seed(number)
        hidden = torch.rand(len(images), cells, generator=draws).argsort(dim=1) < round(0.7 * cells)
        boxes = hidden.view(-1, *(self.cells,) * 3).float()
        patches = boxes.repeat_interleave(8, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
        voxels = patches.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3).unsqueeze(1)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            student, prediction = self.student(images, patches)
            teacher = self.teacher(images)
            image = (functional.l1_loss(images, prediction, reduction="none") * voxels).sum() / (voxels.sum() + 1e-5)
            loss = image + self._distil(student, teacher, hidden)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            mine, theirs = dict(self.student.named_parameters()), dict(self.teacher.named_parameters())
            for name in set(mine) & set(theirs):
                theirs[name].data.mul_(0.996).add_((1 - 0.996) * mine[name].detach().data)
        return float(loss.item())

    def _distil(self, student: Any, teacher: Any, hidden: Tensor) -> Tensor:
        """Its `Cls_Patch_Loss` for two views."""
        told = [
            ((logits - center) / 0.04).softmax(dim=-1).detach()
            for logits, center in zip(teacher, self.centers, strict=True)
        ]
        cls = -(told[0].roll(len(hidden) // 2, 0) * (student[0] / 0.1).log_softmax(dim=-1)).sum(dim=-1)
        rows = -(told[1] * (student[1] / 0.1).log_softmax(dim=-1)).sum(dim=-1)
        patch = ((rows * hidden).sum(dim=-1) / hidden.sum(dim=-1).clamp(min=1.0)).mean()
        with torch.no_grad():
            self.centers[0] = 0.9 * self.centers[0] + 0.1 * teacher[0].float().mean(dim=(0, 1))[None]
            self.centers[1] = 0.9 * self.centers[1] + 0.1 * teacher[1].float().mean(dim=(0, 1))[None, None]
        return 0.1 * cls.mean() + 0.1 * patch
