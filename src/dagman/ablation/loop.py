"""The loop of an ablation: train what is missing, score it, write the comparison, go on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from dagman import config as configs
from dagman.ablation.axes import members_of
from dagman.ablation.comparison import Comparison
from dagman.ablation.scores import Organs
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.train import cost, engine
from dagman.train.classify import Tell
from dagman.train.job import Listener, fitted, split_rows
from dagman.train.pretrain import pretrain
from dagman.train.settings import PretrainConfig
from dagman.types import Scan

CONCERNS_ALL = ("DEVICE", "DISK", "LOCKED", "NODATA", "PROCESS", "READER")
"""Errors that would meet every member, or tell of another process at work: they end the call."""
_PATIENCE = timedelta(days=7)
MEMORY_ADVICE = "free memory, then run the same command again"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What `ablate` wrote and how far it came."""

    table: Path
    """One line a run."""
    summary: Path
    """One line a variant and measure."""
    picture: Path
    clusters: Path
    """Maps of crops of organs; there where they were asked for."""
    complete: bool
    """False where a stop was asked for; the same call continues."""
    failed: int
    """Runs of this call that failed, and the maps on the scan."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """What is left to train of a member."""

    name: str
    finished: int
    """Seeds whose run is finished and scored."""
    runs: int
    """That are left."""
    run_seconds: float
    """That one of them takes, without examinations, probes, fine-tuning and scores; 0 where none is left."""


def left(
    axis: str,
    base: PretrainConfig,
    store: PreparedStore,
    folder: Path,
    *,
    seeds: Sequence[int],
    device: Literal["cpu", "cuda"] | None = None,
    devices: int = 1,
    labelled: PreparedStore | None = None,
    finetune: int | None = None,
    organs: Organs | None = None,
    scan: Scan | None = None,
    settings: Mapping[str, str] | None = None,
) -> list[Left]:
    """What `ablate` would train and how long that takes, measured on noise; nothing is written.

    Args:
        axis: As for `ablate`, and so are the others.
        base: The recipe that is taken apart.
        store: Volumes to train on.
        folder: Of the comparison.
        seeds: Each member is trained once for each.
        device: Where to train.
        devices: Processes that share a step.
        labelled: Cases for a linear probe.
        finetune: Steps of fine-tuning on them.
        organs: To be laid out.
        scan: To be looked at.
        settings: What the base was given beside its recipe.

    Raises:
        DagmanError: As `ablate` before anything is trained.
    """
    base = fitted(base, store)
    members = {name: fitted(member, store) for name, member in members_of(axis, base, settings).items()}
    comparison = Comparison(axis=axis, base=base, store=store, folder=folder, devices=devices, members=members)
    comparison.check(labelled, finetune, organs, scan)
    num_volumes, found = len(split_rows(store)[0]), []
    for name, member in members.items():
        finished, seconds = sum(comparison.scored(comparison.run(name, seed)) for seed in seeds), 0.0
        if finished < len(seeds):
            pair = cost.measure(cost.built(member, device or _default_device()), member)
            seconds = cost.step_seconds(member, pair) * member.optimisation.total_steps(num_volumes, devices)
        found.append(Left(name=name, finished=finished, runs=len(seeds) - finished, run_seconds=seconds))
    return found


def ablate(
    axis: str,
    base: PretrainConfig,
    store: PreparedStore,
    folder: Path,
    *,
    seeds: Sequence[int],
    device: Literal["cpu", "cuda"] | None = None,
    devices: int = 1,
    workers: int = 0,
    labelled: PreparedStore | None = None,
    finetune: int | None = None,
    organs: Organs | None = None,
    scan: Scan | None = None,
    settings: Mapping[str, str] | None = None,
    listener: Callable[[str], Listener],
    progress: Tell | None = None,
    say: Callable[[str], None],
) -> Outputs:
    """Train what is missing of a family, score every run, and write one comparison after each.

    The comparison holds every run of the axis in the folder, whatever this call asks for.

    Args:
        axis: A name of `AXES`.
        base: The DAGMaN recipe that is taken apart, with its length.
        store: Volumes to train on.
        folder: Of the comparison; the runs are in `folder/runs`, shared by all axes.
        seeds: Each member is trained once for each.
        device: Where to train.
        devices: Processes that share a step, as for `pretrain`.
        workers: Processes that read crops ahead for each device.
        labelled: Cases with labels of two classes for a linear probe; without, those of the last call that had some.
        finetune: Steps for which all layers of each run, and of its encoder untrained, learn from the labelled cases in
            each of the probe's folds; without, nothing does, and what is known of the last call's is shown.
        organs: What each run lays out beside; without, nothing is, and what is known of the last call's is shown.
        scan: A CT on which it is shown, at the end, where each variant looks.
        settings: What the base was given beside its recipe, as for `members_of`.
        listener: Makes the listener of a run from its name.
        progress: Hears of each step of fine-tuning.
        say: Hears what is done.

    Raises:
        DagmanError: Before anything is trained, as `members_of`, `Comparison.check` and `ct.read.read`. Later those of
            `CONCERNS_ALL`; any other error of a member becomes its row, and one of the maps on the scan is said.

    Reference:
        Tables 1 and 2, figures 4, 6, 8 and 9.
    """
    base = fitted(base, store)
    members = {name: fitted(member, store) for name, member in members_of(axis, base, settings).items()}
    comparison = Comparison(axis=axis, base=base, store=store, folder=folder, devices=devices, members=members)
    comparison.begin(labelled, finetune, organs, scan)
    planned = [(name, seed) for seed in seeds for name in members]
    where: dict[str, Any] = {"device": device, "devices": devices, "workers": workers}
    tuning: dict[str, Any] = {"device": device, "workers": workers, "progress": progress, "say": say}
    complete, failed = True, 0
    for number, (name, seed) in enumerate(planned, 1):
        run = comparison.run(name, seed)
        trained = " (trained and measured before)" * comparison.scored(run)
        say(f"[{number}/{len(planned)}] {name}, seed {seed}: {run}{trained}")
        ended = True
        try:
            if not comparison.scored(run):
                config = configs.override(members[name], {"optimisation.seed": seed})
                result = pretrain(config, store, run, **where, listeners=[listener(name)])
                complete, ended = not result.stop_asked, result.status != "stopped"
            if ended and _first_process():
                with engine.memory_guard(MEMORY_ADVICE):
                    comparison.score(name, run, labelled, organs, device=device or _default_device(), say=say)
                    complete = complete and comparison.finetune(name, run, labelled, finetune, **tuning)
        except DagmanError as error:
            if error.code in CONCERNS_ALL or (devices > 1 and error.code != "UNHEALTHY"):
                raise  # with several processes, the others may not have met it, and wait
            failed += 1
            complete = complete and not error.stop_asked
            say(str(error))
            if _first_process():
                comparison.note_failure(run, error)
        complete = _agreed(complete=complete)
        if _first_process():
            comparison.write(planned)
        if not complete:
            break
    if scan and complete and _first_process():
        failed += not _looked(comparison, scan, device or _default_device(), say)
        comparison.write(planned)  # whose heading says what is missing
    return Outputs(
        table=comparison.table,
        summary=comparison.summary,
        picture=comparison.picture,
        clusters=comparison.clusters,
        complete=complete,
        failed=failed,
    )


def _looked(comparison: Comparison, scan: Scan, device: str, say: Callable[[str], None]) -> bool:
    """Draw the maps on a scan; a failure is said, and takes nothing from what was compared."""
    try:
        with engine.memory_guard(MEMORY_ADVICE):
            comparison.look(scan, device, say)
    except DagmanError as error:
        say(str(error))
        return False
    return True


def _first_process() -> bool:
    """Whether this process scores and writes: with several devices the whole call runs once on each."""
    together = torch.distributed
    return not (together.is_available() and together.is_initialized()) or together.get_rank() == 0


def _agreed(*, complete: bool) -> bool:
    """What the first process says, which may fine-tune for hours, on all."""
    together = torch.distributed
    if not (together.is_available() and together.is_initialized()):
        return complete
    waiting = together.new_group(timeout=_PATIENCE, backend="gloo")  # the usual groups give up after minutes
    said = [complete]
    together.broadcast_object_list(said, src=0, group=waiting)
    together.destroy_process_group(waiting)
    return said[0]


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
