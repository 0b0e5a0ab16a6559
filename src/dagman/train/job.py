"""What stands before the first step and is written after the last: data, network, checkpoints, weights."""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from dagman import config as configs
from dagman import files
from dagman.ct.datasets import Pairs, SampleOrder, SharedCollate, ViewsDataset, mean_intensity
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode, count
from dagman.nets import gpu, kernel, launches
from dagman.nets.encoder import checkpoint_blocks
from dagman.nets.weights import save_encoder
from dagman.pretext import hiding
from dagman.pretext.codistill import CoDistillation
from dagman.randomness import torch_seed
from dagman.run import Run, package_version
from dagman.tasks import leakage, watching
from dagman.train import checkpoints, cost, engine
from dagman.train.settings import PretrainConfig, Rates, rates
from dagman.types import Preparation

_HELD_OUT = ("validation", "test")
_ENCODERS = {"student": "student.safetensors", "teacher": "model.safetensors"}
_LABELLED = "labelled.json"
"""Which cases are probed on the way."""


@runtime_checkable
class Listener(Protocol):
    """Is told how a run goes on: a progress bar, a picture."""

    def on_start(self, step: int, total_steps: int) -> None:
        """The run goes on after `step` steps."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """A row was added to the metrics."""

    def on_message(self, text: str) -> None:
        """A line was added to the log."""


@dataclass(kw_only=True, eq=False)
class Job:
    """What the steps of a run share: settings, data, network, optimizer, and where they run."""

    config: PretrainConfig
    store: PreparedStore
    run: Run
    fabric: Fabric
    listeners: Sequence[Listener]
    train_rows: list[int]
    validation_rows: list[int]
    keep: int
    devices: int
    total: int
    module: CoDistillation = field(init=False)
    model: Any = field(init=False)
    """`module` as Fabric wraps it."""
    optimizer: torch.optim.Optimizer = field(init=False)
    skipped_in_a_row: int = 0
    skipped: int = 0
    drawn: float = field(default_factory=time.monotonic)
    """When the picture of the run was last drawn."""

    @property
    def identity(self) -> str:
        """Hash of all that decides what is computed; checkpoints carry it."""
        parts = [configs.deciding(self.config), self.store.store_id, self.train_rows, self.devices]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def rates(self, step: int) -> Rates:
        """The schedules at one step."""
        per_epoch = self.config.optimisation.steps_per_epoch(len(self.train_rows), self.devices)
        return rates(self.config, step, self.total, per_epoch)

    def say(self, text: str) -> None:
        """Put a line into the log and tell the listeners."""
        if self.fabric.is_global_zero:
            self.run.log(text)
            for listener in self.listeners:
                listener.on_message(text)


def split_rows(store: PreparedStore) -> tuple[list[int], list[int]]:
    """Rows to train on (all but those whose split is `validation` or `test`), and rows to validate on."""
    splits = [row.get("split") for row in store.rows]
    train = [index for index, split in enumerate(splits) if split not in _HELD_OUT]
    return train, [index for index, split in enumerate(splits) if split == "validation"]


def used(store: PreparedStore) -> dict[str, Any]:
    """What a run's folder keeps of its data: the store's identity, and volumes to train and to validate on."""
    train, validation = split_rows(store)
    return {"store": store.store_id, "volumes": len(train), "validation": len(validation)}


def fitted(config: PretrainConfig, store: PreparedStore) -> PretrainConfig:
    """The settings for a store: grey cubes are shown in their own window, as they are to every use of the encoder.

    Raises:
        DagmanError: `E-CONFIG` as `PreparedStore.window_hu`.
    """
    return replace(config, data=replace(config.data, window_hu=store.window_hu or config.data.window_hu))


def window_line(store: PreparedStore) -> str:
    """That a store decides the window, to be added to what is said of a run; empty where it does not."""
    if store.window_hu is None:
        return ""
    low, high = store.window_hu
    return f"; grey cubes, shown from {low:g} to {high:g} HU, which gives them back, whatever data.window_hu is"


def planned(config: PretrainConfig, store: PreparedStore, devices: int) -> tuple[list[int], list[int], int]:
    """Rows to train and to validate on, and the number of steps.

    Raises:
        DagmanError: `E-NODATA` (exit code 5) where all cases are held out; `E-CONFIG` where hiding would never start.
    """
    train, validation = split_rows(store)
    if not train:
        held_out = f" ({len(store)} are held out)" if len(store) else ""
        advice = "prepare scans whose split is neither validation nor test" if held_out else "prepare at least one scan"
        problem = f"holds no volume to train on{held_out}"
        raise DagmanError("NODATA", store.folder, problem, advice, exit_code=ExitCode.NOTHING_USABLE)
    total = config.optimisation.total_steps(len(train), devices)
    config.check_length(total)
    return train, validation, total


def prepare(
    config: PretrainConfig, store: PreparedStore, run: Run, fabric: Fabric, *, listeners: Sequence[Listener], keep: int
) -> Job:
    """Everything that stands before the first step; the folder's settings are written, or compared."""
    train, validation, total = planned(config, store, fabric.world_size)
    job = Job(
        config=config,
        store=store,
        run=run,
        fabric=fabric,
        listeners=listeners,
        train_rows=train,
        validation_rows=validation if config.method.losses.amip else [],
        keep=keep,
        devices=fabric.world_size,
        total=total,
    )
    if fabric.is_global_zero:
        compiled = kernel.describe() if fabric.device.type == "cpu" else None
        run.start(config, used(store), fabric.world_size, compiled)
        leakage.record([store.rows[row] for row in train], run.folder)
    fabric.barrier()
    seed = config.optimisation.seed
    torch.manual_seed(torch_seed(seed, "weights"))
    mean = mean_intensity(store, config.data, seed, rows=train)
    module = CoDistillation(config.encoder, config.method, mean_intensity=mean, crop=config.data.crop)
    for encoder in (module.teacher.encoder, module.student.encoder):
        encoder.preparation = Preparation(
            spacing_mm=float(store.settings["spacing_mm"]),
            resampling=store.settings["resampling"],
            window_hu=config.data.window_hu,
            crop=config.data.crop,
        )
    if config.optimisation.checkpointing:
        checkpoint_blocks(module.student.encoder)
    job.module = module.train()
    job.model, job.optimizer = fabric.setup(job.module, engine.adamw(module))
    return job


def compile_rest(job: Job, *, wanted: bool) -> None:
    """Where it is wanted, compile what can be, and say how much that is."""
    if not wanted:
        return
    chosen = launches.compile_rest(job.module)
    why_not = gpu.why_not(job.fabric.device)
    job.say(f"{len(chosen)} modules compile when they first run" if chosen else f"nothing is compiled: {why_not}")


def describe(job: Job) -> str:
    """Data, device and size of a run in one line."""
    optimisation = job.config.optimisation
    slow = " (this processor has no instructions for it: `--optimisation.precision float32` is faster)"
    precision = optimisation.precision + slow * engine.slow_bf16(job.fabric.device, optimisation.precision)
    return (
        f"{count(len(job.train_rows), 'volume', 'volumes')} to train on, {len(job.validation_rows)} for validation; "
        f"{job.devices} x {job.fabric.device.type}, {precision}, "
        f"{optimisation.volumes_per_step(job.devices)} pairs a step, {job.total} steps; {cost.size_line(job.module)}"
        + (f"; {kernel.describe()}" if job.fabric.device.type == "cpu" else "")
        + window_line(job.store)
    )


def resume(job: Job) -> int:
    """Put the newest whole checkpoint back, and the log of metrics to where it was; the number of steps done."""
    found = checkpoints.newest(job.run.checkpoints, job.identity)
    start = found.step if found else 0
    rows = job.run.metrics()
    if found:
        checkpoints.restore(found.tensors, job.module, job.optimizer)
        for line in found.damaged:
            job.say(f"checkpoint {line}")
        if start < job.total:
            again = len(rows) - start
            job.say(f"goes on after step {start}" + f"; {again} later steps are done again" * (again > 0))
    elif rows:
        job.say(f"no checkpoint was finished: {len(rows)} steps are done again from the start")
    if job.fabric.is_global_zero:
        job.run.rewind(start)
    rows = [row for row in rows if row["step"] <= start]  # on every rank, whatever the first has rewound by now
    job.skipped, job.skipped_in_a_row = (
        (rows[-1]["skipped"], rows[-1]["skipped_in_a_row"]) if rows and rows[-1]["step"] == start else (0, 0)
    )
    if start == job.total and job.fabric.is_global_zero:
        _restore_outputs(job)
    job.fabric.barrier()
    return start


def note_labelled(job: Job, labelled: PreparedStore | None, start: int) -> None:
    """Keep which cases are probed, and say where they are no longer the same."""
    kept = job.run.folder / _LABELLED
    before = json.loads(kept.read_text())["identity"] if kept.exists() else None
    now = None if labelled is None else watching.identity(labelled)
    if labelled is None or now == before:
        return
    if before and start:
        job.say(f"the cases that are probed are others than before: probes up to step {start} are not of these")
    files.write_json(kept, {"identity": now, "store": str(labelled.folder), "from_step": start})


def batches(job: Job, start: int, workers: int) -> Iterator[Pairs]:
    """What is left of the run's batches on this rank; each is whole until the next is taken."""
    optimisation, fabric = job.config.optimisation, job.fabric
    dataset = ViewsDataset(job.store, job.config.data, optimisation.seed, job.train_rows)
    per_step = optimisation.volumes_per_step(job.devices)
    order = SampleOrder(start * per_step, job.total * per_step, fabric.global_rank, fabric.world_size)
    collate = SharedCollate(engine.AHEAD)
    return engine.batches(fabric, dataset, order, collate, batch=optimisation.batch_size, workers=workers)


def save(job: Job, done: int) -> None:
    """Encoders before the state: what a kill leaves between is written again when the run goes on."""
    _save_encoders(job, done)
    tensors = checkpoints.state(job.module, job.optimizer)
    checkpoints.save(job.run.checkpoints, done, tensors, job.identity, keep=job.keep)


def _save_encoders(job: Job, done: int) -> None:
    card = {
        "recipe": job.config.recipe,
        "method": configs.to_dict(job.config.method),
        "steps": done,
        "total_steps": job.total,
        "dagman": package_version("dagman"),
    }
    for role, name in _ENCODERS.items():
        encoder = getattr(job.module, role).encoder
        save_encoder(encoder, job.run.weights / name, card | {"role": role})


def _restore_outputs(job: Job) -> None:
    """Write again what a finished run has lost of what it wrote last."""
    if not all((job.run.weights / name).exists() for name in (*_ENCODERS.values(), "config.json")):
        _save_encoders(job, job.total)
    if not job.run.progress_file.exists():
        draw(job)


def draw_crops(job: Job, step: int, images: Tensor) -> None:
    """Picture what the task does to some crops, where matplotlib is installed."""
    try:
        from dagman.figures import sheet
    except ImportError:
        return
    module, grid, side = job.module, job.module.grid, job.module.cell_side
    module.eval()
    draws = engine.torch_generator(job.config.optimisation.seed, "pictures")
    with job.fabric.autocast():
        seen = module.look(images, job.rates(step).knobs, draws)
    module.train()

    def on_voxels(cells: Tensor | None) -> Any:
        return [None] * len(images) if cells is None else hiding.repeat(cells.cpu(), grid, side).numpy()

    uniform = None if seen.attention is None else seen.attention.float() * seen.attention.shape[1]
    parts = (images[:, 0].float().cpu().numpy(), *map(on_voxels, (uniform, seen.hidden, seen.dropped)))
    guesses = [None] * len(images) if seen.prediction is None else seen.prediction[:, 0].float().cpu().numpy()
    scenes = [
        sheet.Scene(image, attention, hidden, dropped, None if guess is None else np.where(hidden, guess, image))
        for image, attention, hidden, dropped, guess in zip(*parts, guesses, strict=True)
    ]
    across_mm = images.shape[-1] * float(job.store.settings["spacing_mm"])
    title = f"{job.config.recipe}: {job.run.folder.name}, step {step + 1}, crops of {across_mm:g} mm"
    picture = sheet.png(scenes, title, job.config.method.hidden.sentence)
    files.write_bytes(job.run.pictures / f"step-{step + 1:08d}.png", picture)


def draw(job: Job) -> None:
    """Redraw the picture of the run, where matplotlib is installed."""
    try:
        from dagman.figures import progress
    except ImportError:
        return
    pairs = job.config.optimisation.volumes_per_step(job.devices)
    title = f"{job.config.recipe}: {job.run.folder.name}, {pairs} pairs of crops a step"
    picture = progress.png(job.run.metrics(), title)
    files.write_bytes(job.run.progress_file, picture)
