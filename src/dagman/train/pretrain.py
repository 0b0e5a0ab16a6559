"""The pretraining loop: prepared volumes in, a run folder with the pretrained encoder out."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dagman import files
from dagman.ct.datasets import Pairs, ViewsDataset, collate, show
from dagman.ct.store import PreparedStore, refuse_inside
from dagman.errors import DagmanError, ExitCode, duration
from dagman.pretext.codistill import Outcome
from dagman.pretext.examination import TOGETHER, examine
from dagman.pretext.method import check_fit
from dagman.randomness import torch_seed
from dagman.run import Run
from dagman.tasks import watching
from dagman.train import checkpoints, cost, engine, health
from dagman.train.job import (
    Job,
    Listener,
    batches,
    compile_rest,
    describe,
    draw,
    draw_crops,
    fitted,
    note_labelled,
    prepare,
    resume,
    save,
)
from dagman.train.record import Recorder
from dagman.train.settings import OptimisationConfig, PretrainConfig, Rates
from dagman.types import Preparation, Views

__all__ = ["Listener", "OptimisationConfig", "PretrainConfig", "Result", "pretrain"]

MOST_SKIPPED_IN_A_ROW = 5
DRAW_SECONDS = 30
"""Between two drawings of the run, but for the last."""
PICTURED = 4
"""Crops of `pictures/`."""
EXAMINED = 64
"""Crops of an examination."""
WIDE, TOO_FEW = 0.7, "so few cases tell next to nothing"
"""From where to where a probe's interval reaches when it is said so."""
_MEMORY_ADVICE = (
    "lower optimisation.batch_size and raise optimisation.accumulate by the same factor, then lower data.crop, "
    "and start a new run"
)

Status = Literal["finished", "stopped", "complete"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a call of `pretrain` ended."""

    status: Status
    """`complete`: there was nothing left to do. `stopped`: the same call continues."""
    step: int
    """Optimizer steps done."""
    total_steps: int
    folder: Path
    stop_asked: bool = False
    """Whoever has more runs to do stops: a stop was asked for, in time for this run or too late to cut it short."""
    collapsed: bool = False
    """The run came to its end with features that are the same of everything."""


def pretrain(
    config: PretrainConfig,
    store: PreparedStore,
    folder: Path | str,
    *,
    devices: int = 1,
    device: Literal["cpu", "cuda"] | None = None,
    workers: int = 0,
    checkpoint_every: int = 100,
    keep: int = 2,
    listeners: Sequence[Listener] = (),
    labelled: PreparedStore | None = None,
    compiled: bool = False,
) -> Result:
    """Pretrain an encoder, or go on where the same call was interrupted, bit for bit.

    Args:
        config: Settings of the run; they are written to the folder and may not change when it goes on.
        store: Prepared volumes. Those whose `split` is `validation` or `test` are not trained on.
        folder: The run folder.
        devices: Processes that share a step.
        device: Where to compute; without it the GPU where there is one.
        workers: Processes that read crops ahead for each device.
        checkpoint_every: Steps between two checkpoints, which is also when validation cases are looked at.
        keep: Checkpoints to keep.
        listeners: Told of each row and message, in the first process.
        labelled: Cases with labels of two classes, on which all features of the teacher are probed at each
            examination.
        compiled: Compile what no kernel of ours covers, on a GPU: a minute at the start, faster steps after it.

    Raises:
        DagmanError: `E-CONFIG` for a store of CTs and grey cubes; `E-OUTPUT`, `E-RESUME` or `E-CHECKPOINT` (exit code
            4), `E-NODATA` (5), `E-DISK`, `E-MEMORY` or `E-PROCESS` (6), `E-UNHEALTHY` (7), `E-READER` (75).

    Reference:
        DAGMaN section 3 and figure 1.
    """
    folder = Path(folder)
    refuse_inside(folder)
    config = fitted(config, store)
    check_fit(config.encoder, config.method)
    if labelled is not None:
        watching.check(labelled, shown(config, store))
    fabric = engine.fabric(devices, config.optimisation.precision, device)
    lock = files.folder_lock(folder) if fabric.is_global_zero else contextlib.nullcontext()
    stopping = engine.StopRequest(aloud=fabric.is_global_zero)
    with (
        lock,
        stopping as stop,
        engine.company_guard(),
        engine.memory_guard(_MEMORY_ADVICE),
        engine.flushed_denormals(),
    ):
        job = prepare(config, store, Run(folder), fabric, listeners=listeners, keep=keep)
        start = resume(job)
        if start == job.total:
            job.say(f"already complete: {start} of {job.total} steps")
            _agree(job, stop)
            return _result(job, "complete", start, stop, _ringing(job))
        if fabric.is_global_zero:
            pair = cost.measure(job.module, config)
            time_line = cost.time_line(config, pair, job.total - start, len(job.train_rows), job.devices)
            job.say(f"{describe(job)}; {time_line}")
            if labelled is not None:
                every = config.optimisation.examine_every
                job.say(f"{len(labelled)} cases of {labelled.folder} are probed at the first step and every {every}")
            note_labelled(job, labelled, start)
        compile_rest(job, wanted=compiled)  # what is measured is of other sizes than the steps
        done = _until_stopped(job, start, stop, labelled, workers=workers, checkpoint_every=checkpoint_every)
        if done < job.total:
            job.say(f"stopped after {done} of {job.total} steps; the same command continues")
            return _result(job, "stopped", done, stop, set())
        ringing = _ringing(job)
        rings = (
            f"; still wrong at the end: {', '.join(sorted(ringing))} (the ALARM lines of log.txt say what to change)"
        )
        job.say(f"finished {job.total} steps" + rings * bool(ringing))
        return _result(job, "finished", done, stop, ringing)


def shown(config: PretrainConfig, store: PreparedStore) -> Preparation:
    """What cases that watch the run must be prepared like."""
    return Preparation(spacing_mm=float(store.settings["spacing_mm"]), crop=config.data.crop)


def _ringing(job: Job) -> set[str]:
    """Alarms that ring at the end of the run."""
    return health.ringing(job.run.metrics(), job.total)


def _result(job: Job, status: Status, done: int, stop: engine.StopRequest, ringing: set[str]) -> Result:
    return Result(
        status=status,
        step=done,
        total_steps=job.total,
        folder=job.run.folder,
        stop_asked=stop.agreed,
        collapsed=health.COLLAPSED in ringing,
    )


def _loop(
    job: Job,
    start: int,
    stop: engine.StopRequest,
    labelled: PreparedStore | None,
    *,
    workers: int,
    checkpoint_every: int,
) -> int:
    """The steps from `start` on; the number of steps done, fewer than all where a stop was asked for."""
    with Recorder(job, start) as recorder:
        source = batches(job, start, workers)
        for step in range(start, job.total):
            row = _step(job, step, source, stop)
            done, due = step + 1, (step + 1) % checkpoint_every == 0 or step + 1 == job.total
            if due and job.validation_rows:
                row["validation_amip"] = _validate(job, step)
            looked = done % job.config.optimisation.examine_every == 0 or done in (1, job.total)
            if looked and job.fabric.is_global_zero:
                row |= _examine(job, step) | ({} if labelled is None else _probe(job, step, labelled))
            if due or looked:  # which takes long: a stop that was asked for meanwhile needs no further step
                _agree(job, stop)
            recorder.add(row, durable=due or stop.agreed or job.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW)
            if job.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
                if job.fabric.is_global_zero:
                    draw(job)
                _agree(job, stop)
                raise _unhealthy(job, step)
            if due or stop.agreed:
                _checkpoint(job, done, last=stop.agreed or done == job.total)
            if due:
                _agree(job, stop)
            if stop.agreed:
                return done
    return job.total


def _until_stopped(job: Job, start: int, stop: engine.StopRequest, *how: Any, **where: Any) -> int:
    """As `_loop`; a signal that reached the processes that read too, and ended them, is a stop like any other."""
    try:
        return _loop(job, start, stop, *how, **where)
    except DagmanError as error:
        if error.code != "READER" or not stop.wanted:
            raise
        stop.agreed = True
        return checkpoints.last_step(job.run.checkpoints)


def _step(job: Job, step: int, source: Iterator[Pairs], stop: engine.StopRequest) -> dict[str, Any]:
    """One optimizer step: look at the views, check what comes out, learn from it; the row of the metrics."""
    began, waited = time.perf_counter(), 0.0
    optimisation, now = job.config.optimisation, job.rates(step)
    engine.set_rates(job.optimizer, now.learning_rate, now.weight_decay)
    outcomes, seen = [], []
    for micro in range(optimisation.accumulate):
        asked = time.perf_counter()
        pairs = _next(job, source, step)
        waited += time.perf_counter() - asked
        seen.append(pairs.rows.clone())  # the next batch may be written over this one
        outcomes.append(_look(job, show(pairs, job.config.data), now, (step, micro)))
    norm = engine.clip(job.optimizer, optimisation.gradient_clip)
    if now.last_layers_frozen:
        job.module.freeze_last_layers()
    values = _measure(job, outcomes, norm, stop)
    finite = engine.all_finite([values["total"], values["grad_norm"], values["means"]])
    if finite:
        job.optimizer.step()
        job.module.update_teacher(now.momentum)
        job.module.move_centers(*[outcome.means for outcome in outcomes])
    job.optimizer.zero_grad(set_to_none=True)
    _count_skipped(job, step, seen, values, finite)
    del values["means"]
    seconds = time.perf_counter() - began
    return {
        "step": step + 1,
        **{name: value if engine.all_finite([value]) else None for name, value in values.items()},
        **{name: value for name, value in vars(now).items() if name not in ("attended", "last_layers_frozen")},
        "skipped": job.skipped,
        "skipped_in_a_row": job.skipped_in_a_row,
        "seconds": seconds,
        "data_wait_seconds": waited,
        "images_per_second": 2 * optimisation.volumes_per_step(job.devices) / seconds,
    }


def _look(job: Job, views: Views, now: Rates, key: tuple[int, int]) -> Outcome:
    """Forward and backward for one micro-batch. All that is random is keyed by step, micro-batch and rank."""
    seed, accumulate = job.config.optimisation.seed, job.config.optimisation.accumulate
    torch.manual_seed(torch_seed(seed, "drop-path", *key, job.fabric.global_rank))
    draws = engine.torch_generator(seed, "hiding", *key, job.fabric.global_rank)
    with job.fabric.no_backward_sync(job.model, enabled=key[1] < accumulate - 1):
        outcome: Outcome = job.model(views, now.knobs, draws)
        job.fabric.backward(outcome.losses.total / accumulate)
    return outcome


@torch.no_grad()
def _measure(job: Job, outcomes: list[Outcome], norm: Tensor, stop: engine.StopRequest) -> dict[str, float]:
    """All scalars of a step in one transfer to the host, the same on every rank; a stop asked of one is asked of all.

    `means` is finite only if all teacher means are: what the centers may move to.
    """
    weights, device = job.config.method.losses, job.fabric.device
    terms = ["total", *(name for name in ("amip", "ampd", "aitd", "gitd") if getattr(weights, name))]
    values = {
        name: torch.stack([getattr(outcome.losses, name).detach().float() for outcome in outcomes]).mean()
        for name in terms
    } | {
        name: torch.stack([outcome.diagnostics[name].float() for outcome in outcomes]).nanmean()
        for name in outcomes[0].diagnostics
    }
    means = [mean.sum() for outcome in outcomes for mean in outcome.means.values()]
    values["grad_norm"] = norm.float()
    values["means"] = torch.stack([torch.zeros((), device=device), *means]).sum()
    values["stop"] = torch.tensor(float(stop.wanted), device=device)
    stacked = engine.mean_over_ranks(job.fabric, torch.stack(list(values.values())))
    found = dict(zip(values, stacked.tolist(), strict=True))
    stop.agreed = found.pop("stop") > 0
    return found


def _agree(job: Job, stop: engine.StopRequest) -> None:
    """A stop asked of one process is asked of all."""
    asked = torch.tensor(float(stop.wanted), device=job.fabric.device)
    stop.agreed = engine.mean_over_ranks(job.fabric, asked).item() > 0


def _count_skipped(job: Job, step: int, seen: list[Tensor], values: Mapping[str, float], finite: bool) -> None:
    """Note a step that was not taken."""
    if finite:
        job.skipped_in_a_row = 0
        return
    job.skipped += 1
    job.skipped_in_a_row += 1
    cases = ", ".join(str(job.store.rows[row]["case_id"]) for rows in seen for row in rows.tolist())
    bad = ", ".join([f"{name} {value}" for name, value in values.items() if not engine.all_finite([value])][:4])
    job.say(f"step {step + 1} skipped, not finite: {bad}; volumes {cases}")


def _unhealthy(job: Job, step: int) -> DagmanError:
    return DagmanError(
        "UNHEALTHY",
        job.run.folder,
        f"{job.skipped_in_a_row} steps in a row up to step {step + 1} gave values that are not finite",
        "look at the volumes named in log.txt, or start a new run with a lower optimisation.learning_rate; the "
        "last checkpoint is as it was",
        exit_code=ExitCode.UNHEALTHY,
    )


def _next(job: Job, source: Iterator[Pairs], step: int) -> Pairs:
    """The next batch; what a reader stumbles over ends the run cleanly, with a checkpoint of the steps done."""
    try:
        return next(source)
    except DagmanError:
        job.optimizer.zero_grad(set_to_none=True)
        if step and job.fabric.is_global_zero:
            save(job, step)
        raise


@torch.no_grad()
def _validate(job: Job, step: int) -> float | None:
    """Mean AMIP of the student on the validation cases: always the same views, hidden by the attention of the day."""
    seed, batch = job.config.optimisation.seed, job.config.optimisation.batch_size
    data = replace(job.config.data, flip_ratio=0.0, jitter_ratio=0.0, pairs_per_volume=1)
    dataset = ViewsDataset(job.store, data, seed, job.validation_rows)
    knobs, total = job.rates(step).knobs, 0.0
    job.module.eval()
    for first in range(0, len(dataset), batch):
        samples = [dataset[index] for index in range(first, min(first + batch, len(dataset)))]
        views = show(job.fabric.to_device(collate(samples)), data)
        with job.fabric.autocast():
            outcome = job.module(views, knobs, engine.torch_generator(seed, "validation", first))
        total += outcome.losses.amip.item() * len(samples)
    job.module.train()
    mean = total / len(dataset)
    return mean if engine.all_finite([mean]) else None


@torch.no_grad()
def _examine(job: Job, step: int) -> dict[str, float | None]:
    """What the teacher knows about crops of the training cases: always the same crops, of as many cases as can be.

    None stands for what is not finite, of a teacher that has diverged.
    """
    seed, batch = job.config.optimisation.seed, 2 * job.config.optimisation.batch_size

    def crops(first: int, last: int, a_volume: int = 1) -> Tensor:
        data = replace(job.config.data, flip_ratio=0.0, jitter_ratio=0.0, pairs_per_volume=a_volume)
        dataset = ViewsDataset(job.store, data, torch_seed(seed, "examination"), job.train_rows)
        pairs = collate([dataset[index] for index in range(first, last)])
        return show(job.fabric.to_device(pairs), data).u

    def cut(size: int, a_volume: int = 1) -> Iterator[Tensor]:
        return (crops(first, min(first + size, EXAMINED), a_volume) for first in range(0, EXAMINED, size))

    draw_crops(job, step, crops(0, PICTURED))
    with job.fabric.autocast():
        together = cut(TOGETHER * max(1, batch // TOGETHER), TOGETHER)
        found = examine(job.module, cut(batch), job.rates(step).knobs, together)
    return {name: value if engine.all_finite([value]) else None for name, value in found.items()}


def _checkpoint(job: Job, done: int, *, last: bool) -> None:
    """Write weights and state, and now and then the picture; the other ranks wait."""
    if job.fabric.is_global_zero:
        save(job, done)
        if last or time.monotonic() - job.drawn > DRAW_SECONDS:
            draw(job)
            job.drawn = time.monotonic()
    job.fabric.barrier()


def _probe(job: Job, step: int, labelled: PreparedStore) -> dict[str, float | None]:
    """AUC of a linear probe on all features of the teacher about labelled cases, with its interval."""
    encoder, began = job.module.teacher.encoder, time.perf_counter()
    auc = watching.probe(encoder, labelled, which=watching.features_of(encoder), device=job.fabric.device)
    took = f"{duration(time.perf_counter() - began)} for {len(labelled)} cases"
    wide = auc.low is not None and auc.high is not None and auc.high - auc.low > WIDE
    job.say(f"step {step + 1}: the probe's AUC is {auc}, after {took}" + f"; {TOO_FEW}" * wide)
    return {"probe_auc": auc.value, "probe_low": auc.low, "probe_high": auc.high}
