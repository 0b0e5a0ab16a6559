"""Training with labels: a network, samples, a loss, and a score on cases held out of the training part.

Classification and segmentation are each one `Lesson`; how a lesson is learnt is the same for both.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from dagman import config as configs
from dagman import files
from dagman.ct.datasets import SampleOrder
from dagman.errors import DagmanError, ExitCode
from dagman.nets import encoder as encoders
from dagman.nets.weights import read_tensors
from dagman.randomness import torch_seed
from dagman.run import Run
from dagman.train import checkpoints, engine, schedules
from dagman.types import Precision

MOST_TOLD = 100
"""Characters of a setting that differs; longer ones are named alone."""
BEST = "best-*.safetensors"
SETTINGS = "settings.json"
"""What decides an unfinished part."""
Progress = Callable[[int, int, str], None]
"""Called with the number of finished steps, their total and what came last."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How long and how fast to learn from labels."""

    steps: int = 400
    """Optimizer steps."""
    batch_size: int = 8
    """Crops of a step (paper: 40 for classification)."""
    learning_rate: float = 2e-4
    """At its peak, of the head (paper: 2e-4); falls to 0 along a cosine."""
    layer_decay: float = 0.75
    """Factor on the learning rate from each layer of the encoder to the one before; 1 for none (BEiT's)."""
    warmup_ratio: float = 0.1
    """Share of the run in which the learning rate rises linearly."""
    weight_decay: float = 0.05
    """None on biases, norms, tokens and position tables."""
    gradient_clip: float = 3.0
    """Largest norm of the gradient."""
    frozen: bool = False
    """Leave the encoder as it is."""
    check_every: int = 50
    """Steps between two scores on the cases held out of the training part; the best of them decides the weights."""
    precision: Precision = "float32"
    """`bf16` computes in bfloat16 where that is safe."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field, holds, advice in (
            ("steps", self.steps > 0, "give at least 1"),
            ("batch_size", self.batch_size > 0, "give at least 1"),
            ("learning_rate", self.learning_rate > 0, "give a number above 0 (paper: 2e-4)"),
            ("layer_decay", 0 < self.layer_decay <= 1, "choose a factor above 0, up to 1"),
            ("warmup_ratio", 0 <= self.warmup_ratio <= 1, "choose a share from 0 to 1"),
            ("weight_decay", self.weight_decay >= 0, "give a number of at least 0"),
            ("gradient_clip", self.gradient_clip > 0, "give a number above 0"),
            ("check_every", self.check_every > 0, "give at least 1"),
        ):
            if not holds:
                raise DagmanError("CONFIG", f"finetune.{field}", f"cannot be {getattr(self, field)}", advice)


@runtime_checkable
class Lesson(Protocol):
    """What is to be learnt."""

    network: nn.Module
    """Its `encoder`, if it has one of ours, learns slower than the rest, or not at all."""
    dataset: Dataset[Any]
    """A sample for every global sample number, without end: number n belongs to step n // batch_size."""
    identity: Any
    """JSON values that, with the settings, decide what is computed: cases, labels, weights."""

    def begin(self) -> bool:
        """What is done once before the first step; whether what it left is worth a score of its own."""

    def loss(self, batch: Any) -> Tensor:
        """Loss of a batch, on the network's device."""

    def score(self) -> float | None:
        """Higher is better, on held-out cases of the training part; None where there are none; in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """How a call of `fit` ended."""

    finished: bool
    """Else it was stopped, and the same call continues."""
    step: int
    """Optimizer steps done."""
    best_step: int
    """Whose weights the network now has; the last where nothing was held out."""
    best_score: float | None


def fit(
    lesson: Lesson,
    config: FinetuneConfig,
    folder: Path,
    *,
    device: Literal["cpu", "cuda"] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> Fitted:
    """Learn, or go on where the same call was interrupted, bit for bit; the network ends with its best weights.

    Args:
        lesson: What is to be learnt.
        config: How.
        folder: For `metrics.jsonl`, `checkpoints/` and the best weights so far.
        device: Where to compute; without it the GPU where there is one.
        workers: Processes that read samples ahead.
        progress: Hears of each step.

    Raises:
        DagmanError: `E-UNHEALTHY`, exit code 7, for a loss that is not finite; `E-RESUME` and `E-CHECKPOINT`
            (4); `E-DISK` and `E-MEMORY` (6); `E-READER` (75).
    """
    fabric = engine.fabric(1, config.precision, device)
    advice = "lower the batch size, then the crop"
    run, total = Run(folder), config.steps
    with (
        files.folder_lock(folder),
        engine.StopRequest() as stop,
        engine.memory_guard(advice),
        engine.flushed_denormals(),
    ):
        _claim(folder, lesson, config)
        # A lesson calls its own network: on one device Fabric only moves it.
        _, optimizer = fabric.setup(lesson.network.train(), _optimizer(lesson.network, config))
        course = _Course(lesson, config, run, fabric, optimizer)
        start = course.resume()
        if start == 0 and lesson.begin() and not run.metrics():
            run.add({"step": 0, "score": course.check(0)}, durable=True)
        order = SampleOrder(start * config.batch_size, total * config.batch_size)
        samples = engine.batches(
            fabric, lesson.dataset, order, default_collate, batch=config.batch_size, workers=workers
        )
        for done in range(start + 1, total + 1):
            try:
                row = course.step(done - 1, samples)
            except DagmanError as error:
                if error.code != "READER" or not stop.wanted:
                    raise
                # the signal reached the processes that read as well
                return Fitted(finished=False, step=done - 1, best_step=done - 1, best_score=None)
            checked = done % config.check_every == 0 or done == total
            if checked:
                row["score"] = course.check(done)
            if progress:
                progress(done, total, f"loss {row['loss']:.3f}")
            stopping = stop.wanted  # at the last step too: neither tests nor the next part shall begin
            run.add(row, durable=checked or stopping)
            if checked or stopping:
                course.save(done)
            if stopping:
                return Fitted(finished=False, step=done, best_step=done, best_score=None)
        best_step, best_score = _best(run)
        if best_score is not None:
            lesson.network.load_state_dict(read_tensors(_best_file(folder, best_step))[0])
        lesson.network.eval()
        return Fitted(finished=True, step=total, best_step=best_step, best_score=best_score)


def _claim(folder: Path, lesson: Lesson, config: FinetuneConfig) -> None:
    """Write what decides a training, or compare it with what the folder was begun with."""
    decides = {"identity": lesson.identity, "finetune": configs.to_dict(config)}
    now: dict[str, Any] = json.loads(json.dumps(decides))
    if (folder / SETTINGS).is_file():
        _refuse_other(folder, json.loads((folder / SETTINGS).read_text()), now)
    else:
        files.write_json(folder / SETTINGS, now)


def _optimizer(network: nn.Module, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW in which every layer of the encoder learns slower than the next."""
    encoder = getattr(network, "encoder", None)
    layers = encoders.layers(encoder) if isinstance(encoder, encoders.Encoder) else []
    scales: dict[nn.Parameter, float] = {}
    for depth, parameters in enumerate(layers):
        for parameter in parameters:
            scales[parameter] = config.layer_decay ** (len(layers) - depth)
    if isinstance(encoder, nn.Module):
        encoder.requires_grad_(not config.frozen)
    return engine.adamw(network, scales=scales)


@dataclass(frozen=True, eq=False)
class _Course:
    """What the steps of one training share."""

    lesson: Lesson
    config: FinetuneConfig
    run: Run
    fabric: Any
    optimizer: Any

    @property
    def identity(self) -> str:
        """Hash of all that decides what is computed; checkpoints carry it."""
        parts = [configs.to_dict(self.config), self.lesson.identity]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def resume(self) -> int:
        """Put the newest checkpoint back; the number of steps done."""
        found = checkpoints.newest(self.run.checkpoints, self.identity)
        if found:
            checkpoints.restore(found.tensors, self.lesson.network, self.optimizer)
        start = found.step if found else 0
        self.run.rewind(start)
        return start

    def save(self, done: int) -> None:
        """Write a checkpoint; the one before goes, and then weights that are no longer the best."""
        tensors = checkpoints.state(self.lesson.network, self.optimizer)
        checkpoints.save(self.run.checkpoints, done, tensors, self.identity, keep=1)
        best = _best_file(self.run.folder, _best(self.run)[0])
        for old in self.run.folder.glob(BEST):
            if old != best:
                old.unlink()

    def step(self, step: int, samples: Iterator[Any]) -> dict[str, Any]:
        """One optimizer step; its row of the metrics."""
        began = time.perf_counter()
        config, network = self.config, self.lesson.network
        warmup = round(config.warmup_ratio * config.steps)
        rate = schedules.warmup_cosine(step, config.steps, config.learning_rate, 0.0, warmup)
        engine.set_rates(self.optimizer, rate, config.weight_decay)
        batch = self._next(samples, step)
        waited = time.perf_counter() - began
        torch.manual_seed(torch_seed(config.seed, "finetune", step))
        to_training(network, config)
        with self.fabric.autocast():
            loss = self.lesson.loss(batch)
        self.fabric.backward(loss)
        norm = engine.clip(self.optimizer, config.gradient_clip)
        if not engine.all_finite([loss.item(), norm.item()]):
            raise DagmanError(
                "UNHEALTHY",
                f"{self.run.folder}, step {step + 1}",
                f"loss {loss.item()}, gradient {norm.item()}",
                "start again in a new folder with a lower learning rate",
                exit_code=ExitCode.UNHEALTHY,
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": step + 1,
            "loss": loss.item(),
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "seconds": time.perf_counter() - began,
            "data_wait_seconds": waited,
        }

    def _next(self, samples: Iterator[Any], step: int) -> Any:
        """The next batch; what a reader stumbles over loses no step that is done."""
        try:
            return next(samples)
        except DagmanError:
            if step:
                self.save(step)
            raise

    def check(self, step: int) -> float | None:
        """Score the network as it is; keep its weights where they are the best so far."""
        network = self.lesson.network.eval()
        with torch.inference_mode():
            score = self.lesson.score()
        if score is None or not engine.all_finite([score]):
            return None
        best = _best(self.run)[1]
        if best is None or score > best:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
            files.write_atomic(
                _best_file(self.run.folder, step), lambda path: safetensors.torch.save_file(tensors, path)
            )
        return score


def to_training(network: nn.Module, config: FinetuneConfig) -> None:
    """Put a network in the mode in which it learns: a frozen encoder stays as it is tested, without drop path."""
    network.train()
    if config.frozen and isinstance(network.encoder, nn.Module):
        network.encoder.eval()


def _best(run: Run) -> tuple[int, float | None]:
    """Step and score of the best check so far, the earlier of equals; the last step where there is none."""
    rows = run.metrics()
    scored = [row for row in rows if row.get("score") is not None]
    if not scored:
        return (rows[-1]["step"] if rows else 0), None
    best = max(scored, key=lambda row: row["score"])
    return best["step"], best["score"]


def finished(folder: Path, identity: Any) -> dict[str, Any] | None:
    """The `result.json` of a part that is done; None for one that is not.

    Raises:
        DagmanError: `E-RESUME`, exit code 4, for a part that was learnt with other settings.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    _refuse_other(folder, result["identity"], identity)
    return result


def _refuse_other(folder: Path, before: Any, now: Any) -> None:
    if lines := configs.difference(before, now):
        told = [line for line in lines if len(line) <= MOST_TOLD]
        others = [line.partition(":")[0] for line in lines if len(line) > MOST_TOLD]
        told += [f"and with other {', '.join(others)}"] if others else []
        raise DagmanError(
            "RESUME",
            folder,
            f"was learnt with other settings ({'; '.join(told)})",
            "give the old settings again, or choose another output folder",
            exit_code=ExitCode.REFUSED,
        )


def forget(folder: Path) -> None:
    """Delete what only an unfinished part needs."""
    files.remove_folder(folder / "checkpoints")
    (folder / SETTINGS).unlink(missing_ok=True)
    for weights in folder.glob(BEST):
        weights.unlink()


def _best_file(folder: Path, step: int) -> Path:
    return folder / BEST.replace("*", f"{step:08d}")


def start_of(encoder: encoders.Encoder | None, weights: Path | str | None) -> Path | None:
    """Weights that a training starts from: those the caller names, else those the encoder was loaded from, if any."""
    if weights or encoder is None or encoder.report is None:
        return Path(weights) if weights else None
    return encoder.report.source


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of all tensors of a module."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
