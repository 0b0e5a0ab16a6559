"""The verbs of classification: classify probe and finetune; predict is in `predicting`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from dagman.cli.predicting import predict, say_result
from dagman.cli.watching import STOPPED, Crop, Device, Output, Readers, Switch, claim, next_step, progress, require, say
from dagman.errors import DagmanError, ExitCode

if TYPE_CHECKING:
    from dagman.tasks.origin import Origin
    from dagman.tasks.protocol import Protocol
    from dagman.tasks.table import Table

classify = App(
    name="classify",
    help="Predict labels: a linear probe on frozen features, fine-tuning, and new cases.",
    help_format="plaintext",
)
classify.command(predict)
Data = Annotated[Path, Parameter(name=["--input", "-i"])]
PROBE = "classify probe"
GroupBy = Literal["patient", "case"]
Unlabelled = Literal["refuse", "leave_out"]


@classify.command
def probe(
    *,
    features: Data,
    output: Output,
    labels: Path | None = None,
    positive: str | None = None,
    folds: int = 3,
    split: Switch = False,
    fraction: float = 1.0,
    draws: int = 1,
    seed: int = 0,
    group_by: GroupBy = "patient",
    unlabelled: Unlabelled = "refuse",
) -> int:
    """Linear probe: logistic regression on frozen features, cross-validated by patient, with 95 % intervals.

    Args:
        features: CSV written by `dagman embed`.
        output: Folder for predictions.csv, result.json, roc.png and classifier/ (for `dagman classify predict`).
        labels: CSV `case_id,label`, in place of the labels of the prepared store.
        positive: The positive one of two labels, where labels are words.
        folds: Folds of the cross-validation; not beside `--split`.
        split: Use the column `split` (train, validation, test; or fold-0, fold-1, ...) in place of our folds.
        fraction: Of the patients to learn from and to choose on, for few-shot studies: 0.25, 0.5.
        draws: Of the fraction; each is a study of its own, in draw-0, draw-1, ...
        seed: Of the folds and the bootstrap.
        group_by: `case` where patients are unknown; the result is stamped.
        unlabelled: What to do about cases without label.
    """
    from dagman.tasks.labels import override
    from dagman.tasks.origin import read_origin
    from dagman.tasks.protocol import Protocol
    from dagman.tasks.table import read_csv

    _check_draws(draws, fraction)
    claim(output, PROBE)
    table = read_csv(features)
    if labels:
        table = override(table, labels)
    given: dict[str, Any] = {"positive": positive, "unlabelled": unlabelled}
    origin = read_origin(features)
    results = []
    for draw in range(draws):
        protocol = Protocol(folds=folds, split=split, fraction=fraction, draw=draw, group_by=group_by, seed=seed)
        place = output / f"draw-{draw}" if draws > 1 else output
        claim(place, PROBE)
        results.append(_probed(table, protocol, place, given, origin))
    _spread(results, output)
    saved = _save_probe(table, protocol, output, given, origin)
    if saved:
        next_step("dagman classify predict --weights", saved, "-i SCANS -o predicted")
    else:
        next_step("dagman compare", output, "OTHER")
    return ExitCode.OK


def _check_draws(draws: int, fraction: float) -> None:
    """Refuse draws of all patients, which are one study several times.

    Raises:
        DagmanError: `E-USAGE`.
    """
    require(draws > 0, "--draws", f"cannot be {draws}", "give at least 1")
    require(draws == 1 or fraction < 1, "--draws", "is of a part of the patients", "give --fraction, such as 0.25")


def _probed(
    table: "Table", protocol: "Protocol", place: Path, given: dict[str, Any], origin: "Origin | None"
) -> dict[str, Any]:
    """One probe: its scores said and written."""
    from dagman import files
    from dagman.figures import roc
    from dagman.tasks import classify as classifying
    from dagman.tasks import cohort as cohorts
    from dagman.tasks import leakage, predictions

    if origin:
        study = cohorts.cohort(table, protocol, **given)
        leakage.refuse(origin.seen, origin.twins, study.together, classifying.TASK)
    found = classifying.probe(table, protocol, **given)
    seen = origin.seen if origin else leakage.UNKNOWN
    more: dict[str, Any] = {
        "made_by": PROBE,
        "method": "linear probe",
        "protocol": protocol.words,
        "source": str(origin.weights or "new random weights") if origin else None,
        "pretraining_overlap": leakage.report(seen, found.case_ids),
    }
    if origin and origin.preparation:
        shown = ("preparation", "crop_mm", "crops_around", "encoder", "which")
        more |= {name: getattr(origin, name) for name in shown}
    written = classifying.write(found, place, more)
    files.write_bytes(place / "roc.png", roc.png({f"{place.name}: {found.auc()}": found}))
    result = predictions.summary(found) | more
    say_result(result)
    say(f"wrote {', '.join(map(str, written))} and {place / 'roc.png'}")
    return result


def _spread(results: list[dict[str, Any]], output: Path) -> None:
    """Of several draws, the mean and the range of their AUCs."""
    from dagman import files

    values = [result["auc"]["value"] for result in results if result["auc"]["value"] is not None]
    if len(results) < 2 or not values:
        return
    found = {"draws": len(results), "mean": sum(values) / len(values), "low": min(values), "high": max(values)}
    files.write_json(output / "draws.json", found | {"auc": values})
    print(f"{'auc over draws':18s} {found['mean']:.3f} (lowest {found['low']:.3f}, highest {found['high']:.3f})")


def _save_probe(
    table: "Table", protocol: "Protocol", output: Path, given: dict[str, Any], origin: "Origin | None"
) -> Path | None:
    """A classifier from a probe of all labelled cases; None where the encoder is not known or gone.

    That of an earlier probe in this folder goes first: it would stand beside results of another.
    """
    from dagman.files import remove_folder, sha256_file

    remove_folder(output / "classifier")
    if origin is None or origin.weights is None:
        why = "is untrained" if origin else "is not known (its JSON file is not beside them, or tells of others)"
        say(f"no classifier was saved: the encoder of these features {why}")
        return None
    from dagman.config import from_dict
    from dagman.nets.weights import load_encoder
    from dagman.tasks import classifier, leakage
    from dagman.tasks import classify as classifying
    from dagman.types import Preparation

    try:
        encoder = load_encoder(origin.weights)
    except DagmanError as error:
        say(f"no classifier was saved: {error}")
        return None
    if encoder.report is None or sha256_file(encoder.report.source) != origin.weights_sha256:
        say(f"no classifier was saved: {origin.weights} has other weights since; embed again")
        return None
    if origin.preparation:  # as the features were shown, which the store has a say in
        encoder.preparation = from_dict(Preparation, origin.preparation, "preparation.")
    fitted, names, learnt = classifying.fit_all(table, protocol, **given)
    made = classifier.from_probe(fitted, names, encoder, origin)
    rows = [row for row in origin.cases if row["case_id"] in learnt]
    leakage.record(rows, output / "classifier", task=classifying.TASK, start=origin.weights, head=True)
    classifier.save(made, output / "classifier")
    say(f"wrote {output / 'classifier'}, learnt from all labelled cases but those of the split `test`")
    return output / "classifier"


@classify.command
def finetune(
    *,
    weights: str,
    data: Data,
    output: Output,
    recipe: str | None = None,
    network: Literal["encoder", "resnet50"] = "encoder",
    which: Literal["pooled", "cells", "cls", "all"] = "pooled",
    head: Literal["probe", "random"] | None = None,
    crop: Crop = None,
    positive: str | None = None,
    folds: int = 3,
    split: Switch = False,
    fraction: float = 1.0,
    draws: int = 1,
    steps: int = 400,
    batch_size: int = 16,
    learning_rate: float = 2e-4,
    layer_decay: float | None = None,
    check_every: int = 50,
    frozen: Switch = False,
    keep_sides: Switch = False,
    group_by: GroupBy = "patient",
    unlabelled: Unlabelled = "refuse",
    seed: int = 0,
    device: Device | None = None,
    precision: Literal["bf16", "float32"] = "float32",
    workers: Readers = 0,
) -> int:
    """Fine-tune an encoder on labelled cases in folds by patient, and test each fold on patients it never saw.

    Run again, it continues.

    Args:
        weights: A run folder or .safetensors file to start from, or `none` for new random weights; with
            `--network resnet50` a file of ResNet weights, or `none`.
        data: A prepared store with labels: crops around masks where there are masks, else anywhere in the volume.
        output: Folder of the study.
        recipe: Sizes, window and crop of `--weights none` and of a ResNet: a recipe's, or those of a run folder;
            `dagman-tiny` without.
        network: `resnet50` is MONAI's 3D ResNet-50, to be compared with.
        which: What the linear layer sees: as `dagman embed --which`.
        head: How the linear layer starts: as the linear probe of the training cases (by default, of a pretrained
            encoder), or at `random`.
        crop: Voxels (x, y, z) of a crop, such as 64,64,64; the encoder's own without.
        positive: The positive one of two labels, where labels are words.
        folds: Number of folds; not beside `--split`.
        split: Use the store's column `split` (train, validation, test; or fold-0, fold-1, ...) in place of our folds.
        fraction: Of the patients to learn from and to choose on, for few-shot studies: 0.25, 0.5.
        draws: Of the fraction; each is a study of its own, in draw-0, draw-1, ...
        steps: Optimizer steps of a fold.
        batch_size: Crops of a step.
        learning_rate: Of the linear layer, at its peak.
        layer_decay: From each layer of the encoder to the one before; 0.75, or 1 with `--weights none`.
        check_every: Steps between two looks at the patients held out of the training part.
        frozen: Leave the encoder as it is.
        keep_sides: Do not mirror crops in training: for classes that depend on the side of the body.
        group_by: `case` where patients are unknown; the result is stamped.
        unlabelled: What to do about cases without label.
        seed: Of folds, crops and first weights.
        device: Where to compute; by default the GPU where there is one.
        precision: `bf16` takes half the time on GPUs and on processors with AMX.
        workers: Processes that read crops ahead.
    """
    from dagman.cli.starting import check_start, starting_encoder
    from dagman.ct.store import PreparedStore
    from dagman.tasks.protocol import Protocol
    from dagman.train import classify as training
    from dagman.train.finetune import FinetuneConfig

    claim(output, training.MADE_BY)
    fresh = weights == "none"
    an_encoder = network == "encoder"
    _check_draws(draws, fraction)
    require(an_encoder or not frozen, "--frozen", "goes with an encoder", "leave it out for a ResNet")
    require(an_encoder or which == "pooled", "--which", "goes with an encoder", "leave it out for a ResNet")
    check_start(
        recipe=recipe,
        random=fresh or not an_encoder,
        layer_decay=layer_decay,
        whole=an_encoder and not frozen,
    )
    start = None if fresh or network == "resnet50" else Path(weights)
    store = PreparedStore(data)
    encoder = starting_encoder(start, recipe, seed, store, crop)
    say(str(encoder.report) if encoder.report else f"starting from new random weights ({network})")
    learning = FinetuneConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        layer_decay=(1.0 if fresh else 0.75) if layer_decay is None else layer_decay,
        check_every=check_every,
        frozen=frozen,
        precision=precision,
        seed=seed,
    )
    results = []
    for draw in range(draws):
        protocol = Protocol(folds=folds, split=split, fraction=fraction, draw=draw, group_by=group_by, seed=seed)
        config = training.ClassifyConfig(
            finetune=learning,
            protocol=protocol,
            network=network,
            which=which,
            head=head,
            positive=positive,
            unlabelled=unlabelled,
            keep_sides=keep_sides,
        )
        place = output / f"draw-{draw}" if draws > 1 else output
        claim(place, training.MADE_BY)
        with progress("Fine-tuning") as tell:
            result = training.finetune(
                encoder,
                store,
                place,
                config,
                weights=start,
                resnet=None if fresh or network == "encoder" else Path(weights),
                device=device,
                workers=workers,
                progress=tell,
                say=say,
            )
        if result is None:
            say(STOPPED)
            return ExitCode.STOPPED
        results.append(result)
        say_result(result)
        say(f"wrote {place / 'predictions.csv'}, {place / 'result.json'} and {place / 'roc.png'}")
    _spread(results, output)
    next_step("dagman classify predict --weights", place, "-i SCANS -o", output / "predicted")
    return ExitCode.REJECTED if results[0]["empty_masks_left_out"] else ExitCode.OK
