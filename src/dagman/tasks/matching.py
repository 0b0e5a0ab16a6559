"""Predictions of any tool beside their references: matched by name, compared only where they share one grid."""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dagman import files
from dagman.ct import grid, layouts
from dagman.ct.index import index
from dagman.ct.read import read, read_mask, read_mask_of
from dagman.errors import DagmanError, ExitCode
from dagman.figures import segmentation as figure
from dagman.tasks import segmentation_scores
from dagman.tasks.classes import Classes, choose
from dagman.tasks.segmentation_scores import Row, compare
from dagman.tasks.study import agreed
from dagman.types import Scan, Volume

_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
_ENDINGS = re.compile(r"[_.-](segmentation|seg|mask|labels?|gtv|gt|pred|prediction)$", re.IGNORECASE)
TOLERANCE = 1e-3
"""Of spacings, relative; corners may lie this share of a voxel times 50 apart."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A case, and where its two label maps lie."""

    case_id: str
    patient: str | None
    reference: Path
    prediction: Path | None
    """None where there is none."""
    scan: Scan | None = None
    """Its CT, where a table or data set names it."""

    @property
    def split(self) -> str:
        """That its table or data set puts it in."""
        return (self.scan and self.scan.split) or "none"


def references(source: Path) -> tuple[list[Pair], list[DagmanError]]:
    """The references of a source, and its rows that cannot be used.

    Args:
        source: Folder of label maps, a CSV table `case_id,image,mask[,patient]`, an nnU-Net or Decathlon folder, or a
            MONAI datalist.

    Raises:
        DagmanError: `E-GONE` for what does not exist; `E-DUPCASE`, exit code 4, for two files of one name; what is
            wrong with the first row where none can be used.
    """
    listed = layouts.lists(source)
    if source.suffix.lower() != ".csv" and not (listed and layouts.is_whole(source, listed)):
        return _folder(source), []
    scans, problems = index([source])
    lost = [
        DagmanError(each.code, each.source, each.problem, each.advice, exit_code=ExitCode.REFUSED)
        for each in problems
        if not each.ignored
    ]
    kept = [
        Pair(case_id=scan.case_id, patient=scan.patient, reference=scan.mask, prediction=None, scan=scan)
        for scan in scans
        if scan.mask is not None
    ]
    if lost and not kept:
        raise lost[0]
    return kept, lost


def _matched(paths: list[Path], wanted: list[Pair], reference: Path) -> tuple[list[Pair], list[Path]]:
    """Each case with the file that bears its name, or its name and an ending; and the files that are of no case."""
    cases = {each.case_id.lower() for each in wanted}
    own = _by_name([path for path in paths if _plain(path).lower() in cases], _plain)
    others = _by_name([path for path in paths if path not in own.values()], _stem)
    for name in own.keys() & others.keys():
        raise _two_files(others[name], own[name], name)
    found = own | others
    by_case = [found.get(each.case_id.lower()) for each in wanted]
    free = {name: path for name, path in found.items() if path not in by_case}
    for name, path in free.items():
        if len(fits := [each.case_id for each in wanted if name in _names(each)]) > 1:
            raise DagmanError(
                "DUPCASE",
                path,
                f"fits {len(fits)} cases ({', '.join(fits[:5])})",
                "name predictions by case: CASE_ID.nii.gz",
                exit_code=ExitCode.REFUSED,
            )
    matched = [
        replace(each, prediction=path or next((free[name] for name in _names(each) if name in free), None))
        for each, path in zip(wanted, by_case, strict=True)
    ]
    used = {each.prediction for each in matched}
    if not used - {None}:
        first, other = next(iter(found.values()), None), wanted[0].reference if wanted else None
        raise DagmanError(
            "NODATA",
            reference,
            f"no prediction fits a reference by name ({len(found)} and {len(wanted)}; such as "
            f"{first.name if first else 'none'} and {other.name if other else 'none'})",
            "name predictions by case, CASE_ID.nii.gz, or as the references or CTs are",
            exit_code=ExitCode.NOTHING_USABLE,
        )
    return matched, [path for path in found.values() if path not in used]


def _names(pair: Pair) -> list[str]:
    """That a prediction of a case may bear in place of its own: its reference's, or its CT's."""
    images = pair.scan.files if pair.scan and len(pair.scan.files) == 1 else ()
    return [_stem(path).lower() for path in (pair.reference, *images)]


def _folder(folder: Path) -> list[Pair]:
    named = _by_name(_label_maps([folder]), _stem)
    return [
        Pair(case_id=_stem(path), patient=None, reference=path, prediction=None) for _, path in sorted(named.items())
    ]


def _by_name(paths: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        name = name_of(path).lower()
        if name in named:
            raise _two_files(path, named[name], name)
        named[name] = path
    return named


def _two_files(path: Path, other: Path, case: str) -> DagmanError:
    advice = "give one label map for each case"
    return DagmanError("DUPCASE", path, f"and {other} are both of case {case}", advice, exit_code=ExitCode.REFUSED)


def _label_maps(sources: Sequence[Path]) -> Iterator[Path]:
    for source in sources:
        if not source.exists():
            raise DagmanError("GONE", source, "does not exist", "give a file or a folder that does")
        inside = sorted(source.iterdir()) if source.is_dir() else [source]
        yield from (path for path in inside if path.name.lower().endswith(_SUFFIXES) and not path.name.startswith("."))


def _plain(path: Path) -> str:
    """A file's name without suffix."""
    return next((path.name[: -len(each)] for each in _SUFFIXES if path.name.lower().endswith(each)), path.name)


def _stem(path: Path) -> str:
    """A file's name without suffix and ending."""
    return _ENDINGS.sub("", _plain(path))


def read_pair(pair: Pair) -> tuple[Volume, Volume]:
    """Prediction and reference, both turned to RAS+; a case without prediction is predicted empty.

    Raises:
        DagmanError: As `ct.read.read_mask`; `E-MASK`, exit code 4, where they do not lie on one grid: other numbers of
            voxels, spacing, direction or place.
    """
    reference = _reference(pair)
    if pair.prediction is None:
        return replace(reference, hu=np.zeros_like(reference.hu)), reference
    predicted = read_mask(pair.prediction)
    for problem in _differences(predicted, reference):
        raise DagmanError(
            "MASK",
            pair.prediction,
            f"does not lie where {pair.reference.name} lies: {problem}",
            "resample it onto the reference's grid (nearest neighbour), or let its tool write the input's grid",
            exit_code=ExitCode.REFUSED,
        )
    return predicted, reference


def _reference(pair: Pair) -> Volume:
    """The reference; of a table, as it was drawn on its CT, such as structures of an RTSTRUCT."""
    mask = read_mask_of(pair.scan, read(pair.scan)) if pair.scan else None
    return mask or read_mask(pair.reference)


def _differences(one: Volume, other: Volume) -> Iterator[str]:
    """What differs, the plainest first."""
    if one.hu.shape != other.hu.shape:
        yield f"{_sides(one.hu.shape)} and {_sides(other.hu.shape)} voxels"
    ours, theirs = np.array(one.spacing_mm), np.array(other.spacing_mm)
    if np.abs(ours / theirs - 1).max() > TOLERANCE:
        yield f"voxels of {_sides(ours)} and {_sides(theirs)} mm"
    turned = np.abs(one.affine[:3, :3] / ours - other.affine[:3, :3] / theirs).max()
    if turned > TOLERANCE * 10:
        yield f"directions differ by {turned:.3g}"
    apart = grid.corner_distance_mm(one.affine, other.affine, one.hu.shape)
    if apart > 50 * TOLERANCE * theirs.min():
        yield f"corners lie {apart:.3g} mm apart (moved or mirrored)"


def _sides(values: np.ndarray | tuple[int, ...]) -> str:
    return " x ".join(f"{value:g}" for value in np.round(values, 4))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What `score` found."""

    rows: tuple[Row, ...]
    classes: Classes
    patients_known: bool
    rejected: tuple[DagmanError, ...]
    """References that could not be compared, and rows of the table that are none; they are in no score."""
    unmatched: tuple[Path, ...]
    """Predictions without reference."""
    scored: dict[str, Pair]
    """By case."""
    strange: dict[str, tuple[int, ...]]
    """Label values of predictions that no reference holds, by case; they count as background."""
    left_out: dict[str, int]
    """References of splits that no prediction is of, by split: they were not to be predicted, and are in no score."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Cases without prediction: what their references hold counts as missed."""
        return tuple(case for case, pair in self.scored.items() if pair.prediction is None)

    @property
    def never_predicted(self) -> tuple[str, ...]:
        """Classes that references of predicted cases hold and no prediction does."""
        states: dict[str, set[str]] = {}
        for row in self.rows:
            if row.case_id not in self.missing:
                states.setdefault(row.name, set()).add(row.scores.state)
        return tuple(name for name, found in states.items() if "missed" in found and not found & {"both", "invented"})

    @property
    def dice_of_predicted(self) -> dict[str, float]:
        """Mean Dice of each class over the cases that have a prediction and whose reference holds the class."""
        dice: dict[str, list[float]] = {}
        for row in self.rows:
            if row.case_id not in self.missing and row.scores.lesions:
                dice.setdefault(row.name, []).append(row.scores.dice)
        return {name: float(np.mean(values)) for name, values in dice.items()}

    @property
    def group_by(self) -> Literal["patient", "case"]:
        """What intervals draw."""
        return "patient" if self.patients_known else "case"


def score(
    predictions: Sequence[Path],
    reference: Path,
    *,
    labels: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scored:
    """Compare the predictions of any tool with references, matched by name.

    A prediction is of the case whose name it bears; one that bears none is of the reference or CT with its name. Names
    count without suffix and without endings such as `_seg`, `_mask`, `_gtv`, `_pred`.

    Args:
        predictions: Folders of label maps.
        reference: As `references`.
        labels: As `classes.choose`; all labels of the references without.
        progress: Hears of each finished case.

    Raises:
        DagmanError: As `references`; `E-DUPCASE` for a prediction that fits two cases; `E-NODATA`, exit code 5, where
            nothing fits together or no pair can be compared; `E-LABEL`.
    """
    wanted, lost = references(reference)
    matched, unmatched = _matched(list(_label_maps(predictions)), wanted, reference)
    predicted_splits = {pair.split for pair in matched if pair.prediction}
    left_out = Counter(pair.split for pair in matched if pair.split not in predicted_splits)
    matched = [pair for pair in matched if pair.split in predicted_splits]
    seen: set[int] = set()
    for pair in matched:
        with _noted([]):
            seen |= set(np.unique(_reference(pair).hu).tolist())
    classes = choose(labels, seen, agreed(pair.scan.called for pair in matched if pair.scan))
    rejected, rows, scored, strange = list(lost), list[Row](), dict[str, Pair](), dict[str, tuple[int, ...]]()
    for done, pair in enumerate(matched, 1):
        with _noted(rejected):
            predicted, truth = read_pair(pair)
            rows += _rows(pair, predicted, truth, classes)
            scored[pair.case_id] = pair
            if others := set(np.unique(predicted.hu).tolist()) - seen - {0}:
                strange[pair.case_id] = tuple(sorted(others))
        if progress:
            progress(done, len(matched))
    if not any(pair.prediction for pair in scored.values()):
        raise DagmanError(
            "NODATA",
            reference,
            f"no prediction of {len(matched)} cases can be compared (first: {rejected[0]})",
            "mend the first, then run again",
            exit_code=ExitCode.NOTHING_USABLE,
        )
    return Scored(
        rows=tuple(rows),
        classes=classes,
        patients_known=all(pair.patient for pair in scored.values()),
        rejected=tuple(rejected),
        unmatched=tuple(unmatched),
        scored=scored,
        strange=strange,
        left_out=dict(left_out),
    )


def _rows(pair: Pair, predicted: Volume, truth: Volume, classes: Classes) -> list[Row]:
    """Rows of one case; without prediction, of the classes that its reference holds."""
    rows = compare(
        classes.numbers(predicted.hu),
        classes.numbers(truth.hu),
        classes,
        truth.spacing_mm,
        case_id=pair.case_id,
        patient=pair.patient,
    )
    if pair.prediction is not None:
        return rows
    return [replace(row, note="has no prediction") for row in rows if row.scores.state == "missed"]


@contextlib.contextmanager
def _noted(problems: list[DagmanError]) -> Iterator[None]:
    """Keep a case's error and go on."""
    try:
        yield
    except DagmanError as error:
        if error.exit_code == ExitCode.RESOURCES:
            raise
        problems.append(error)


def draw(found: Scored, folder: Path) -> Path | None:
    """Write `cases.png`: the cases with the lowest, middle and highest Dice, over their CT where it is known."""
    scenes = []
    for case in segmentation_scores.shown(found.rows):
        pair = found.scored[case]
        predicted, truth = read_pair(pair)
        dice = segmentation_scores.mean_dice([row for row in found.rows if row.case_id == case])
        scenes.append(
            figure.Scene(
                title=f"{case}: Dice {dice:.3f}" + ("" if pair.prediction else ", no prediction"),
                hu=None if pair.scan is None else read(pair.scan).hu,
                reference=found.classes.numbers(truth.hu),
                predicted=found.classes.numbers(predicted.hu),
                spacing_mm=truth.spacing_mm,
            )
        )
    if not scenes:
        return None
    title = "cases with the lowest, the middle and the highest Dice"
    files.write_bytes(folder / "cases.png", figure.png(scenes, title, found.classes.names))
    return folder / "cases.png"
