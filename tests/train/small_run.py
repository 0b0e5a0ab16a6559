"""A store of four small phantoms, and the smallest run that sees hints and shifted windows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dagman import files
from dagman.ct.datasets import DataConfig
from dagman.ct.store import FORMAT, PreparedStore, array_path, write_array
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.pretext.method import HeadConfig, MethodConfig
from dagman.train.pretrain import OptimisationConfig, PretrainConfig


def volume(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Soft tissue with a bright ball and a dark one whose places differ from volume to volume."""
    draws = np.random.default_rng(number)
    grid = np.indices(shape).transpose(1, 2, 3, 0)
    hu = draws.normal(40, 15, shape)
    for value in (700, -800):
        centre = draws.uniform(10, np.array(shape) - 10)
        hu[((grid - centre) ** 2).sum(-1) < 81] = value
    return hu.astype(np.int16)


def write_store(folder: Path, splits: list[str | None]) -> PreparedStore:
    files.write_json(
        folder / "prepare.json", {"format": FORMAT, "storage": "npy", "spacing_mm": 2.0, "resampling": "antialiased"}
    )
    rows = []
    for number, split in enumerate(splits):
        path = array_path(folder, "volumes", f"case-{number}", "npy")
        write_array(path, volume(number, (48, 72, 68)))
        rows.append(
            {
                "case_id": f"case-{number}",
                "split": split,
                "shape": [48, 72, 68],
                "affine": np.diag([2.0, 2.0, 2.0, 1.0]).tolist(),
                "bytes": path.stat().st_size,
                "sha256": files.sha256_file(path),
                "mask": None,
            }
        )
    files.write_text(folder / "manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return PreparedStore(folder)


def small(**changes: Any) -> PretrainConfig:
    """DAGMaN at its smallest, with changes to its optimisation."""
    optimisation: dict[str, Any] = {
        "steps": 6,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "momentum": 0.9,
        "precision": "float32",
    }
    return PretrainConfig(
        recipe="small",
        data=DataConfig(crop=(32, 32, 64)),
        encoder=SwinConfig(
            embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), attention=AttentionConfig(num_blocks=1)
        ),
        method=replace(MethodConfig(), heads=HeadConfig(num_prototypes=64, hidden_width=64, bottleneck_width=32)),
        optimisation=OptimisationConfig(**optimisation | changes),
    )
