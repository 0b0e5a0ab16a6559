"""Learning to segment: patients in folds, a decoder on an encoder, scores on cases that nothing was learnt from.

The folder of a study: `fold-K/` for each fold (a segmenter that `tasks.segmenter.load` reads, its `result.json`,
predictions of its test cases as NIfTI), and over all finished folds `cases.csv`, `result.json` and `cases.png`. A fold
with its result is not learnt again; one under way goes on bit for bit.
"""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor, nn
from torch.utils.data import Dataset

from dagman import config as configs
from dagman import files
from dagman.ct.store import PreparedStore, recorded, write_array
from dagman.errors import DagmanError, ExitCode
from dagman.figures import segmentation as figure
from dagman.nets.encoder import Encoder
from dagman.nets.unetr import SegmentationNetwork
from dagman.randomness import torch_seed
from dagman.run import package_version
from dagman.tasks import judging, leakage, segment, segmentation_scores, segmenter
from dagman.tasks import protocol as protocols
from dagman.tasks.classes import Classes
from dagman.tasks.embed import suited
from dagman.tasks.labelled import LabelledCrop, LabelledCrops
from dagman.tasks.overlap import Overlap
from dagman.tasks.protocol import BY_PATIENT, Part, Protocol
from dagman.tasks.segmentation_scores import Row
from dagman.tasks.segmenter import Segmenter
from dagman.tasks.study import Study, parts, stored, study
from dagman.train.finetune import FinetuneConfig, Fitted, start_of, weights_digest
from dagman.train.parts import learn, place, refuse_mirrored_sides
from dagman.types import Precision, Preparation

TASK = "segmentation"
RESULT = "result.json"
MADE_BY = "segment train"
ON_STORE = "predictions_on_store"
"""The same label maps on the store's voxels, for the picture."""
Tell = Callable[[int, int, str], None]
"""Called with the number of finished units, their total and what came last."""
Say = Callable[[str], None]


TINY = FinetuneConfig(batch_size=2, learning_rate=1e-3)
"""Minutes on two cores; the decoder is new and small, so it learns faster than the paper's rate."""


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """A study of segmentation."""

    finetune: FinetuneConfig = TINY
    crop: tuple[int, int, int] | None = None
    """Voxels (x, y, z), multiples of the encoder's; the encoder's own where None."""
    labels: str | None = None
    """Such as `2,5` or `tumour=1+2,node=5`; all labels where None."""
    protocol: Protocol = BY_PATIENT
    keep_sides: bool = False
    """Do not mirror crops in training."""


@dataclass(kw_only=True, eq=False)
class SegmentLesson:
    """What one fold learns (a `finetune.Lesson`)."""

    network: nn.Module
    """A `SegmentationNetwork`."""
    dataset: Dataset[Any]
    identity: Any
    store: PreparedStore
    classes: Classes
    held_out: tuple[int, ...]
    """Rows that choose the best step."""
    precision: Precision = "float32"
    """Of what is predicted, as of what is learnt."""

    def begin(self) -> bool:
        """Nothing: the decoder is new."""
        return False

    def loss(self, batch: LabelledCrop) -> Tensor:
        """Dice and cross-entropy, equally (MONAI's DiceCE)."""
        from monai.losses import DiceCELoss

        found: Tensor = DiceCELoss(to_onehot_y=True, softmax=True)(self.network(batch.image).float(), batch.numbers)
        return found

    def score(self) -> float | None:
        """Mean Dice on the held-out cases; what is empty in both counts not: predicting nothing is no merit.

        On the store's voxels. None where the held-out cases hold no class.
        """
        found = [
            row.scores
            for case in self.held_out
            for row in judging.on_store(self.likely(case), self.store, case, self.classes)
        ]
        if not any(scores.lesions for scores in found):
            return None
        return float(np.mean([scores.dice for scores in found if scores.state != "neither"]))

    def likely(self, row: int) -> Float32[np.ndarray, "classes x y z"]:
        """Probability of each class in one case, on the store's voxels."""
        assert isinstance(self.network, SegmentationNetwork)
        device = next(self.network.parameters()).device
        return segment.probabilities(self.network, self.store.hu(row), device=device, precision=self.precision)


def _rows(result: dict[str, Any]) -> list[Row]:
    """Scores as a fold's `result.json` has them; those of earlier versions are on the store's voxels."""
    return [Row(**{"grid": "store", **row, "scores": Overlap(**row["scores"])}) for row in result["rows"]]


def train(
    encoder: Encoder,
    store: PreparedStore,
    folder: Path | str,
    config: SegmentConfig | None = None,
    *,
    source: str | None = None,
    only: Sequence[int] | None = None,
    weights: Path | str | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    workers: int = 0,
    progress: Tell | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any] | None:
    """Learn and test every fold that is not finished.

    Args:
        encoder: Where every fold starts; it is not changed.
        store: Volumes with masks, on the encoder's grid.
        folder: Of the study.
        config: How.
        source: Where the encoder's weights come from, for the card; `weights` without.
        only: Folds to do now; all without.
        weights: The file or run folder that the encoder was loaded from, so that the result says which test cases
            pretraining has seen; without, what its `report` names; new random weights where it has none.
        device: Where to compute; the GPU where there is one.
        workers: Processes that read crops ahead.
        progress: Hears of each step.
        say: Hears a line for each fold.

    Returns:
        The study's `result.json` over the folds that are finished; None when a signal stopped it.

    Raises:
        DagmanError: `E-GRID`, `E-CROP`, `E-NODATA`, `E-LABEL`, `E-PATIENT`, `E-LEAK`, `E-FOLDS`; `E-RESUME`, exit code
            4, for a fold that was learnt with other settings; and as `finetune.fit`.
    """
    config, folder = config or SegmentConfig(), Path(folder)
    start = start_of(encoder, weights)
    preparation = suited(store, encoder.preparation)
    plan = study(store.folder, stored(store), labels=config.labels, group_by=config.protocol.group_by)
    refuse_mirrored_sides(plan.classes.names, keep_sides=config.keep_sides, say=say)
    chosen = parts(plan, config.protocol)
    names, group_of = [str(row["case_id"]) for row in store.rows], dict(zip(plan.rows, plan.groups, strict=True))
    together = protocols.together(names, group_of, chosen, config.protocol)
    same = leakage.twins(store)
    leakage.refuse(leakage.seen(store.rows, start), same, together, TASK)
    _refuse_two_truths(store, same)
    _tell_grid(store, plan, say)
    work = _Work(
        encoder=_with_crop(encoder, preparation, config),
        store=store,
        plan=plan,
        parts=chosen,
        folder=folder,
        config=config,
        source=source or str(start or "new random weights"),
        weights=start,
        progress=progress,
    )
    if only is not None and (not only or not set(only) <= {part.number for part in work.parts}):
        there = f"there are {len(work.parts)} folds, numbered from 0"
        raise DagmanError(
            "CONFIG", "fold", f"cannot be {', '.join(map(str, only)) or 'none'}: {there}", "give one of them"
        )
    return learn(work, chosen, config.finetune, only=only, device=device, workers=workers, progress=progress, say=say)


def _with_crop(encoder: Encoder, preparation: Preparation, config: SegmentConfig) -> Encoder:
    """A copy of the encoder with the store's preparation and the crop of the study.

    Raises:
        DagmanError: `E-CROP`.
    """
    crop = config.crop or encoder.preparation.crop
    encoder.config.grid(crop)
    if all(side <= encoder.config.final_side for side in crop):
        raise DagmanError(
            "CROP",
            f"crop {crop}",
            "has a single final token",
            "double a side, such as --crop 64,64,64",
        )
    other = copy.deepcopy(encoder)
    other.preparation = replace(preparation, crop=crop)
    return other


def _refuse_two_truths(store: PreparedStore, same: Sequence[Sequence[str]]) -> None:
    """Refuse a CT whose voxels are foreground in one row and background in another."""
    row_of = {str(row["case_id"]): number for number, row in enumerate(store.rows) if row["mask"]}
    for cases in same:
        rows = [row_of[case] for case in cases if case in row_of]
        if _masks_differ(store, rows):
            named = ", ".join(cases[:5])
            advice = "give each CT one label map of all that is to be found (of LIDC: scans.csv)"
            raise DagmanError(
                "MASK",
                "study",
                f"one CT has several rows with other masks ({named})",
                advice,
                exit_code=ExitCode.REFUSED,
            )


def _masks_differ(store: PreparedStore, rows: Sequence[int]) -> bool:
    """Whether rows hold other labels: two versions pack the same ones to other bytes."""
    if len({store.rows[row]["mask"]["sha256"] for row in rows}) < 2:
        return False
    first, *others = (np.asarray(store.mask(row)) for row in rows)
    return any(not np.array_equal(first, other) for other in others)


def _tell_grid(store: PreparedStore, plan: Study, say: Say) -> None:
    """Say where scores will not be on the scans' own voxels."""
    without = [row for row in plan.rows if "drawn" not in recorded(store.rows[row])]
    if without:
        say(
            f"{len(without)} of {len(plan.rows)} cases will be scored on the store's voxels of "
            f"{store.settings['spacing_mm']:g} mm, not on their own: {store.folder} is of an earlier version, which "
            "kept no masks as drawn (prepare the scans into a new folder)"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Work:
    """What the folds of a study share."""

    encoder: Encoder
    store: PreparedStore
    plan: Study
    parts: tuple[Part, ...]
    folder: Path
    config: SegmentConfig
    source: str
    weights: Path | None
    progress: Tell | None

    def lesson(self, part: Part) -> SegmentLesson:
        """A fresh network on the same start, and what decides all it will compute."""
        seed, classes = self.config.finetune.seed, self.plan.classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(seed, "decoder", part.number))
            network = SegmentationNetwork(copy.deepcopy(self.encoder), len(classes) + 1)
        identity = {
            "store": self.store.store_id,
            "weights": weights_digest(self.encoder),
            "encoder": configs.to_dict(self.encoder.config),
            "preparation": configs.to_dict(self.encoder.preparation),
            "classes": configs.to_dict(classes),
            "settings": configs.to_dict(self.config),
            **{word: self._names(getattr(part, word)) for word in ("train", "held_out", "test")},
        }
        return SegmentLesson(
            network=network,
            dataset=LabelledCrops(
                self.store, part.train, classes, self.encoder.preparation, seed, mirrored=not self.config.keep_sides
            ),
            identity=json.loads(json.dumps(identity)),
            store=self.store,
            classes=classes,
            held_out=part.held_out,
            precision=self.config.finetune.precision,
        )

    def _names(self, rows: Sequence[int]) -> list[str]:
        return [self.store.rows[row]["case_id"] for row in rows]

    def told(self, part: Part, result: dict[str, Any]) -> str:
        """Its mean Dice."""
        dice = segmentation_scores.mean_dice(_rows(result))
        if dice is None:
            return "no test case holds a class"
        return f"mean Dice {dice:.3f} on those of {len(part.test)} test cases that have a mask"

    def conclude(self, part: Part, lesson: SegmentLesson, fitted: Fitted, seconds: float) -> dict[str, Any]:
        """Test a fold, write its segmenter, and its result last."""
        started, folder, config = time.monotonic(), place(self, part), self.config
        rows = self._test(part, lesson)
        card = {
            "task": TASK,
            "dagman": package_version("dagman"),
            "source": self.source,
            "store": self.store.store_id,
            "fold": part.number,
            "cases_learnt_from": len(part.train),
            "best_step": fitted.best_step,
            segmenter.LABELS: config.labels,
            "finetune": configs.to_dict(config.finetune),
        }
        network = lesson.network.cpu()
        assert isinstance(network, SegmentationNetwork)
        segmenter.save(Segmenter(network=network, classes=lesson.classes, card=card), folder)
        learnt = [self.store.rows[row] for row in (*part.train, *part.held_out)]
        leakage.record(learnt, folder, task=TASK, start=self.weights, head=config.finetune.frozen)
        result = {
            **card,
            "held_out_dice": fitted.best_score,
            "seconds": round(seconds + time.monotonic() - started, 1),
            "rows": [{**vars(row), "scores": asdict(row.scores)} for row in rows],
            "identity": lesson.identity,
        }
        files.write_json(folder / RESULT, result)
        return result

    def _test(self, part: Part, lesson: SegmentLesson) -> list[Row]:
        """Scores of the test cases; their label maps go to `predictions/`, on the scans' own voxels."""
        rows: list[Row] = []
        for done, row in enumerate(part.test, 1):
            case, likely = str(self.store.rows[row]["case_id"]), lesson.likely(row)
            write_array(self._on_store(part.number, case), likely.argmax(axis=0).astype(np.uint8))
            found = judging.on_scan(likely, self.store, row, lesson.classes)
            path = place(self, part) / "predictions" / f"{case}.nii.gz"
            segment.write_nifti(lesson.classes.label_map(found.numbers), found.grid.affine, path)
            rows += found.rows
            if self.progress:
                self.progress(done, len(part.test), f"tested {case}")
        return rows

    def _on_store(self, fold: int, case: str) -> Path:
        return self.folder / f"fold-{fold}" / ON_STORE / f"{case}.npy"

    def summarise(self, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """The study over its finished folds: `cases.csv`, `result.json`, `cases.png`."""
        rows = [row for fold in sorted(done) for row in _rows(done[fold])]
        config = self.config
        found = {
            **segmentation_scores.summary(rows, group_by=config.protocol.group_by, seed=config.finetune.seed),
            "made_by": MADE_BY,
            "protocol": config.protocol.words,
            "folds_finished": sorted(done),
            "folds": len(self.parts),
            "fraction": config.protocol.fraction,
            "source": sorted({result["source"] for result in done.values()}),
            "left_out": self.plan.left_out,
            "pretraining_overlap": leakage.report(
                leakage.seen(self.store.rows, self.weights), dict.fromkeys(row.case_id for row in rows)
            ),
            "best_steps": [done[number]["best_step"] for number in sorted(done)],
            "settings": configs.to_dict(config),
        }
        segmentation_scores.write(rows, found, self.folder)
        scenes = [self._scene(case, rows, done) for case in segmentation_scores.shown(rows)]
        if scenes:
            title = "test cases with the lowest, the middle and the highest Dice"
            files.write_bytes(self.folder / "cases.png", figure.png(scenes, title, self.plan.classes.names))
        return found

    def _scene(self, case: str, rows: Sequence[Row], done: dict[int, dict[str, Any]]) -> figure.Scene:
        fold = next(number for number, result in done.items() if case in result["identity"]["test"])
        row = next(number for number, said in enumerate(self.store.rows) if said["case_id"] == case)
        side = float(self.store.settings["spacing_mm"])
        dice = segmentation_scores.mean_dice([row for row in rows if row.case_id == case])
        return figure.Scene(
            title=f"{case}: Dice {dice:.3f}",
            hu=self.store.hu(row),
            reference=judging.reference(self.store, row, self.plan.classes),
            predicted=np.load(self._on_store(fold, case)),
            spacing_mm=(side, side, side),
        )
