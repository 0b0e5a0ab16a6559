"""The whole chain in a few minutes: prepare, pretrain, probe beside the baselines, look at the attention."""

import shlex
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from dagman import files, recipes
from dagman.ct import phantom
from dagman.ct.index import index, refuse_missing
from dagman.ct.prepare import prepare, refuse_overlap
from dagman.ct.store import MANIFEST, PreparedStore
from dagman.errors import DagmanError, ExitCode, duration
from dagman.figures import phantom as sheets
from dagman.nets.encoder import Encoder
from dagman.nets.weights import load_encoder
from dagman.run import Run, describe_environment
from dagman.tasks import classify, predictions
from dagman.tasks.attention import explain
from dagman.tasks.embed import embed, in_turn, untrained, voxels
from dagman.tasks.labels import classes_of, last_of_two
from dagman.train.pretrain import Listener, Result, pretrain

NUM_PHANTOMS = 48
STEPS = 200
"""About three and a half minutes of pretraining on two cores."""
CROSSING_STEPS = 1000
"""Length of the shortest runs of which three seeds together told organs better, on real CTs (docs/learning.md)."""
NUM_PICTURES = 2
NUM_UNTRAINED = 3
"""Untrained encoders that the pretrained one stands beside: one alone may be good or bad by luck."""

READINGS = {
    "image_error_ratio": "image error relative to predicting each view's visible mean (below 1: it learns)",
    "pooled_spread": "spread of the pooled features (0: collapsed, 1: as different as random directions)",
    "aitd_teacher_entropy": "teacher entropy of the [CLS] token / ln K (1: no signal yet)",
    "attention_entropy": "attention entropy / ln N (1: looks everywhere alike)",
    "attention_peak": "attention peak, times uniform",
    "ampd_image_nats": "what the teacher's targets for cells tell about the image, nats (0: nothing)",
    "ampd_position_nats": "what they tell about the cell's place alone, nats",
    "gitd_image_nats": "what its pooled targets tell about the image, nats",
}

Say = Callable[[str], None]
Tell = Callable[[int, int, str], None]
Show = Callable[[str], AbstractContextManager[Tell]]


def run(
    folder: Path,
    data: Path | None,
    *,
    steps: int | None,
    say: Say,
    progress: Show,
    listener: Callable[[Tell], Listener],
) -> None:
    """Prepare, pretrain `dagman-tiny`, probe, and look; what is finished already is not done again.

    Args:
        folder: Where everything goes.
        data: The user's CTs; None for phantoms.
        steps: Pretraining steps.
        say: Shows a line.
        progress: Makes the bar of a piece of work.
        listener: Makes what watches the pretraining.

    Raises:
        DagmanError: What any of the verbs raises; `E-NODATA` where no scan can be used.
    """
    if data:
        refuse_missing([data])
        refuse_overlap([data], folder / "prepared")
    _claim(folder, data)
    source = data or _phantoms(folder / "phantoms", say, progress)
    say(f"1/4 Preparing {source}")
    with progress("Preparing") as tell:
        summary = prepare([source], folder / "prepared", progress=tell)
    say(f"    {summary.stored + summary.already_there} cases ready, {summary.rejected} rejected")
    if summary.exit_code is ExitCode.NOTHING_USABLE:
        raise DagmanError(
            "NODATA",
            source,
            "holds no scan that can be used",
            f"see {folder / 'prepared' / 'rejected.jsonl'}",
            exit_code=ExitCode.NOTHING_USABLE,
        )
    store = PreparedStore(folder / "prepared")
    say("2/4 Pretraining dagman-tiny")
    recipe = recipes.with_length(recipes.get("dagman-tiny"), steps or STEPS, None)
    with progress("Pretraining") as tell:
        _require_finished(pretrain(recipe, store, folder / "run", listeners=[listener(tell)]))
    encoder = load_encoder(folder / "run")
    say("3/4 Probing what its features know")
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": describe_environment()["versions"],
        "training": _training(Run(folder / "run")),
        "probe": _probe(encoder, store, folder, say, progress),
    }
    say("4/4 Looking at its attention")
    pictures = _pictures(encoder, source, folder / "attention", say)
    files.write_json(folder / "summary.json", found)
    _report(found, folder, pictures, say)


def _require_finished(result: Result) -> None:
    if result.stop_asked:
        raise DagmanError(
            "STOPPED",
            result.folder,
            f"stopped at step {result.step}",
            "run the same command to continue",
            exit_code=ExitCode.STOPPED,
        )


def _claim(folder: Path, data: Path | None) -> None:
    """One folder, one source of scans: what another demo prepared is not mixed in."""
    note, source = folder / "source.txt", str(data.resolve()) if data else "phantoms"
    kept = (folder / "prepared" / MANIFEST, folder / "phantoms" / "cases.csv")
    begun = any(path.exists() and path.stat().st_size for path in kept)
    if begun and note.exists() and note.read_text() != source:
        raise DagmanError(
            "OUTPUT", folder, "holds a demo on other scans", "give another --output", exit_code=ExitCode.REFUSED
        )
    files.write_text(note, source)


def _phantoms(folder: Path, say: Say, progress: Show) -> Path:
    table = folder / "cases.csv"
    if not table.exists():
        say(f"0/4 Painting {NUM_PHANTOMS} synthetic chest CTs with benign and malignant nodules")
        with progress("Painting") as tell:
            phantom.write(folder, NUM_PHANTOMS, workers=-1, progress=tell)
        shown = [
            (f"case {case}", made.volume, made.nodule_mask) for case in range(4) for made in [phantom.make(0, case)]
        ]
        sheets.save_sheet(folder / "sheet.png", shown)
    return table


def _training(run: Run) -> dict[str, Any]:
    """How the pretraining ended: means over its last twentieth, None for what was never finite."""
    rows = run.metrics()
    last = rows[-max(1, len(rows) // 20) :]
    seen = {name: [row[name] for row in last if row.get(name) is not None] for name in (*READINGS, "seconds")}
    means = {name: sum(values) / len(values) if values else None for name, values in seen.items()}
    return {"steps": rows[-1]["step"] if rows else 0, **means}


def _probe(encoder: Encoder, store: PreparedStore, folder: Path, say: Say, progress: Show) -> list[dict[str, Any]]:
    """Probe the pretrained encoder, the same encoder untrained, and raw voxels; empty without usable labels."""
    labels = [row.get("label") for row in store.rows]
    classes = classes_of(labels)
    if len(classes) != 2:
        say(f"    no probe: {len(classes)} classes of labels; a CSV with a label column of two classes gives one")
        return []
    encoders = [encoder, *(untrained(encoder, seed) for seed in range(NUM_UNTRAINED))]
    with progress("Embedding") as tell:

        def heard(done: int, total: int) -> None:
            tell(done, total, "")

        first, second, *others = [
            embed(one, store, progress=partial(in_turn, heard, number, len(encoders)))
            for number, one in enumerate(encoders)
        ]
    tables = {"pretrained": first, "untrained": second, "raw voxels": voxels(store, encoder.preparation)}
    probe = partial(classify.probe, positive=last_of_two(labels), unlabelled="leave_out")
    try:
        results = {name: probe(table) for name, table in tables.items()}
        alike = [results["untrained"], *map(probe, others)]
    except DagmanError as error:
        say(f"    no probe: {error}")
        return []
    for name, result in results.items():
        classify.write(result, folder / "probe" / name.replace(" ", "-"))
    differences = {row["features"]: row["first_minus_this"] for row in classify.beside(results)}
    differences["untrained"] = predictions.difference_from_one_of(results["pretrained"], alike)
    return [
        {
            "features": name,
            "first_minus_this": differences[name] and vars(differences[name]),
            **predictions.summary(result),
        }
        for name, result in results.items()
    ]


def _pictures(encoder: Encoder, source: Path, folder: Path, say: Say) -> list[Path]:
    scans, _ = index([source])
    chosen = [scan for scan in scans if scan.mask] or scans
    pictures = []
    for scan in chosen[:NUM_PICTURES]:
        try:
            pictures.append(explain({"pretrained": encoder}, scan, folder).picture)
        except DagmanError as error:
            if error.exit_code == ExitCode.RESOURCES:
                raise
            say(f"    {error}")
    return pictures


def _report(found: dict[str, Any], folder: Path, pictures: list[Path], say: Say) -> None:
    """Print the table, what it means, and where everything lies."""
    training, rows = found["training"], found["probe"]
    say("")
    say(f"After {training['steps']} steps:")
    for name, meaning in READINGS.items():
        shown = "   n/a" if training[name] is None else f"{training[name]:6.3f}"
        say(f"  {shown}  {meaning}")
    if rows:
        first = rows[0]
        say("")
        say(
            f"{first['positive_label']} or {first['negative_label']}: {first['cases']} cases of {first['patients']} "
            f"patients, {first['folds']} folds by patient, 95 % intervals by patient bootstrap, widened for folds"
        )
        say(f"  {'features':12s} {'AUC':24s} pretrained minus this")
        for row in rows:
            say(f"  {row['features']:12s} {_interval(row['auc']):24s} {_interval(row['first_minus_this'])}")
        say(f"  (untrained: the AUC is of one encoder, the difference from any of {NUM_UNTRAINED})")
        say(verdict(rows))
        if training["seconds"] and training["steps"] < CROSSING_STEPS:
            say(
                "Which organ a crop shows, not malignancy, is told better than by untrained encoders after "
                f"{CROSSING_STEPS} steps on real CTs or on phantoms "
                f"({duration(training['seconds'] * CROSSING_STEPS)} at this pace)."
            )
    say("")
    made = [
        name
        for name in ("prepared", "run/progress.png", "probe", "attention", "summary.json")
        if (folder / name).exists()
    ]
    say(f"Wrote {folder}: {' '.join(made)}")
    for picture in pictures:
        say(f"  {picture}")
    verb = "dagman" if shutil.which("dagman") else shlex.quote(str(Path(sys.executable).with_name("dagman")))
    say("With CTs of yours: make demo DATA=FOLDER; docs/learning.md says how to see whether a run of yours pays")
    say(f"Next: {verb} pretrain dagman-tiny --data {shlex.quote(str(folder / 'prepared'))} -o runs/longer --steps 1000")


def verdict(rows: list[dict[str, Any]]) -> str:
    """Whether pretraining beat the untrained encoder, in words that the interval carries."""
    gained = next(row["first_minus_this"] for row in rows if row["features"] == "untrained")
    if gained["low"] is None:
        return (
            f"How far that is from chance cannot be told ({gained['why']}); docs/learning.md shows what longer runs do."
        )
    if gained["low"] > 0:
        return "Pretraining beats untrained encoders here: the interval of the difference lies above 0."
    if gained["high"] < 0:
        return (
            "Untrained encoders are better here: so short a pretraining unlearns more than it learns; "
            "docs/learning.md shows what longer runs do."
        )
    return (
        "A few minutes of pretraining do not beat untrained encoders here: the interval of the difference holds 0; "
        "docs/learning.md shows what longer runs do."
    )


def _interval(estimate: dict[str, Any] | None) -> str:
    if not estimate or estimate["value"] is None:
        return ""
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"
