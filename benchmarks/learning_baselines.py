"""What the learning curve is held against: features that need no network, untrained networks, chance.

Chance is what a histogram of intensities scores when the labels are drawn again within each patient (of malignancy,
within each pair of patients of whom one is malignant), as the question's own design draws them.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import learning_probes as probes
from dagman import config, files
from dagman.ct import crops
from dagman.nets.encoder import Encoder
from dagman.pretext.codistill import CoDistillation
from dagman.randomness import generator, torch_seed
from dagman.train.settings import PretrainConfig
from dagman.types import Preparation
from learning_cases import Crops

BINS = 16
PERMUTATIONS = 100
UNTRAINED = 6
"""Untrained networks that a run stands beside, of seeds 0 to 5; each run sets out from that of its own seed."""

Questions = Mapping[str, Crops]
Asked = dict[tuple[str, str, int | None], probes.Scores]
"""(question, features, labels) -> scores."""
Seen = dict[str, dict[str, np.ndarray]]
"""Question -> kind of features -> (crops, width)."""


def ask(seen: Mapping[str, dict[str, np.ndarray]], questions: Questions) -> Asked:
    """All probes: all features together with 8, 32 and all labels, each by itself with 32."""
    return {
        (question, kind, labels): probes.probe(vectors, asked.words, asked.patients, labels, asked.scored)
        for question, kinds in seen.items()
        for asked in [questions[question]]
        for kind, vectors in kinds.items()
        for labels in (probes.LABELS if kind == probes.TOGETHER else (32,))
    }


def voxels(hu: np.ndarray, window_hu: tuple[float, float]) -> dict[str, np.ndarray]:
    """A baseline that knows no network: 8^3 means."""
    images = torch.from_numpy(crops.window(hu, window_hu))[:, None]
    return {probes.TOGETHER: torch.nn.functional.adaptive_avg_pool3d(images, 8).flatten(1).numpy()}


def histogram(hu: np.ndarray, window_hu: tuple[float, float]) -> dict[str, np.ndarray]:
    """A baseline that knows no place either: share of the voxels in 16 bins of the window."""
    shown = crops.window(hu, window_hu).reshape(len(hu), -1)
    bins = np.minimum((shown * BINS).astype(int), BINS - 1)
    return {probes.TOGETHER: np.stack([(bins == number).mean(axis=1) for number in range(BINS)], axis=1)}


def shells(hu: np.ndarray, window_hu: tuple[float, float]) -> dict[str, np.ndarray]:
    """A baseline made by hand for what lies in the middle: intensity, deviation and slope by distance from there."""
    shown = crops.window(hu, window_hu)
    side = shown.shape[1]
    away = np.linalg.norm(np.indices((side,) * 3) - (side - 1) / 2, axis=0).astype(int).ravel()
    within = (away[:, None] == np.arange(side // 2)).astype(np.float32)
    within /= within.sum(axis=0)
    found = []
    for crop in shown.astype(np.float32):
        slope = np.sqrt(sum(step**2 for step in np.gradient(crop)))
        mean, square = crop.ravel() @ within, crop.ravel() ** 2 @ within
        found.append(np.concatenate([mean, np.sqrt(np.clip(square - mean**2, 0, None)), slope.ravel() @ within]))
    return {probes.TOGETHER: np.stack(found)}


WAYS = {"voxels": voxels, "histogram": histogram, "shells": shells}


def without_network(questions: Questions, window_hu: tuple[float, float]) -> dict[str, Asked]:
    """Voxels, intensities, shells."""
    return {
        name: ask({question: way(asked.hu, window_hu) for question, asked in questions.items()}, questions)
        for name, way in WAYS.items()
    }


def chance(questions: Questions, window_hu: tuple[float, float], folder: Path) -> list[dict[str, Any]]:
    """AUCs of labels that were drawn again: mean, and where 95 of 100 lie; kept in the folder, as all runs share it."""
    rows: list[dict[str, Any]] = []
    for question, asked in questions.items():
        key = hashlib.sha256(
            repr([question, window_hu, probes.STRENGTH, asked.words.tolist(), asked.patients.tolist()]).encode()
        )
        key.update(np.ascontiguousarray(asked.hu))
        path = folder / f"chance-{key.hexdigest()[:16]}.json"
        if not path.exists():
            files.write_json(path, _chance(question, asked, window_hu))
        rows += json.loads(path.read_text())
    return rows


def _chance(question: str, asked: Crops, window_hu: tuple[float, float]) -> list[dict[str, Any]]:
    """Of one question."""
    rows = []
    features = histogram(asked.hu, window_hu)[probes.TOGETHER]
    groups = [np.flatnonzero(asked.patients == patient) for patient in np.unique(asked.patients)]
    draws, once = generator(0, "learning.chance", question), np.ones((1, len(asked.words)))
    found: dict[int | None, list[float]] = {labels: [] for labels in probes.LABELS}
    for _ in range(PERMUTATIONS):
        words = asked.words.copy()
        for group in groups:
            words[group] = words[draws.permutation(group)]
        for labels, values in found.items():
            values.append(float(probes.probe(features, words, asked.patients, labels, asked.scored).statistic(once)[0]))
    for labels, values in found.items():
        low, high = np.quantile(values, (0.025, 0.975))
        row = {"mean": np.mean(values), "low": low, "high": high}
        rows.append({"question": question, "labels": labels} | {key: round(float(row[key]), 4) for key in row})
    return rows


def untrained(chosen: PretrainConfig, seed: int) -> Encoder:
    """The encoder that a run of this seed sets out from."""
    torch.manual_seed(torch_seed(seed, "weights"))
    module = CoDistillation(chosen.encoder, chosen.method, mean_intensity=0.5, crop=chosen.data.crop)
    encoder = module.teacher.encoder.eval()
    encoder.preparation = Preparation(window_hu=chosen.data.window_hu, crop=chosen.data.crop)
    return encoder


def networks(
    chosen: PretrainConfig, questions: Questions, folder: Path, alter: str | None, see: Callable[[Encoder], Seen]
) -> list[Asked]:
    """What the untrained networks answer; their features are kept in the folder, as all seeds share them."""
    shown = [alter, *(config.to_dict(chosen)[part] for part in ("encoder", "data"))]
    key = hashlib.sha256(json.dumps(shown, sort_keys=True).encode())
    for asked in questions.values():
        key.update(np.ascontiguousarray(asked.hu))
    answers = []
    for seed in range(UNTRAINED):
        path = folder / f"{key.hexdigest()[:16]}-{seed}.npz"
        if not path.exists():
            flat = {
                f"{question} {kind}": vectors
                for question, kinds in see(untrained(chosen, seed)).items()
                for kind, vectors in kinds.items()
            }
            stream = io.BytesIO()
            np.savez(stream, **flat)  # type: ignore[arg-type]
            files.write_bytes(path, stream.getvalue())
        with np.load(path) as stored:
            kinds: Seen = {}
            for named, vectors in stored.items():
                question, kind = named.rsplit(" ", 1)
                kinds.setdefault(question, {})[kind] = vectors
        answers.append(ask(kinds, questions))
    return answers
