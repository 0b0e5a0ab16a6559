"""What the teacher knows, asked on crops cut for that alone: information in its targets, attention, features by level.

A distillation loss that falls proves little: teacher and student can agree on *where* a cell lies. Here the entropy of
the teacher's distributions is split: of what a cell's distribution tells, how much does its place in the crop tell
alone, and how much does the image add? In nats; for [CLS] and pooled distributions all of it is image.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from dagman.pretext import diagnostics, losses
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.types import Features

TOGETHER = 4
"""Crops of one volume that are told apart."""
MEANINGS = {
    "aitd_image_nats": "information about the image in the teacher's [CLS] distribution, nats",
    "gitd_image_nats": "information about the image in the teacher's pooled distribution, nats",
    "ampd_image_nats": "information about the image in a cell's distribution, beyond the cell's place, nats",
    "ampd_position_nats": "information about the cell's place in a cell's distribution, nats; a few tenths by chance",
    "ampd_image_share": "the image's part of both",
    "aitd_within_nats": "of the information in [CLS] distributions, what tells 4 places of a volume apart, nats",
    "gitd_within_nats": "the same of pooled distributions",
    "clean_attention_entropy": "entropy of the teacher's attention rows without noise / ln N; 1 is uniform",
    "clean_attention_peak": "N times the largest attention without noise, mean over crops; 1 is uniform",
    **{
        f"level{level}_spread": f"spread of the mean token of the crops, level {level} (0: first)" for level in range(5)
    },
    "teacher_distance": "distance of the teacher's weights from the student's / length of the student's",
    **{f"level{level}_effective_rank": f"effective rank of the same, level {level}" for level in range(5)},
}
"""Name -> what it is. A name is absent where the recipe lacks its head or attention."""


class _Information:
    """Entropies of distributions, gathered crop by crop in two halves so that small samples can be corrected for."""

    def __init__(self) -> None:
        self.halves: list[Tensor | float] = [0.0, 0.0]
        self.counts = [0, 0]
        self.row_entropy = 0.0

    def add(self, probabilities: Float[Tensor, "crops places prototypes"]) -> None:
        """Note the distributions of some crops; even ones go to the first half."""
        self.row_entropy += float(losses.entropy(probabilities).mean(dim=1).sum())
        for half in range(2):
            part = probabilities[half::2]
            self.halves[half] = self.halves[half] + part.sum(dim=0)
            self.counts[half] += len(part)

    def split(self) -> tuple[float, float]:
        """Nats that the place tells, and nats that the image adds."""
        first, second = (torch.as_tensor(half) for half in self.halves)
        total = sum(self.counts)
        whole = (first + second) / total
        overall = float(losses.entropy(whole.mean(dim=0)))
        by_place = float(losses.entropy(whole).mean())
        if min(self.counts):
            halves = zip((first, second), self.counts, strict=True)
            by_half = sum(float(losses.entropy(half / count).mean()) for half, count in halves) / 2
            # The entropy of a mean of n distributions is too small by a term in 1 / n.
            by_place = 2 * by_place - by_half
        most = math.log(whole.shape[-1]) if len(whole) == 1 else overall
        by_place = min(by_place, most)
        return max(0.0, overall - by_place), max(0.0, by_place - self.row_entropy / total)


@torch.inference_mode()
def examine(
    module: CoDistillation,
    batches: Iterable[Float[Tensor, "batch 1 x y z"]],
    knobs: Knobs,
    together: Iterable[Float[Tensor, "batch 1 x y z"]] = (),
) -> dict[str, float]:
    """Ask the teacher about crops without noise; nothing of the module changes.

    Args:
        module: Student, teacher, heads and centers.
        batches: Crops, each cut from a place of its own; in [0, 1].
        knobs: Temperatures of the step.
        together: Crops in groups of `TOGETHER` of one volume.

    Returns:
        The names of `MEANINGS` that apply.
    """
    told = {name: _Information() for name in module.teacher.heads}
    attention: list[Tensor] = []
    levels: list[list[Tensor]] = []
    for images in batches:
        # Without noise: sharp, balanced targets tell crops apart by what was dropped from them, whatever they show.
        clean: Features = module.teacher.encoder(images)
        for name, information in told.items():
            information.add(_targets(module, name, clean, knobs))
        levels.append([level.float().mean(dim=(2, 3, 4)) for level in clean.pyramid])
        if clean.attention is not None:
            attention.append(clean.attention)
    found = {"teacher_distance": _distance(module)}
    for name, information in told.items():
        position, image = information.split()
        found[f"{name}_image_nats"] = image
        if name == "ampd":
            found["ampd_position_nats"] = position
            found["ampd_image_share"] = image / max(image + position, 1e-9)
    found |= _within(module, together, knobs)
    if attention:
        rows = torch.cat(attention)
        found["clean_attention_entropy"] = float(losses.entropy(rows).mean()) / math.log(rows.shape[1])
        found["clean_attention_peak"] = float(rows.amax(dim=1).mean()) * rows.shape[1]
    for number, level in enumerate(zip(*levels, strict=True)):
        vectors = torch.cat(level)
        found[f"level{number}_spread"] = float(diagnostics.spread(vectors))
        found[f"level{number}_effective_rank"] = float(diagnostics.effective_rank(vectors))
    return found


def _targets(
    module: CoDistillation, name: str, features: Features, knobs: Knobs
) -> Float[Tensor, "crops places prototypes"]:
    """What the teacher's head of that name says of clean crops; of [CLS] and pooled features in one place."""
    temperature = knobs.patch_temperature if name == "ampd" else knobs.class_temperature
    bottleneck = module.teacher.head(name).project(module.head_input(name, features))
    targets = module.targets(name, bottleneck, temperature)
    return targets if targets.ndim == 3 else targets[:, None]


def _within(module: CoDistillation, together: Iterable[Tensor], knobs: Knobs) -> dict[str, float]:
    """Information about which of the crops of a volume was seen, mean over the volumes."""
    found: dict[str, list[Tensor]] = {name: [] for name in module.teacher.heads if name != "ampd"}
    for images in together:
        clean: Features = module.teacher.encoder(images)
        for name, told in found.items():
            targets = _targets(module, name, clean, knobs)
            groups = targets.view(-1, TOGETHER, targets.shape[-1])
            told.append(losses.entropy(groups.mean(dim=1)) - losses.entropy(groups).mean(dim=1))
    return {f"{name}_within_nats": float(torch.cat(told).mean().clamp_min(0)) for name, told in found.items() if told}


def _distance(module: CoDistillation) -> float:
    """How far the teacher's weights are from the student's, over the length of the student's."""
    students = dict(module.student.named_parameters())
    pairs = [(mine, students[name]) for name, mine in module.teacher.named_parameters()]
    apart = sum(float((mine - student).float().square().sum()) for mine, student in pairs)
    return math.sqrt(apart / sum(float(student.float().square().sum()) for _, student in pairs))
