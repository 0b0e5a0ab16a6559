"""The verbs of segmentation: train, predict, score, export-nnunet."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from dagman.cli.starting import DEFAULT_RECIPE, check_start, starting_encoder
from dagman.cli.watching import (
    STOPPED,
    Crop,
    Device,
    Output,
    Readers,
    Sources,
    Switch,
    claim,
    next_step,
    progress,
    require,
    say,
    say_problems,
)
from dagman.errors import DagmanError, ExitCode, count

if TYPE_CHECKING:
    from dagman.ct.store import PreparedStore
    from dagman.nets.encoder import Encoder
    from dagman.tasks.matching import Scored

segment = App(
    name="segment",
    help="Outline what masks show: learn it, predict it, score any tool's predictions.",
    help_format="plaintext",
)
Data = Annotated[Path, Parameter(name=["--input", "-i"])]
SCORE = "segment score"
MOST_LINES = 10
"""Of cases that were not scored."""


@segment.command
def train(
    *,
    weights: str,
    data: Data,
    output: Output,
    recipe: str | None = None,
    crop: Crop = None,
    labels: str | None = None,
    folds: int = 3,
    fold: int | None = None,
    split: Switch = False,
    fraction: float = 1.0,
    steps: int = 400,
    batch_size: int = 2,
    learning_rate: float = 1e-3,
    layer_decay: float | None = None,
    check_every: int = 50,
    frozen: Switch = False,
    keep_sides: Switch = False,
    group_by: Literal["patient", "case"] = "patient",
    seed: int = 0,
    device: Device | None = None,
    precision: Literal["bf16", "float32"] = "float32",
    workers: Readers = 0,
) -> int:
    """Learn to segment in folds by patient, and test each fold on patients it never saw; run again, it continues.

    Args:
        weights: A run folder or .safetensors file to start from, or `none` for new random weights.
        data: A prepared store with masks.
        output: Folder of the study.
        recipe: Sizes, window and crop of `--weights none`: those of a recipe (`smit-swin-tiny`: a plain SwinUNETR) or
            of a run folder; `dagman-tiny` without.
        crop: Voxels (x, y, z) of a crop, such as 96,96,96; the encoder's own without.
        labels: Such as `2,5`, or `tumour=1+2,node=5` to join labels; all labels without.
        folds: Number of folds; not beside `--split`.
        fold: Do this fold only, from 0.
        split: Use the store's column `split` (train, validation, test; or fold-0, fold-1, ...) in place of our folds.
        fraction: Of the patients to learn from and to choose on, for few-shot studies: 0.25, 0.5.
        steps: Optimizer steps of a fold.
        batch_size: Crops of a step.
        learning_rate: Of the decoder, at its peak.
        layer_decay: From each layer of the encoder to the one before; 0.75, or 1 with `--weights none`.
        check_every: Steps between two scores on the patients held out of the training part.
        frozen: Leave the encoder as it is.
        keep_sides: Do not mirror crops in training: for classes that depend on the side of the body.
        group_by: `case` where patients are unknown; the result is stamped.
        seed: Of folds, crops and the decoder's first weights.
        device: Where to compute; by default the GPU where there is one.
        precision: `bf16` takes half the time on GPUs and on processors with AMX.
        workers: Processes that read crops ahead.
    """
    from dagman.ct.store import PreparedStore
    from dagman.tasks import segmentation_scores
    from dagman.tasks.protocol import Protocol
    from dagman.train import segment as training
    from dagman.train.finetune import FinetuneConfig

    claim(output, training.MADE_BY)
    check_start(recipe=recipe, random=weights == "none", layer_decay=layer_decay, whole=not frozen)
    store = PreparedStore(data)
    encoder, source = _start(weights, recipe, seed, store)
    decay = (1.0 if weights == "none" else 0.75) if layer_decay is None else layer_decay
    config = training.SegmentConfig(
        finetune=FinetuneConfig(
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            layer_decay=decay,
            check_every=check_every,
            frozen=frozen,
            precision=precision,
            seed=seed,
        ),
        crop=crop,
        labels=labels,
        protocol=Protocol(folds=folds, split=split, fraction=fraction, group_by=group_by, seed=seed),
        keep_sides=keep_sides,
    )
    masked = sum(row["mask"] is not None for row in store.rows)
    say(f"{masked} of {len(store)} cases have a mask; starting from {source}")
    with progress("Segmenting") as tell:
        result = training.train(
            encoder,
            store,
            output,
            config,
            source=source,
            only=None if fold is None else [fold],
            weights=None if weights == "none" else Path(weights),
            device=device,
            workers=workers,
            progress=tell,
            say=say,
        )
    if result is None:
        say(STOPPED)
        return ExitCode.STOPPED
    for line in segmentation_scores.lines(result):
        print(line)
    _warn(result)
    say(f"wrote {output / 'result.json'}, {output / 'cases.csv'} and {output / 'cases.png'}")
    next_step("dagman segment predict --weights", output, "-i SCANS -o", output / "predicted")
    return ExitCode.OK


def _start(weights: str, recipe: str | None, seed: int, store: "PreparedStore") -> tuple["Encoder", str]:
    """The encoder every fold starts from, and where it comes from."""
    encoder = starting_encoder(None if weights == "none" else Path(weights), recipe, seed, store)
    if encoder.report:
        say(str(encoder.report))
    return encoder, weights if encoder.report else f"new random weights of {recipe or DEFAULT_RECIPE}"


def _warn(result: dict[str, Any]) -> None:
    from dagman.tasks import leakage

    if result["warning"]:
        say(f"Note: {result['warning']}")
    if "pretraining_overlap" in result:
        say(f"Note: {leakage.line(result['pretraining_overlap'])}")
    for case, note in result["notes"].items():
        say(f"Note: {case}: {note}")


@segment.command
def predict(
    *,
    weights: Path,
    sources: Sources,
    output: Output,
    to: Literal["nifti", "dicom-seg"] = "nifti",
    device: Device = "cpu",
) -> int:
    """Segment CTs: a label map on each scan's own voxels, which lies over the scan in any viewer.

    Run again, it goes on: what is there from the same scan and weights stays.

    Args:
        weights: The output folder of `dagman segment train` (the mean of its folds counts), or one fold of it.
        sources: CT files, folders, DICOM trees, or a CSV.
        output: Folder for CASE.nii.gz, or CASE.dcm.
        to: `dicom-seg` writes a DICOM segmentation with the patient's references, for DICOM input.
        device: `cpu` or `cuda`.
    """
    from dagman.ct.index import index, refuse_nothing
    from dagman.ct.prepare import refuse_inside
    from dagman.tasks import leakage, segmenter
    from dagman.tasks import segment as segmenting

    refuse_inside(sources, output)
    claim(output, "segment predict")
    loaded = segmenter.load(weights)
    scans, problems = index(sources)
    refuse_nothing(sources, scans, problems)
    segmenting.refuse_inputs(scans, output, to=to)
    failed = say_problems(problems)
    networks = count(len(loaded), "network", "networks")
    say(f"{count(len(scans), 'scan', 'scans')}; segmenting {', '.join(loaded[0].classes.names)} with {networks}")
    _say_learnt(leakage.scan_rows(scans), segmenter.places(weights))
    done, ends = 0, set()
    for number, scan in enumerate(scans, 1):
        try:
            if there := segmenting.before(loaded, scan, output, to=to):
                done += 1
                say(f"{there.path} is there already, from the same scan and weights")
                continue
            with progress(f"Segmenting {scan.case_id} ({number} of {len(scans)})") as tell:
                found = segmenting.predict(loaded, scan, output, to=to, device=device, progress=tell)
        except DagmanError as error:
            if error.exit_code == ExitCode.RESOURCES or error.code == "HIGHDICOM":
                raise
            say(str(error))
            ends.add(error.exit_code)
            continue
        done += 1
        volumes = ", ".join(f"{name} {volume:.1f} cc" for name, volume in found.volumes_cc.items())
        say(f"wrote {found.path}: {volumes}")
    if not done:
        return ExitCode.REFUSED if ends == {ExitCode.REFUSED} else ExitCode.NOTHING_USABLE
    if to == "nifti":
        chosen = loaded[0].chosen
        labels = ["--labels", shlex.quote(chosen)] if chosen else []
        next_step("dagman segment score -i", output, "--reference MASKS -o", Path(f"{output}-scores"), *labels)
    return ExitCode.REJECTED if failed or done < len(scans) else ExitCode.OK


def _say_learnt(rows: list[dict[str, Any]], places: list[Path]) -> None:
    """Warn of scans whose masks, or those of their patients, were learnt from: scores on them test nothing."""
    from dagman.tasks import leakage
    from dagman.train.segment import TASK

    seen = [leakage.seen(rows, place, head=True) for place in places]
    learnt = sorted({case for one in seen for case, tasks in one.learnt.items() if TASK in tasks})
    if learnt:
        named = ", ".join(learnt[:5]) + (", ..." if len(learnt) > 5 else "")
        counted = f"it learnt from masks of {len(learnt)} of these scans or their patients"
        say(f"Note: {counted} ({named}): they test nothing")


@segment.command
def score(
    *,
    predictions: Sources,
    reference: Path,
    output: Output,
    labels: str | None = None,
    seed: int = 0,
) -> int:
    """Score the label maps of any tool against references: Dice, HD95, surface Dice, volumes, lesions, with intervals.

    Args:
        predictions: Folders of label maps (NIfTI, NRRD, MHA), matched by name: CASE.nii.gz, CASE_seg.nii.gz.
        reference: Folder of label maps; a CSV `case_id,image,mask,patient`, which groups intervals by patient; an
            nnU-Net or Decathlon folder; a MONAI datalist. Of splits, those that predictions are of.
        output: Folder for cases.csv, result.json and cases.png.
        labels: Such as `2,5` or `liver`, or `tumour=1+2,node=5` to join labels; all labels of the references without.
        seed: Of the bootstrap.
    """
    from dagman.tasks import matching, segmentation_scores

    claim(output, SCORE)
    require(reference.exists(), "--reference", f"{reference} does not exist", "give a folder or a CSV of masks")
    with progress("Scoring") as tell:
        found = matching.score(predictions, reference, labels=labels, progress=tell)
    rows = list(found.rows)
    result = segmentation_scores.summary(rows, group_by=found.group_by, seed=seed)
    result |= {
        "made_by": SCORE,
        "labels": dict(zip(found.classes.names, map(list, found.classes.labels), strict=True)),
        "not_scored": [str(error) for error in found.rejected],
        "predictions_without_reference": [path.name for path in found.unmatched],
        "without_prediction": list(found.missing),
        "splits_without_prediction": found.left_out,
        "dice_of_predicted": found.dice_of_predicted,
        "classes_in_no_prediction": list(found.never_predicted),
        "labels_in_no_reference": {case: list(values) for case, values in found.strange.items()},
    }
    segmentation_scores.write(rows, result, output)
    picture = matching.draw(found, output)
    for line in segmentation_scores.lines(result):
        print(line)
    _tell_left_out(found, output)
    _warn(result)
    say(f"{result['cases']} of {len(found.scored) + len(found.rejected)} references were scored")
    say(f"wrote {output / 'result.json'}, {output / 'cases.csv'}" + (f" and {picture}" if picture else ""))
    next_step("look at the lowest rows of", output / "cases.csv")
    return ExitCode.REJECTED if found.rejected or found.unmatched or found.missing else ExitCode.OK


def _tell_left_out(found: "Scored", output: Path) -> None:
    """Name what does not fit together."""
    for error in found.rejected[:MOST_LINES]:
        say(str(error))
    if len(found.rejected) > MOST_LINES:
        say(f"... and {len(found.rejected) - MOST_LINES} more in {output / 'result.json'}")
    for split, number in found.left_out.items():
        say(f"{number} references of the split {split} are left out: no prediction is of that split")
    if found.unmatched:
        alone = count(len(found.unmatched), "prediction has", "predictions have")
        say(f"{alone} no reference, such as {found.unmatched[0].name}")
    if found.missing:
        dice = ", ".join(f"{name} {value:.3f}" for name, value in found.dice_of_predicted.items()) or "none"
        say(
            f"{count(len(found.missing), 'reference has', 'references have')} no prediction, such as "
            f"{found.missing[0]}; what they hold counts as missed; mean Dice of the others: {dice}"
        )
    if found.never_predicted:
        names = ", ".join(found.never_predicted)
        say(f"Note: in no prediction at all, but in references: {names}; where labels were joined, give --labels")
    for case, values in list(found.strange.items())[:MOST_LINES]:
        say(f"{case}: its prediction holds label {', '.join(map(str, values))}, which no reference does")


@segment.command
def export_nnunet(
    *,
    data: Data,
    output: Output,
    number: int = 501,
    name: str = "CT",
    labels: str | None = None,
    folds: int = 3,
    split: Switch = False,
    fraction: float = 1.0,
    seed: int = 0,
    group_by: Literal["patient", "case"] = "patient",
) -> int:
    """Write the cases and our folds for nnU-Net, to train it as a baseline with its own commands.

    Args:
        data: A prepared store; or a CSV, an nnU-Net or Decathlon folder or a MONAI datalist, whose scans keep their own
            voxels.
        output: nnU-Net's folder of raw data (nnUNet_raw).
        number: Of the data set, 1 to 999.
        name: Of the data set.
        labels: As `segment train`.
        folds: As `segment train`.
        split: As `segment train`.
        fraction: As `segment train`.
        seed: As `segment train`.
        group_by: As `segment train`.
    """
    from dagman.tasks import nnunet
    from dagman.tasks.protocol import Protocol

    with progress("Exporting") as tell:
        folder = nnunet.export(
            data,
            output,
            number=number,
            name=name,
            labels=labels,
            protocol=Protocol(folds=folds, split=split, fraction=fraction, group_by=group_by, seed=seed),
            progress=tell,
        )
    described = json.loads((folder / "dataset.json").read_text())
    say(f"wrote {described['numTraining']} cases to {folder}; classes {', '.join(list(described['labels'])[1:])}")
    say(f"nnUNetv2_plan_and_preprocess -d {number} --verify_dataset_integrity -c 3d_fullres")
    say(f"cp {folder / 'splits_final.json'} nnUNet_preprocessed/{folder.name}/")
    if (folder / "imagesTs").is_dir():
        say(f"nnUNetv2_train {number} 3d_fullres 0")
        found = "nnunet-predicted"
        say(f"nnUNetv2_predict -i {folder / 'imagesTs'} -o {found} -d {number} -c 3d_fullres -f 0")
    else:
        say(f"nnUNetv2_train {number} 3d_fullres 0   (and the other folds)")
        found = f"nnUNet_results/{folder.name}/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_*/validation"
    score = f"the commands above, then dagman segment score -i {found} --reference"
    next_step(score, folder / "cases.csv", "-o nnunet-scores")
    return ExitCode.OK
