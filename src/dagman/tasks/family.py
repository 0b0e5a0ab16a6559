"""Runs that differ in one thing, side by side: each a row, and each variant's mean over seeds beside the full member's.

A difference pairs runs of the same seed. That of an AUC, of a probe or after fine-tuning, has an interval too: patients
are drawn again, the same for all runs, and nothing is fitted again, as `dagman compare` does it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dagman.figures import ablation as figure
from dagman.tasks import predictions
from dagman.tasks.predictions import Predictions
from dagman.tasks.statistics import Estimate
from dagman.tasks.table import write_rows

AUC, TUNED = "probe AUC", "fine-tuned AUC"
"""Names of the measures of a linear probe and of the whole network fine-tuned."""
TITLES = {AUC: "linear probe, AUC (here)", TUNED: "fine-tuned, AUC (here)"}
"""Of their panels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judged:
    """What became of one encoder on labelled cases."""

    auc: Estimate
    predictions: Predictions | None
    """None where the features had nothing to read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probed(Judged):
    """A linear probe of one encoder."""

    features: str
    """Which were probed."""
    study: Mapping[str, Any]
    """What the probe was about."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One run."""

    variant: str
    seed: int | None
    """None for an untrained encoder."""
    status: str
    """`scored`, `untrained` or `failed: E-CODE`."""
    run: str = ""
    """Name of its folder."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Name to value, without the two AUCs."""
    probed: Probed | None = None
    tuned: Judged | None = None
    """After fine-tuning."""

    @property
    def judged(self) -> dict[str, Judged]:
        """The AUCs that there are, by name, the probe's first."""
        both = {AUC: self.probed, TUNED: self.tuned}
        return {name: found for name, found in both.items() if found}

    @property
    def values(self) -> dict[str, float]:
        """All measures, the AUCs first."""
        aucs = {name: found.auc.value for name, found in self.judged.items() if found.auc.value is not None}
        return {**aucs, **self.measures}


class Spread(NamedTuple):
    """A measure over seeds."""

    seeds: int
    mean: float
    lowest: float
    highest: float


class Summary(NamedTuple):
    """One measure of one variant."""

    variant: str
    measure: str
    over_seeds: Spread
    minus_full: Spread | None
    """Variant less full member, over the seeds that both have; None for the full member, and where they share none."""
    interval: Estimate | None
    """Of that difference's mean, over patients; None but for an AUC."""
    note: str
    """What must be known to read it, such as that there is one seed."""


def spread(values: Sequence[float]) -> Spread:
    """Mean and range of at least one value."""
    return Spread(len(values), sum(values) / len(values), min(values), max(values))


def measures(rows: Sequence[Row]) -> list[str]:
    """Names of all measures that some run has, in order."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def summaries(rows: Sequence[Row], full: str) -> list[Summary]:
    """Every measure of every variant over its seeds, and its difference from the full member's.

    Args:
        rows: Of trained runs and untrained encoders.
        full: The variant that all others are compared with.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, for AUCs of different cases.
    """
    by_variant: dict[str, dict[int | None, Row]] = {}
    for row in rows:
        by_variant.setdefault(row.variant, {})[row.seed] = row
    found = []
    for name in measures(rows):
        has = {
            variant: {seed: row for seed, row in runs.items() if name in row.values}
            for variant, runs in by_variant.items()
        }
        found += [
            _summary(name, variant, mine, {} if variant == full else has.get(full, {}))
            for variant, mine in has.items()
            if mine
        ]
    return found


def _summary(name: str, variant: str, mine: Mapping[int | None, Row], full: Mapping[int | None, Row]) -> Summary:
    over_seeds = spread([row.values[name] for row in mine.values()])
    pairs = [(mine[seed], full[seed]) for seed in mine if seed in full]
    minus = spread([one.values[name] - other.values[name] for one, other in pairs]) if pairs else None
    interval = _interval(name, pairs)
    notes = [] if None in mine or over_seeds.seeds > 1 else ["one seed: no range"]
    if minus and minus.seeds < over_seeds.seeds:
        notes.append(f"{minus.seeds} of {over_seeds.seeds} seeds in the difference")
    if interval and interval.why:
        notes.append(f"no interval: {interval.why}")
    return Summary(variant, name, over_seeds, minus, interval, "; ".join(notes))


def _interval(name: str, pairs: Sequence[tuple[Row, Row]]) -> Estimate | None:
    both = [(mine.judged.get(name), full.judged.get(name)) for mine, full in pairs]
    found = [
        (mine.predictions, full.predictions)
        for mine, full in both
        if mine and full and mine.predictions and full.predictions
    ]
    return predictions.mean_difference(found) if found else None


def write_runs(
    rows: Sequence[Row],
    facts: Mapping[str, Mapping[str, object]],
    papers: Mapping[str, Mapping[str, object]],
    path: Path,
    *,
    note: str,
) -> None:
    """Write one line for each run.

    Args:
        rows: In the order they are written.
        facts: Variant to what it is, column by column.
        papers: Variant to what the paper reports of it, in columns of their own.
        path: The CSV file.
        note: Its first line.
    """
    names, tuned = [name for name in measures(rows) if name not in TITLES], any(row.tuned for row in rows)
    told = list(dict.fromkeys(name for fact in facts.values() for name in fact))
    reported = list(dict.fromkeys(name for paper in papers.values() for name in paper))
    header = [
        *("variant", "seed", "status", "run", *told),
        *(*_with_ends(AUC), "probed features"),
        *(_with_ends(TUNED) if tuned else ()),
        *names,
        *(f"paper: {name}" for name in reported),
    ]
    body = []
    for row in rows:
        fact, paper = facts.get(row.variant, {}), papers.get(row.variant, {})
        cells = [
            *(row.variant, row.seed, row.status, row.run, *map(fact.get, told)),
            *(*_ends(row.probed), row.probed.features if row.probed else None),
            *(_ends(row.tuned) if tuned else ()),
            *map(row.measures.get, names),
            *map(paper.get, reported),
        ]
        body.append(_blank(cells))
    write_rows(path, header, body, note=note)


def _with_ends(name: str) -> tuple[str, str, str]:
    return name, f"{name} low", f"{name} high"


def _ends(found: Judged | None) -> tuple[float | None, float | None, float | None]:
    return (found.auc.value, found.auc.low, found.auc.high) if found else (None, None, None)


def write_summary(found: Sequence[Summary], path: Path, *, note: str) -> None:
    """Write one line for each measure and variant: mean and range over seeds, and the same of the difference."""
    header = (
        *("measure", "variant", "seeds", "mean", "lowest", "highest"),
        *("minus full: seeds", "minus full: mean", "minus full: lowest", "minus full: highest"),
        *("minus full: low", "minus full: high", "note"),
    )
    body = []
    for one in found:
        interval = (one.interval.low, one.interval.high) if one.interval else (None, None)
        cells = [one.measure, one.variant, *one.over_seeds, *(one.minus_full or [None] * 4), *interval, one.note]
        body.append(_blank(cells))
    write_rows(path, header, body, note=note)


def _blank(cells: Sequence[object]) -> list[object]:
    return ["" if cell is None else cell for cell in cells]


def panels(
    rows: Sequence[Row],
    found: Sequence[Summary],
    titles: Mapping[str, str],
    *,
    full: str,
    baselines: Mapping[str, Mapping[str, float]],
) -> list[figure.Panel]:
    """What the figure draws of the runs: each AUC, its difference from the full member, and other measures.

    Args:
        rows: Of trained runs.
        found: Their summaries.
        titles: Measure to the title of its panel.
        full: The variant that the others are compared with.
        baselines: AUC to variant to that of its encoder untrained.
    """
    trained, drawn = [row for row in rows if row.seed is not None], []
    for name, title in TITLES.items():
        points = _points(trained, name)
        if points or name == AUC:
            drawn.append(figure.Panel(title, points, baselines=baselines.get(name, {})))
        minus = {one.variant: one for one in found if one.measure == name and one.minus_full}
        if minus:
            drawn.append(_differences(name, points, full, minus))
    return drawn + [figure.Panel(title, _points(trained, name)) for name, title in titles.items()]


def by_place(rows: Sequence[Row], reading: str) -> dict[str, dict[str, dict[int, float]]]:
    """Place to variant to seed to a reading of the attention heads there.

    Args:
        rows: Whose measures are named `PLACE: READING`.
        reading: Which.
    """
    places = [place for place, _, what in (name.partition(": ") for name in measures(rows)) if what == reading]
    places.sort(key=lambda place: not place.startswith("stage"))  # semantic attention last: its stage may vary
    return {place: _points(rows, f"{place}: {reading}") for place in places}


def _points(rows: Sequence[Row], name: str) -> dict[str, dict[int, float]]:
    points: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.seed is not None and name in row.values:
            points.setdefault(row.variant, {})[row.seed] = row.values[name]
    return points


def _differences(
    auc: str, points: Mapping[str, Mapping[int, float]], full: str, minus: Mapping[str, Summary]
) -> figure.Panel:
    of_full = points[full]
    less = {
        name: {seed: value - of_full[seed] for seed, value in points[name].items() if seed in of_full} for name in minus
    }
    bars = {
        name: (one.interval.low, one.interval.high)
        for name, one in minus.items()
        if one.interval and one.interval.low is not None and one.interval.high is not None
    }
    return figure.Panel(f"{auc} less that of '{full}'", less, bars, zero=True)
