"""A trained segmentation network on disk: its encoder as any other of this project, a decoder, and what it segments.

A folder: `weights/` (which every verb that takes an encoder reads), `decoder.safetensors`, and `segmenter.json` with
classes, provenance and the checksums of both, written last.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

from dagman import config, files
from dagman.errors import DagmanError, ExitCode
from dagman.nets.unetr import SegmentationNetwork
from dagman.nets.weights import MODEL_FILE, load_encoder, save_encoder
from dagman.tasks.classes import Classes
from dagman.types import Preparation

FORMAT = 1
DECODER = Path("decoder.safetensors")
CARD = "segmenter.json"
LABELS = "labels"
"""On the card: the choice of labels as it was given; none where all were taken."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmenter:
    """What turns a CT into a label map."""

    network: SegmentationNetwork
    """In eval mode; its encoder's `preparation` says how the CT is shown to it."""
    classes: Classes
    card: dict[str, Any]
    """Where it comes from."""
    digest: str = ""
    """SHA-256 over its files; none where it was not read from any."""

    @property
    def chosen(self) -> str | None:
        """Which labels of the masks it learnt, where they were chosen or joined; None where they are all."""
        joined = any(len(values) > 1 for values in self.classes.labels)
        return self.classes.text if joined or self.card.get(LABELS) else None

    @property
    def preparation(self) -> Preparation:
        """How a CT is shown to it."""
        return self.network.encoder.preparation


def save(segmenter: Segmenter, folder: Path) -> None:
    """Write a segmenter; `load` gives it back.

    Raises:
        DagmanError: `E-DISK`.
    """
    network = segmenter.network
    save_encoder(network.encoder, folder / MODEL_FILE, {"role": "encoder of a segmenter", **segmenter.card})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.decoder.state_dict().items()}
    files.write_atomic(folder / DECODER, lambda path: safetensors.torch.save_file(tensors, path))
    described = {
        "format": FORMAT,
        "classes": config.to_dict(segmenter.classes),
        "files": {str(name): files.sha256_file(folder / name) for name in (MODEL_FILE, DECODER)},
        "card": segmenter.card,
    }
    files.write_json(folder / CARD, described)


def load(folder: Path) -> list[Segmenter]:
    """The segmenter that `save` wrote, or those of all folds of a study: their probabilities are averaged.

    Raises:
        DagmanError: `E-WEIGHTS`, exit code 4, for a folder that holds none, whose files do not belong together, or
            folds that do not match.
    """
    folders = places(folder)
    if not folders:
        problem, advice = f"holds no {CARD}", "give the output folder of `dagman segment train`, or a fold of it"
        raise _refused(folder, problem, advice)
    found = [_load(each) for each in folders]
    first = found[0]
    for path, other in zip(folders, found, strict=True):
        if (other.classes, other.preparation) != (first.classes, first.preparation):
            raise _refused(path, f"differs from {folders[0]} in classes or preparation", "give one fold")
    return found


def places(folder: Path) -> list[Path]:
    """Where segmenters lie: in the folder itself, or in its folds."""
    return [folder] if (folder / CARD).is_file() else sorted(path.parent for path in folder.glob(f"fold-*/{CARD}"))


def _load(folder: Path) -> Segmenter:
    described = _described(folder)
    for name, digest in described["files"].items():
        if not (folder / name).is_file() or files.sha256_file(folder / name) != digest:
            raise _refused(folder / name, "is missing or not what was written", "restore the folder")
    classes = config.from_dict(Classes, described["classes"], "classes.")
    network = SegmentationNetwork(load_encoder(folder), len(classes) + 1)
    network.decoder.load_state_dict(safetensors.torch.load_file(folder / DECODER))
    digest = hashlib.sha256(json.dumps(described["files"], sort_keys=True).encode()).hexdigest()
    return Segmenter(network=network.eval(), classes=classes, card=described["card"], digest=digest)


def _described(folder: Path) -> Mapping[str, Any]:
    try:
        described = json.loads((folder / CARD).read_text())
        if described["format"] == FORMAT and {"classes", "files", "card"} <= described.keys():
            return dict(described)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise _refused(folder / CARD, f"cannot be read as format {FORMAT}", "restore the folder, or update dagman")


def _refused(subject: Path, problem: str, advice: str) -> DagmanError:
    return DagmanError("WEIGHTS", subject, problem, advice, exit_code=ExitCode.REFUSED)
