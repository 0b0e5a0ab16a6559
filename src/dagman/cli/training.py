"""The verbs that train: pretrain, and the demo of the whole chain."""

import inspect
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from dagman.cli.watching import Device, Number, Output, Readers, Switch, Watcher, next_step, progress, require, say
from dagman.errors import DagmanError, ExitCode, count

if TYPE_CHECKING:
    from dagman.ablation import Left
    from dagman.ct.store import PreparedStore
    from dagman.train.settings import PretrainConfig
    from dagman.types import Scan

COMMAND_LINE = "--"
"""Before settings in errors."""


def pretrain(
    recipe: str,
    /,
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True)],
    data: Path,
    output: Output,
    steps: int | None = None,
    epochs: int | None = None,
    config: Annotated[Path | None, Parameter(name=["--config", "-c"])] = None,
    seed: int | None = None,
    device: Device | None = None,
    devices: Number = 1,
    workers: Readers = 0,
    checkpoint_every: Number = 100,
    labelled: Path | None = None,
    compiled: Switch = False,
    fresh: Switch = False,
    dry_run: Switch = False,
) -> int:
    """Pretrain an encoder; stopped and started again with the same command, it goes on bit for bit.

    Args:
        recipe: `dagman-tiny` (half an hour on a CPU core), `dagman-swin` (the paper's sizes, GPUs), or another;
            README lists them, and `dagman info RECIPE` says what one is.
        settings: Any setting by its dotted name, such as `--method.losses.ampd 0`; `dagman info RECIPE` lists them.
        data: A prepared store.
        output: The run folder.
        steps: Length of the run in optimizer steps; all schedules scale to it.
        epochs: Length of the run in epochs.
        config: YAML file of settings, overridden by flags.
        seed: Of everything that is drawn.
        device: Where to compute; by default the GPU where there is one.
        devices: Processes that share a step (GPUs of this machine).
        workers: Processes that read crops ahead, for each device.
        checkpoint_every: Steps between two checkpoints.
        labelled: A prepared store with labels of two classes: a linear probe watches the run at each examination
            (`--optimisation.examine-every`, 100 steps).
        compiled: On a GPU, compile what no kernel of ours covers: a minute at the start, faster steps after it.
        fresh: Start anew; an earlier run in the folder is moved aside, not deleted.
        dry_run: Say what would be done and what it would cost, and stop.
    """
    from dagman.ct.store import PreparedStore, refuse_inside
    from dagman.tasks import watching
    from dagman.train import pretrain as training

    seeded = [] if seed is None else ["--optimisation.seed", str(seed)]
    chosen, _ = _chosen(pretrain, recipe, [*settings, *seeded], steps=steps, epochs=epochs, config=config)
    store, watch = PreparedStore(data), PreparedStore(labelled) if labelled else None
    stores = [data, *([labelled] if labelled else [])]
    refuse_inside(output)
    if dry_run:
        if watch is not None:
            watching.check(watch, training.shown(chosen, store))
        if fresh:
            _refuse_moving(output, stores)
        _forecast(chosen, store, output, devices, device, fresh=fresh)
        return ExitCode.OK
    if fresh and output.exists() and _first_started(devices):
        _move_aside(output, stores)
    where: dict[str, Any] = {"devices": devices, "device": device, "workers": workers, "compiled": compiled}
    with progress("Pretraining") as tell:
        shown = [Watcher(tell)]
        result = training.pretrain(
            chosen, store, output, **where, checkpoint_every=checkpoint_every, listeners=shown, labelled=watch
        )
    if result.status == "stopped":
        return _stopped(devices)
    say(f"wrote {output / 'weights'} and {output / 'progress.png'}")
    if result.collapsed:
        raise DagmanError(
            "UNHEALTHY",
            output,
            "ended with features that are the same of everything",
            "do as the ALARM lines of its log.txt say, and start anew with --fresh",
            exit_code=ExitCode.UNHEALTHY,
        )
    next_step("dagman embed --weights", output, "-i", labelled or data, "-o", output / "features.csv", "--which all")
    return ExitCode.OK


def _chosen(
    verb: Callable[..., int],
    recipe: str,
    settings: Sequence[str],
    *,
    steps: int | None,
    epochs: int | None,
    config: Path | None = None,
) -> "tuple[PretrainConfig, dict[str, str]]":
    """A recipe, then a file's settings, then the length and settings of the command line of a verb; and the latter."""
    from dagman import config as configs
    from dagman import recipes
    from dagman.pretext.method import without_effect

    chosen = recipes.get(recipe)
    if config:
        chosen = configs.override(chosen, configs.read_yaml(config))
    chosen = recipes.with_length(chosen, steps, epochs)
    values = _dotted(settings, chosen, verb)
    chosen = configs.override(chosen, values, COMMAND_LINE)
    inert = without_effect(chosen.encoder, chosen.method)
    for name in values:
        if why := inert.get(name.replace("-", "_")):
            raise DagmanError("CONFIG", f"--{name}", f"would change nothing: {why}", "leave it out")
    return chosen, values


def _dotted(tokens: Sequence[str], chosen: "PretrainConfig", verb: Callable[..., int]) -> dict[str, str]:
    """`--name value` and `--name=value` pairs as a dictionary.

    Raises:
        DagmanError: `E-USAGE` for a word that is no flag, or a flag without value; `E-CONFIG` for an unknown flag.
    """
    from dagman import config as configs

    values: dict[str, Any] = {}
    rest = list(tokens)
    options = [one for one in inspect.signature(verb).parameters.values() if one.kind is one.KEYWORD_ONLY]
    flags = [f"--{one.name.replace('_', '-')}" for one in options]
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not name:
            raise DagmanError("USAGE", flag, "is no setting", "write --name value, such as --method.losses.ampd 0")
        if "." not in name and not hasattr(chosen, name.replace("-", "_")):
            raise configs.unknown("CONFIG", f"--{name}", flags)  # a flag of the verb, misspelt
        if not equals:
            if not rest:
                _refuse_unknown(chosen, {**values, name: None})
                raise DagmanError("USAGE", flag, "has no value", f"write {flag} VALUE")
            value = rest.pop(0)
        values[name] = value
    return values


def _refuse_unknown(chosen: "PretrainConfig", values: dict[str, Any]) -> None:
    """A setting without value may be none at all."""
    from dagman import config as configs

    try:
        configs.override(chosen, values, COMMAND_LINE)
    except DagmanError as error:
        if error.problem == configs.UNKNOWN:
            raise


def _refuse_moving(output: Path, stores: Sequence[Path]) -> None:
    """What is needed is not moved away."""
    for store in stores:
        if any(path.is_relative_to(place) for path, place in zip(_places(store), _places(output), strict=True)):
            problem = f"holds the store {store}, which --fresh would move away with the run"
            raise DagmanError("OUTPUT", output, problem, "choose another output folder", exit_code=ExitCode.REFUSED)


def _places(path: Path) -> tuple[Path, Path]:
    """Where a path leads, and where it stands."""
    return path.resolve(), Path(os.path.normpath(path.absolute()))


def _first_started(devices: int) -> bool:
    """Whether this is the first of the processes that share a work, whoever started them."""
    return devices == 1 or all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


def _stopped(devices: int) -> ExitCode:
    """A stop is told by the first process, which Lightning kills where another ends otherwise than well."""
    return ExitCode.STOPPED if _first_started(devices) else ExitCode.OK


def _move_aside(output: Path, stores: Sequence[Path]) -> None:
    """Give an earlier run a name of its own."""
    from dagman.files import folder_lock

    _refuse_moving(output, stores)
    output = output.resolve()
    aside = output.with_name(f"{output.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    with folder_lock(output):
        output.rename(aside)
    say(f"moved the earlier run to {aside}")


def _forecast(
    config: "PretrainConfig", store: "PreparedStore", output: Path, devices: int, device: str | None, *, fresh: bool
) -> None:
    """Say what a run would be and take, measured on noise; settings, data and folder are refused as by the run."""
    import torch

    from dagman import config as configs
    from dagman.pretext.method import check_fit
    from dagman.run import Run
    from dagman.train import checkpoints, cost
    from dagman.train.job import fitted, planned, used, window_line

    config = fitted(config, store)
    check_fit(config.encoder, config.method)
    train, _, steps = planned(config, store, devices)
    run = Run(output)
    done = checkpoints.last_step(run.checkpoints) if not fresh and run.compare(config, used(store), devices) else 0
    print(configs.to_yaml(config), end="")
    module = cost.built(config, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    which = f"the last {steps - done} of {steps} steps of the run in {output}" if done else f"{steps} steps"
    say(f"{count(len(train), 'volume', 'volumes')}, {which}; {cost.size_line(module)}{window_line(store)}")
    say(cost.time_line(config, cost.measure(module, config), steps - done, len(train), devices))


def ablate(
    recipe: str,
    /,
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True)],
    axis: Literal["losses", "hiding", "stage", "encoder", "methods"],
    data: Path,
    output: Output,
    steps: int | None = None,
    epochs: int | None = None,
    seeds: int = 3,
    labelled: Path | None = None,
    finetune: int | None = None,
    organs: Path | None = None,
    names: Path | None = None,
    scan: Path | None = None,
    device: Device | None = None,
    devices: Number = 1,
    workers: Readers = 0,
    dry_run: Switch = False,
) -> int:
    """Take DAGMaN apart: train a family of recipes that differ in one thing, and compare them; run again, it continues.

    Args:
        recipe: What is taken apart: `dagman-tiny`, `dagman-swin`, `dagman-vit-tiny` or `dagman-vit`.
        settings: Settings of all members, such as `--data.pairs-per-volume 1`.
        axis: `losses` (Table 1 of the paper), `hiding` (attended or random, clean or noisy teacher: Figure 4), `stage`
            (of semantic attention: Figures 6, 8, 9; tiny recipes need `--data.crop 64,64,64` for it), `encoder` (Swin
            or ViT, DAGMaN or SMIT: Table 2) or `methods` (all twelve recipes: DAGMaN, SMIT, iBOT, AttMask, MST).
        data: A prepared store to train on.
        output: Folder of the runs, which the axes share, and of AXIS.csv, AXIS-summary.csv and AXIS.png.
        steps: Length of each run in optimizer steps.
        epochs: Length of each run in epochs.
        seeds: Runs of each member.
        labelled: A prepared store with labels of two classes, best not the one to train on: each run is probed on it.
        finetune: Steps for which all layers of each run, and of its encoder untrained, learn from those labels in each
            fold of the probe: the paper's AUC after fine-tuning (Tables 1 and 2), in RUN/finetuned.
        organs: A prepared store with label maps, or with a label for each case (OrganMNIST3D, the paper's): how each
            run's features of them cluster (Table 2; Figures 4c and 9), in the tables and in AXIS-clusters.png.
        names: Names of the label maps' numbers, as for `dagman cluster`.
        scan: A CT: where each variant looks (Figure 6), in AXIS-attention.
        device: Where to compute; by default the GPU where there is one.
        devices: Processes that share a step (GPUs of this machine).
        workers: Processes that read crops ahead, for each device.
        dry_run: Say which runs are finished and what the others would cost, and stop.
    """
    from dagman import ablation
    from dagman.ct.store import PreparedStore
    from dagman.tasks import structures

    require(bool(organs) or not names, "--names", "was given without --organs", "give both, or neither")
    require(seeds > 0, "--seeds", f"cannot be {seeds}", "give at least 1")
    base, values = _chosen(ablate, recipe, settings, steps=steps, epochs=epochs)
    seed = next((f"--{name}" for name in values if name.replace("-", "_") == "optimisation.seed"), "")
    require(not seed, seed, "is drawn anew for each run of a member", "give --seeds: how many runs, from seed 0 on")
    store, named = PreparedStore(data), structures.read_names(names) if names else None
    asked: dict[str, Any] = {
        "seeds": range(seeds),
        "device": device,
        "devices": devices,
        "labelled": PreparedStore(labelled) if labelled else None,
        "finetune": finetune,
        "organs": ablation.Organs(store=PreparedStore(organs), names=named) if organs else None,
        "scan": _one_scan(scan) if scan else None,
        "settings": values,
    }
    if dry_run:
        say("timing a step of each member")
        _forecast_family(ablation.left(axis, base, store, output, **asked))
        return ExitCode.OK
    with progress("Training") as tell:
        outputs = ablation.ablate(
            axis,
            base,
            store,
            output,
            **asked,
            workers=workers,
            listener=lambda _: Watcher(tell),
            progress=lambda done, total, note: tell(done, total, f"fine-tuning, {note}"),
            say=say,
        )
    if outputs.table.exists():
        pictures = [outputs.picture, *([outputs.clusters] if outputs.clusters.exists() else [])]
        say(f"wrote {', '.join(map(str, [outputs.table, outputs.summary, *pictures]))}")
    if not outputs.complete:
        return _stopped(devices)
    if outputs.failed:
        say(f"{outputs.failed} runs failed; the same command tries them again")
        return ExitCode.REJECTED
    other = next(name for name in ablation.AXES if name != axis)
    next_step(f"the same command with --axis {other}")
    return ExitCode.OK


def _one_scan(path: Path) -> "Scan":
    """The only CT of a file or folder."""
    from dagman.ct.index import index

    scans, problems = index([path])
    if len(scans) != 1:
        told = f"holds {len(scans)} CTs" + (f" ({problems[0]})" if problems and not scans else "")
        raise DagmanError("USAGE", path, told, "give one CT file, or the folder of one DICOM series")
    return scans[0]


def _forecast_family(members: "list[Left]") -> None:
    """Say what is finished of each member, what a run of it takes, and what all that is left takes."""
    from dagman.errors import duration

    for member in members:
        seeds = f"{member.finished} of {member.finished + member.runs} seeds finished"
        say(f"{member.name}: {seeds}" + (f", about {duration(member.run_seconds)} a run" if member.runs else ""))
    runs = sum(member.runs for member in members)
    seconds = sum(member.runs * member.run_seconds for member in members)
    say(
        f"{runs} runs are left, about {duration(seconds)} in all without examinations, probes, fine-tuning and scores"
        if runs
        else "no run is left to train; probes, fine-tuning and scores that are asked for may be"
    )


def demo(*, output: Output = Path("demo"), data: Path | None = None, steps: int | None = None) -> int:
    """Run the whole chain on synthetic CTs, or on your own: prepare, pretrain, probe, attention.

    Args:
        output: Folder for everything that is made; run again, it continues.
        data: Your CTs: a folder, or a CSV whose labels, masks and patients are used as far as they go.
        steps: Pretraining steps, in place of what suits a short try on two cores.
    """
    from dagman import demo as demonstration

    demonstration.run(output, data, steps=steps, say=say, progress=progress, listener=Watcher)
    return ExitCode.OK
