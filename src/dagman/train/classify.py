"""Learning to classify: patients in folds, an encoder with a linear layer, scores on cases nothing was learnt from.

The folder of a study: `fold-K/` for each part (a classifier that `tasks.classifier.load` reads, and its
`result.json`), and over all finished parts `predictions.csv`, `result.json` and `roc.png`. A part with its result is
not learnt again; one under way goes on bit for bit.
"""

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dagman import config as configs
from dagman import files
from dagman.ct import crops
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.figures import roc
from dagman.nets.classifier import EncoderClassifier, Network, ResNet50, Which, vector
from dagman.nets.encoder import Encoder
from dagman.randomness import torch_seed
from dagman.run import package_version
from dagman.tasks import classifier as classifiers
from dagman.tasks import cohort as cohorts
from dagman.tasks import leakage, predictions
from dagman.tasks.case_crops import CaseCrop, CaseCrops
from dagman.tasks.classifier import Classifier
from dagman.tasks.classify import TASK, Probe, can_fit, fit_rows, predicted, threshold
from dagman.tasks.cohort import Cohort
from dagman.tasks.embed import suited
from dagman.tasks.labels import Unlabelled
from dagman.tasks.predictions import Predictions
from dagman.tasks.protocol import BY_PATIENT, Part, Protocol
from dagman.train.finetune import FinetuneConfig, Fitted, start_of, to_training, weights_digest
from dagman.train.parts import learn, place, refuse_mirrored_sides

MADE_BY = "classify finetune"
LEAST_TO_CUT = 10
"""Held-out cases of each class from which a threshold is chosen: of fewer it is chance."""
ALTERED, ENOUGH = 4, 512
"""Crops of every training case, altered as training alters them, that the probe to start from is fitted on; fewer, and
one at least, where as many are enough."""
Tell = Callable[[int, int, str], None]
Say = Callable[[str], None]


TINY = FinetuneConfig(batch_size=16)
"""Minutes on two cores."""


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """A study of classification."""

    finetune: FinetuneConfig = TINY
    protocol: Protocol = BY_PATIENT
    network: Literal["encoder", "resnet50"] = "encoder"
    """`resnet50`: MONAI's, to be compared with."""
    which: Which = "pooled"
    """What the linear layer sees of a crop."""
    head: Literal["probe", "random"] | None = None
    """How the linear layer starts: as a probe of the training cases, altered as they will be shown, so that the encoder
    has nothing to unlearn for its sake (Kumar et al. 2022), or at random; by default as the probe where the encoder is
    pretrained."""
    positive: str | None = None
    """The positive one of two classes, where labels are words."""
    unlabelled: Unlabelled = "refuse"
    keep_sides: bool = False
    """Do not mirror crops in training: for classes that depend on the side of the body."""

    def __post_init__(self) -> None:
        if self.network == "resnet50" and self.finetune.batch_size < 2:
            problem = "cannot be 1: the norms of a ResNet need several crops"
            raise DagmanError("CONFIG", "finetune.batch_size", problem, "give at least 2")
        if self.network == "resnet50" and self.head == "probe":
            raise DagmanError("CONFIG", "head", "cannot be probe of a ResNet", "leave it out, or fine-tune an encoder")
        if self.network == "resnet50" and self.finetune.frozen:
            raise DagmanError(
                "CONFIG", "finetune.frozen", "cannot be true of a ResNet", "freeze an encoder, or nothing"
            )


@dataclass(kw_only=True, eq=False)
class ClassifyLesson:
    """What one part learns (a `finetune.Lesson`)."""

    network: nn.Module
    """A `nets.classifier.Network`."""
    dataset: Dataset[Any]
    identity: Any
    store: PreparedStore
    weights: Tensor
    """Of each class, so that all count the same: the inverse of its share of the cases times the number of classes."""
    held_out: tuple[int, ...]
    """Rows of the store."""
    held_out_numbers: tuple[int, ...]
    probe: Callable[[EncoderClassifier], Probe] | None = None
    """Fits the probe as which the linear layer starts; None: it starts as it is."""

    @torch.no_grad()
    def begin(self) -> bool:
        """Let the linear layer start as the probe, believing that classes are alike, as the loss does."""
        if self.probe is None:
            return False
        assert isinstance(self.network, EncoderClassifier)
        weights, biases = self.probe(self.network).linear()
        self.network.head.weight.copy_(torch.from_numpy(weights))
        self.network.head.bias.copy_(torch.from_numpy(biases) + self.weights.log())
        return True

    def loss(self, batch: CaseCrop) -> Tensor:
        """Cross-entropy, every class counting the same; PyTorch's weighted mean would divide by the batch's weights."""
        logits = self.network(batch.image).float()
        each = nn.functional.cross_entropy(logits, batch.number, reduction="none")
        return (each * self.weights.to(logits.device)[batch.number]).mean()

    def score(self) -> float | None:
        """Mean log likelihood of the held-out cases, every class counting the same as in the loss.

        It means something for a handful of cases, where an AUC hardly does.
        """
        if not self.held_out:
            return None
        numbers = np.array(self.held_out_numbers)
        likely = self.likely(self.held_out)[np.arange(len(numbers)), numbers]
        said = np.log(np.maximum(likely, 1e-12))
        return float(np.mean([said[numbers == number].mean() for number in np.unique(numbers)]))

    @torch.no_grad()
    def restore_shares(self) -> None:
        """Let the network that has learnt know how frequent the classes were.

        The loss has it believe that all are alike; from here on its probabilities are those of cases drawn as the
        training cases were, as a linear probe's are.
        """
        assert isinstance(self.network, EncoderClassifier | ResNet50)
        self.network.last.bias.sub_(self.weights.log().to(self.network.last.bias.device))

    def likely(self, rows: Sequence[int], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Probabilities of cases."""
        assert isinstance(self.network, EncoderClassifier | ResNet50)
        device = next(self.network.parameters()).device
        table = classifiers.probabilities(self.network, self.store, rows, device=device, progress=progress)
        return table.features.astype(np.float64)


def finetune(
    encoder: Encoder,
    store: PreparedStore,
    folder: Path | str,
    config: ClassifyConfig | None = None,
    *,
    weights: Path | str | None = None,
    resnet: Path | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    workers: int = 0,
    progress: Tell | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any] | None:
    """Learn and test every part that is not finished.

    Args:
        encoder: Where every part starts; it is not changed. Of a ResNet its `preparation` alone counts.
        store: Labelled cases on the encoder's grid. Those with an empty mask are left out, and said: no crop can be
            cut around it.
        folder: Of the study.
        config: How.
        weights: Whence the encoder comes; without, what its `report` names, or new random weights where it has none.
        resnet: Weights file that a ResNet starts from.
        device: Where to compute; the GPU where there is one.
        workers: Processes that read crops ahead.
        progress: Hears of each step.
        say: Hears a line for each part.

    Returns:
        The study's `result.json`; None when a signal stopped it.

    Raises:
        DagmanError: `E-GRID`, `E-NOMASK` (all masks are empty), `E-LABEL`, `E-PATIENT`, `E-LEAK`, `E-FOLDS`;
            `E-RESUME` (exit code 4) for a part that was learnt with other settings; and as `finetune.fit`.

    Reference:
        Section 4.3: fine-tuning of all layers.
    """
    config, folder = config or ClassifyConfig(), Path(folder)
    start = start_of(None if config.network == "resnet50" else encoder, weights)
    encoder = copy.deepcopy(encoder)
    encoder.preparation = suited(store, encoder.preparation)
    rows, empty = crops.croppable(store)
    if not rows:
        crops.refuse_empty_masks(store, range(len(store)))
    for line in empty:
        say(line)
    options: dict[str, Any] = {"positive": config.positive, "unlabelled": config.unlabelled, "hold_out": True}
    study = _Study(
        encoder=encoder,
        store=store,
        cohort=cohorts.cohort(cohorts.stored(store, rows), config.protocol, **options),
        folder=folder,
        config=config,
        weights=start,
        resnet=resnet,
        seen=leakage.seen(store.rows, resnet or start),
        num_empty=len(empty),
    )
    refuse_mirrored_sides(study.cohort.classes.names, keep_sides=config.keep_sides, say=say)
    leakage.refuse(study.seen, leakage.twins(store), study.cohort.together, TASK)
    parts = study.cohort.parts
    for part in parts:
        if len(tested := set(study.cohort.numbers[list(part.test)].tolist())) == 1:
            only = study.cohort.classes.names[tested.pop()]
            say(f"fold {part.number}: all {len(part.test)} test cases are {only}, so that it will have no AUC")
    if resnet and config.network == "resnet50":
        say(str(study.network(parts[0]).report))
    return learn(study, parts, config.finetune, device=device, workers=workers, progress=progress, say=say)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Study:
    """What the parts of a study share."""

    encoder: Encoder
    store: PreparedStore
    cohort: Cohort
    folder: Path
    config: ClassifyConfig
    weights: Path | None
    resnet: Path | None
    seen: leakage.Seen
    num_empty: int = 0
    """Cases left out for their empty mask."""

    def rows(self, cases: Sequence[int]) -> tuple[int, ...]:
        """Of the cohort's cases, their rows of the store."""
        row_of = {str(row["case_id"]): number for number, row in enumerate(self.store.rows)}
        return tuple(row_of[name] for name in cohorts.names(self.cohort.table, cases))

    def network(self, part: Part) -> Network:
        """A fresh network on the same start."""
        num_classes = len(self.cohort.classes.names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.config.finetune.seed, "classifier", part.number))
            if self.config.network == "encoder":
                return EncoderClassifier(copy.deepcopy(self.encoder), num_classes, self.config.which)
            network = ResNet50(num_classes, self.encoder.preparation)
        if self.resnet:
            network.report = network.load(self.resnet)
        return network

    def lesson(self, part: Part) -> ClassifyLesson:
        """What a part learns, and what decides all it will compute."""
        cohort, network = self.cohort, self.network(part)
        numbers = cohort.numbers[list(part.train)]
        counts = np.bincount(numbers, minlength=len(cohort.classes.names))
        identity = {
            "store": self.store.store_id,
            "weights": weights_digest(network),
            "preparation": configs.to_dict(network.preparation),
            "classes": list(cohort.classes.names),
            "settings": configs.to_dict(self.config),
            "loss": "each case weighed by its class",
            **{word: cohorts.names(cohort.table, getattr(part, word)) for word in ("train", "held_out", "test")},
            "labels": cohort.numbers[[*part.train, *part.held_out]].tolist(),
            **({"crops around": place} if (place := crops.around(self.store)) else {}),
        }
        seed = self.config.finetune.seed
        dataset = CaseCrops(
            self.store,
            self.rows(part.train),
            numbers.tolist(),
            network.preparation,
            seed,
            mirrored=not self.config.keep_sides,
        )
        return ClassifyLesson(
            network=network,
            dataset=dataset,
            identity=json.loads(json.dumps(identity)),
            store=self.store,
            weights=torch.tensor(len(numbers) / (len(counts) * counts), dtype=torch.float32),
            held_out=self.rows(part.held_out),
            held_out_numbers=tuple(cohort.numbers[list(part.held_out)].tolist()),
            probe=functools.partial(self._probe, part, dataset) if self.starts_as_probe(part) else None,
        )

    def starts_as_probe(self, part: Part) -> bool:
        """Whether the linear layer does; by itself not where a class has too few patients to fit one."""
        if self.config.head is not None or self.config.network == "resnet50" or self.weights is None:
            return self.config.head == "probe"
        return can_fit(self.cohort, part.train)

    def _probe(self, part: Part, dataset: CaseCrops, network: EncoderClassifier) -> Probe:
        """Of a part's training cases as training will show them: altered, and by an encoder in training mode.

        One that knows only crops as they are tested, without drop path, is too sure of them, and the first steps undo
        it. The crops are others than the steps learn from.
        """
        settings, cases, device = self.config.finetune, len(part.train), next(network.parameters()).device
        first = -(-settings.steps * settings.batch_size // cases) * cases
        samples = range(first, first + cases * max(1, min(ALTERED, ENOUGH // cases)))
        found = []
        to_training(network, settings)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(torch_seed(settings.seed, "classifier.probe", part.number))
            for start in range(0, len(samples), settings.batch_size):
                images = torch.stack([dataset[sample].image for sample in samples[start : start + settings.batch_size]])
                found.append(vector(network.encoder(images.to(device)), network.which).double().cpu().numpy())
        rows = [part.train[dataset.case(sample)] for sample in samples]
        return fit_rows(self.cohort, rows, np.concatenate(found))

    def conclude(self, part: Part, lesson: ClassifyLesson, fitted: Fitted, seconds: float) -> dict[str, Any]:
        """Predict a part's test cases, write its classifier, and its result last."""
        folder, names = place(self, part), self.cohort.classes.names
        lesson.restore_shares()
        cut, chosen_on = self._threshold(lesson)
        card = {
            "task": TASK,
            "dagman": package_version("dagman"),
            "source": str(self.resnet or self.weights or "new random weights"),
            "store": self.store.store_id,
            "fold": part.number,
            "cases_learnt_from": len(part.train),
            classifiers.MASKS: sum(self.store.rows[row]["mask"] is not None for row in self.rows(part.train)),
            "best_step": fitted.best_step,
            "head": "probe" if lesson.probe else "random",
            "finetune": configs.to_dict(self.config.finetune),
        }
        likely = lesson.likely(self.rows(part.test))
        network = lesson.network.cpu()
        assert isinstance(network, EncoderClassifier | ResNet50)
        made = Classifier(network=network, names=names, threshold=cut, card=card)
        learnt = [self.store.rows[row] for row in self.rows([*part.train, *part.held_out])]
        start, head = self.resnet or self.weights, self.config.finetune.frozen
        leakage.record(learnt, folder, task=TASK, start=start, head=head)
        classifiers.save(made, folder)
        result = {
            **card,
            "held_out_log_likelihood": fitted.best_score,
            "threshold": cut,
            "threshold_chosen_on": dict(zip(cohorts.names(self.cohort.table, part.held_out), chosen_on, strict=False)),
            "seconds": round(seconds, 1),
            "probabilities": likely.tolist(),
            "identity": lesson.identity,
        }
        files.write_json(folder / "result.json", result)
        return result

    def predicted(self, part: Part, result: dict[str, Any]) -> Predictions:
        """Of the test cases of a finished part."""
        return predicted(self.cohort, part, np.array(result["probabilities"]), result["threshold"])

    def told(self, part: Part, result: dict[str, Any]) -> str:
        """Its AUC."""
        return f"AUC {self.predicted(part, result).auc()}"

    def _threshold(self, lesson: ClassifyLesson) -> tuple[float, list[float]]:
        """Chosen on the held-out cases of the training part, and their probabilities.

        Where they are too few to choose, it is the share of positives, chosen on none: there a network that weighed
        classes alike calls what it holds for as likely as not.
        """
        positive = np.array(lesson.held_out_numbers) == 1
        if len(self.cohort.classes.names) > 2 or min(positive.sum(), (~positive).sum()) < LEAST_TO_CUT:
            return float(0.5 / lesson.weights[1]), []
        likely = lesson.likely(lesson.held_out)[:, 1]
        return threshold(likely, positive), likely.tolist()

    def summarise(self, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """The study over its parts: `predictions.csv`, `result.json`, `roc.png`."""
        config, results = self.config, list(done.values())
        found = predictions.together(
            [self.predicted(part, done[part.number]) for part in self.cohort.parts],
            [done[part.number].get("threshold_chosen_on", {}) for part in self.cohort.parts],
        )
        more = {
            "made_by": MADE_BY,
            "method": f"fine-tuned {'head' if config.finetune.frozen else 'network'}, {config.network}",
            "source": results[0]["source"],
            "protocol": config.protocol.words,
            "preparation": configs.to_dict(self.encoder.preparation),
            "crop_mm": crops.sides_mm(self.store, self.encoder.preparation.crop),
            "crops_around": crops.around(self.store),
            "empty_masks_left_out": self.num_empty,
            "best_steps": [result["best_step"] for result in results],
            "minutes": round(sum(result["seconds"] for result in results) / 60, 1),
            "pretraining_overlap": leakage.report(self.seen, found.case_ids),
            "settings": configs.to_dict(config),
        }
        predictions.write(found, self.folder, more)
        files.write_bytes(self.folder / "roc.png", roc.png({f"{self.folder.name}: {found.auc()}": found}))
        return predictions.summary(found) | more
