"""A trained classifier on disk, and what it says of new cases.

A folder: `weights/` (which every verb that takes an encoder reads; a ResNet's `resnet.safetensors` instead),
`head.safetensors`, and `classifier.json` with classes, threshold, provenance and the files' checksums, written last.
"""

import copy
import json
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from dagman import config, files
from dagman.ct import crops
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.nets.classifier import EncoderClassifier, Network, ResNet50
from dagman.nets.encoder import Encoder
from dagman.nets.weights import MODEL_FILE, load_encoder, save_encoder
from dagman.tasks import labels as label_rules
from dagman.tasks.classify import TASK, Probe
from dagman.tasks.embed import embed, mean_per_case, suited
from dagman.tasks.origin import Origin
from dagman.tasks.predictions import Predictions
from dagman.tasks.table import Table, write_rows
from dagman.types import Preparation

FORMAT = 1
HEAD, RESNET, CARD = Path("head.safetensors"), Path("resnet.safetensors"), "classifier.json"
FOLDS = "fold-*"
MASKS = "cases_with_mask"
"""On the card: of the cases learnt from."""
PROBE = "linear probe"
"""On the card: the method."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """What turns a CT into probabilities of classes."""

    network: Network
    """In eval mode; its `preparation` says how the CT is shown to it."""
    names: tuple[str, ...]
    threshold: float
    """Of two classes: the probability of the second from which a case is called so."""
    card: dict[str, Any]
    """Where it comes from."""


def save(classifier: Classifier, folder: Path) -> None:
    """Write a classifier; `load` gives it back.

    Args:
        classifier: What to save.
        folder: Where.

    Raises:
        DagmanError: `E-DISK`.
    """
    network = classifier.network
    if isinstance(network, EncoderClassifier):
        save_encoder(network.encoder, folder / MODEL_FILE, {"role": "encoder of a classifier", **classifier.card})
        tensors, names = {HEAD: network.head.state_dict()}, [MODEL_FILE, HEAD]
        kind = {"kind": "encoder", "which": network.which}
    else:
        tensors, names = {RESNET: network.resnet.state_dict()}, [RESNET]
        kind = {"kind": "resnet50"}
    for name, state in tensors.items():
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        files.write_atomic(folder / name, lambda path, whole=whole: safetensors.torch.save_file(whole, path))  # type: ignore[misc]
    described = {
        "format": FORMAT,
        **kind,
        "names": list(classifier.names),
        "threshold": classifier.threshold,
        "preparation": config.to_dict(network.preparation),
        "files": {str(name): files.sha256_file(folder / name) for name in names},
        "card": classifier.card,
    }
    files.write_json(folder / CARD, described)


def from_probe(probe: Probe, names: tuple[str, ...], encoder: Encoder, origin: Origin) -> Classifier:
    """A probe as a classifier: its scaling and weights are one linear layer on the encoder."""
    network = EncoderClassifier(encoder, len(names), origin.which).eval()
    weights, biases = probe.linear()
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(weights))
        network.head.bias.copy_(torch.from_numpy(biases))
    card = {
        "task": TASK,
        "method": PROBE,
        "source": str(origin.weights),
        "store": origin.store,
        MASKS: origin.masks,
    }
    return Classifier(network=network, names=names, threshold=probe.threshold, card=card)


def load(folder: Path) -> list[Classifier]:
    """The classifier that `save` wrote, or those of all folds of a study: their probabilities are averaged.

    Raises:
        DagmanError: `E-WEIGHTS`, exit code 4, for a folder that holds none, damaged files, or folds that do not match.
    """
    folders = places(folder)
    if not folders:
        advice = "give the output folder of `dagman classify finetune`, or `classifier` of a probe"
        raise _refused(folder, f"holds no {CARD}", advice)
    found = [_load(each) for each in folders]
    first = found[0]
    for path, other in zip(folders, found, strict=True):
        if other.names != first.names or other.network.preparation != first.network.preparation:
            raise _refused(path, f"differs from {folders[0]} in classes or preparation", "give one fold")
    return found


def places(folder: Path) -> list[Path]:
    """Where classifiers lie: in the folder itself, or in its folds."""
    return [folder] if (folder / CARD).is_file() else sorted(path.parent for path in folder.glob(f"{FOLDS}/{CARD}"))


def _load(folder: Path) -> Classifier:
    try:
        described = json.loads((folder / CARD).read_text())
        if described["format"] != FORMAT:
            raise ValueError(described["format"])
        preparation = config.from_dict(Preparation, described["preparation"], "preparation.")
        for name, digest in described["files"].items():
            if files.sha256_file(folder / name) != digest:
                raise _refused(folder / name, "is not what was written", "restore the folder")
        names, network = tuple(described["names"]), _network(folder, described, preparation)
        return Classifier(
            network=network.eval(), names=names, threshold=float(described["threshold"]), card=described["card"]
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        problem = f"cannot be read as format {FORMAT} ({type(error).__name__})"
        raise _refused(folder / CARD, problem, "restore the folder, or update dagman") from error


def _network(folder: Path, described: dict[str, Any], preparation: Preparation) -> Network:
    num_classes = len(described["names"])
    if described["kind"] == "resnet50":
        resnet = ResNet50(num_classes, preparation)
        resnet.resnet.load_state_dict(safetensors.torch.load_file(folder / RESNET))
        return resnet
    network = EncoderClassifier(load_encoder(folder), num_classes, described["which"])
    network.head.load_state_dict(safetensors.torch.load_file(folder / HEAD))
    return network


def _refused(subject: Path, problem: str, advice: str) -> DagmanError:
    return DagmanError("WEIGHTS", subject, problem, advice, exit_code=ExitCode.REFUSED)


def probabilities(
    network: Network,
    store: PreparedStore,
    rows: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Probability of each class of each case, in place of features: of its crop, or the mean over its crops.

    Args:
        network: In eval mode.
        store: On the grid of the network's `preparation`.
        rows: Of the store; all where None.
        device: Where to compute.
        progress: Hears of each finished case.

    Raises:
        DagmanError: `E-GRID`, exit code 4.
    """
    if network.training:
        raise ValueError("a class is predicted in eval mode: call network.eval()")
    preparation = suited(store, network.preparation)
    network.to(device)

    def likely(images: Float[Tensor, "batch 1 x y z"]) -> Tensor:
        with torch.inference_mode():
            return network(images.to(device)).float().softmax(dim=1).cpu()  # type: ignore[no-any-return]

    return mean_per_case(store, preparation, likely, progress=progress, rows=rows)


def probed(
    network: EncoderClassifier,
    store: PreparedStore,
    rows: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Table:
    """Probability of each class of each case, as a linear probe gives it: of the mean of the features over its crops.

    Args:
        network: As `from_probe` makes it.
        store: As for `probabilities`.
        rows: Of the store; all where None.
        device: Where to compute.
        progress: Hears of each finished case.

    Raises:
        DagmanError: `E-GRID`, exit code 4.
    """
    table = embed(network.encoder, store, which=network.which, rows=rows, device=device, progress=progress)
    head = copy.deepcopy(network.head).cpu().double()
    with torch.inference_mode():
        likely = head(torch.from_numpy(table.features).double()).softmax(dim=1)
    return replace(table, features=likely.float().numpy())


def usable(
    classifiers: Sequence[Classifier], store: PreparedStore, without: Container[str | None] = ()
) -> tuple[list[int], list[str]]:
    """Rows of a store that can be classified, but for the cases `without`; and what a person should know of them."""
    rows, said = crops.croppable(store)
    rows = [row for row in rows if store.rows[row]["case_id"] not in without]
    bare = sum(store.rows[row]["mask"] is None for row in rows)
    if bare and any(each.card.get(MASKS) for each in classifiers):
        said.append(
            f"{bare} of {len(rows)} scans have no mask, but this classifier learnt from crops around masks: of them "
            "the mean over the whole scan is taken, which may mean little; a CSV with a mask column names masks"
        )
    return rows, said


def predict(
    classifiers: Sequence[Classifier],
    store: PreparedStore,
    rows: Sequence[int] | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Table, list[str]]:
    """Mean probabilities of the classifiers for every case, and the class that each is called.

    The threshold for two classes is the mean of theirs.
    """
    tables = [_likely(each, store, rows, device=device, progress=progress) for each in classifiers]
    mean = np.mean([table.features for table in tables], axis=0)
    names = classifiers[0].names
    called = (mean[:, 1] >= _cut(classifiers)).astype(int) if len(names) == 2 else mean.argmax(axis=1)
    first = tables[0]
    table = Table(case_ids=first.case_ids, patients=first.patients, labels=first.labels, features=mean)
    return table, [names[number] for number in called]


def _likely(classifier: Classifier, store: PreparedStore, rows: Sequence[int] | None, **how: Any) -> Table:
    """Probabilities as they were made where the classifier was tested."""
    network = classifier.network
    if classifier.card.get("method") == PROBE and isinstance(network, EncoderClassifier):
        return probed(network, store, rows, **how)
    return probabilities(network, store, rows, **how)


def _cut(classifiers: Sequence[Classifier]) -> float:
    return float(np.mean([each.threshold for each in classifiers]))


def tested(table: Table, classifiers: Sequence[Classifier], learnt: Container[str]) -> Predictions | None:
    """What predictions of cases that have a label are worth, at the threshold that the classifiers came with.

    Args:
        table: From `predict`.
        classifiers: Which made it.
        learnt: Cases whose labels they learnt from; they test nothing.

    Returns:
        None where no case has a label.

    Raises:
        DagmanError: `E-LABEL` for labels that are none of the classes.
    """
    names = classifiers[0].names
    new = [label if case not in learnt else None for case, label in zip(table.case_ids, table.labels, strict=True)]
    numbers = label_rules.numbers_of(new, names)
    rows = sorted(
        (row for row, number in enumerate(numbers) if number is not None), key=lambda row: table.case_ids[row]
    )
    if not rows:
        return None
    known = all(table.patients[row] for row in rows)
    return Predictions(
        case_ids=tuple(table.case_ids[row] for row in rows),
        groups=np.array([table.patients[row] if known else table.case_ids[row] for row in rows]),
        labels=np.array([numbers[row] for row in rows]),
        names=names,
        fold=np.zeros(len(rows), dtype=np.int64),
        probabilities=table.features[rows],
        thresholds=(_cut(classifiers),),
        group_by="patient" if known else "case",
        num_unlabelled=len(table.case_ids) - len(rows),
    )


def write_predictions(
    table: Table, called: Sequence[str], names: Sequence[str], sources: Sequence[str], folder: Path
) -> Path:
    """Write `predictions.csv`: `case_id, patient, predicted, probability_..., source`.

    Args:
        table: From `predict`.
        called: The class of each case.
        names: Of the classes.
        sources: Where the scan of each case lies: its file, or the folder of its series.
        folder: Where.
    """
    path = folder / "predictions.csv"
    patients = [patient or "" for patient in table.patients]
    write_rows(
        path,
        ("case_id", "patient", "predicted", *(f"probability_{name}" for name in names), "source"),
        zip(table.case_ids, patients, called, *table.features.T, sources, strict=True),
    )
    return path
