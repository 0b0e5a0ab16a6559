"""The verb `classify predict`: new cases, and what the predictions are worth where they have labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagman.cli.watching import PREDICT, Device, Number, Output, Sources, by, claim, next_step, progress, say
from dagman.errors import DagmanError, ExitCode, count

if TYPE_CHECKING:
    from dagman.ct.store import PreparedStore
    from dagman.tasks.classifier import Classifier
    from dagman.tasks.table import Table
    from dagman.types import Preparation

MOST_NAMED = 10
"""Of scans that cannot be used."""


def predict(*, weights: Path, sources: Sources, output: Output, workers: Number = 1, device: Device = "cpu") -> int:
    """Classify new CTs; those that cannot be used are named, and the rest goes on.

    Args:
        weights: Output of `dagman classify finetune` (the mean of its folds), one of its folds, or `classifier` of a
            probe.
        sources: CT files, folders, DICOM trees, a CSV (with masks, if the classifier learnt around masks), or a
            prepared store.
        output: Folder for predictions.csv, with all scans prepared into its folder `prepared`, by this call or earlier,
            but for those that share their name with a scan that this call cannot use. Its column `source` says where
            each lies; of an earlier call, or of a store, as the store's manifest does. Where scans have labels (a CSV),
            `tested` says what predictions are worth.
        workers: Processes that prepare scans.
        device: `cpu` or `cuda`.
    """
    from dagman.ct.store import MANIFEST, PreparedStore
    from dagman.nets.classifier import EncoderClassifier
    from dagman.tasks import classifier as classifiers

    claim(output, PREDICT)
    loaded = classifiers.load(weights)
    first = loaded[0]
    say(f"{count(len(loaded), 'classifier', 'classifiers')} of {', '.join(first.names)}")
    given = len(sources) == 1 and (sources[0] / MANIFEST).is_file()
    stored = sources[0] if given else output / "prepared"
    known, rejected = (None, []) if given else _prepared(sources, stored, first.network.preparation, workers)
    store = PreparedStore(stored)
    lost = {row["case_id"] for row in store.rows if row["case_id"] not in (known or {}) and _concerns(rejected, row)}
    rows, said = classifiers.usable(loaded, store, lost)
    for line in said:
        say(line)
    if not any(known is None or store.rows[row]["case_id"] in known for row in rows):
        say("no scan can be used")
        return ExitCode.NOTHING_USABLE
    with progress("Classifying") as tell:
        table, called = classifiers.predict(loaded, store, rows, device=device, progress=tell)
    places = {row["case_id"]: row.get("source", "") for row in store.rows} | (known or {})
    path = classifiers.write_predictions(table, called, first.names, [places[case] for case in table.case_ids], output)
    found = ", ".join(f"{called.count(name)} {name}" for name in first.names)
    say(f"{count(len(called), 'case', 'cases')}: {found}")
    say(f"wrote {path}")
    _tested(table, loaded, store, weights, output / "tested")
    if isinstance(first.network, EncoderClassifier) and first.network.encoder.config.has_cls:
        one = classifiers.places(weights)[0]
        next_step("dagman attention --weights", one, "-i SCANS -o", output / "attention")
    return ExitCode.REJECTED if rejected or len(rows) < len(store) else ExitCode.OK


def _tested(table: "Table", loaded: "list[Classifier]", store: "PreparedStore", weights: Path, folder: Path) -> None:
    """Where new cases have labels, say and write what the predictions are worth."""
    from dagman.ct import crops
    from dagman.tasks import classifier as classifiers
    from dagman.tasks import leakage, predictions
    from dagman.tasks.classify import TASK

    seen = [leakage.seen(store.rows, place, head=True) for place in classifiers.places(weights)]
    learnt = {case for one in seen for case, tasks in one.learnt.items() if TASK in tasks}
    try:
        found = classifiers.tested(table, loaded, learnt)
    except DagmanError as error:
        say(f"{error}; what the predictions are worth is not told")
        return
    if learnt:
        say(f"the classifier learnt from labels of {len(learnt)} of these cases or their patients: they test nothing")
    if not found:
        return
    learners = count(len(loaded), "classifier", "classifiers")
    more = {
        "made_by": PREDICT,
        "method": f"{learners} of {weights}, tested on cases that they did not learn from",
        "protocol": "frozen classifier and threshold",
        "crop_mm": crops.sides_mm(store, loaded[0].network.preparation.crop),
        "crops_around": crops.around(store),
        "pretraining_overlap": leakage.report(seen[0], found.case_ids),
    }
    paths = predictions.write(found, folder, more)
    say_result(predictions.summary(found) | more)
    say(f"wrote {' and '.join(map(str, paths))}")


def _prepared(
    sources: list[Path], stored: Path, preparation: "Preparation", workers: int
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Bring new scans into the form that a classifier knows; name those that cannot be used.

    Returns:
        Where each case lies that can be used; and what is said of those that cannot.
    """
    from dagman.ct.prepare import REJECTED, PrepareConfig, prepare
    from dagman.files import read_lines

    with progress("Preparing") as tell:
        config = PrepareConfig(spacing_mm=preparation.spacing_mm, resampling=preparation.resampling)
        summary = prepare(sources, stored, config, workers=workers, progress=tell)
    rejected = read_lines(stored / REJECTED)
    for row in rejected[:MOST_NAMED]:
        where = f"{row['case_id']} ({row['source']})" if row["case_id"] else row["source"]
        say(f"E-{row['code']} {where}: {row['problem']}; {row['advice']}")
    if summary.rejected > MOST_NAMED:
        say(f"and {summary.rejected - MOST_NAMED} more: see {stored / REJECTED}")
    return summary.given, rejected


def _concerns(rejected: list[dict[str, Any]], stored: dict[str, Any]) -> bool:
    """Whether a stored case has the name or the place of a scan that cannot be used: it may be another, or older."""
    name, place = stored["case_id"], stored.get("source")
    return any(row["case_id"] == name or (place and f"{row['source']}/".startswith(f"{place}/")) for row in rejected)


def say_result(result: dict[str, Any]) -> None:
    """What was found, for a person."""
    from dagman.tasks import leakage, predictions

    grouped = f"{result['patients']} patients" if result["patients"] else "patients unknown"
    counts = ", ".join(f"{count} {name}" for name, count in result["classes"].items())
    shown = f", crops of {by(result['crop_mm'])} mm" if result.get("crop_mm") else ""
    say(f"{result['cases']} tested cases ({counts}), {grouped}, {result['protocol']}{shown}")
    for line in predictions.lines(result):
        print(line)
    if result["warning"]:
        say(f"Note: {result['warning']}")
    if "pretraining_overlap" in result:
        say(f"Note: {leakage.line(result['pretraining_overlap'])}")
