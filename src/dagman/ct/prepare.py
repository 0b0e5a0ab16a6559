"""Scans as hospitals keep them become a store of equal voxels: oriented, resampled, cropped to the body, checked.

One bad scan never stops the others, and the same command continues where it was stopped. The stored arrays depend on
the sources and the settings alone: not on the number of workers, the order of the files, or on being killed and run
again; so does the manifest, apart from `seconds`. What is finished is noted in a journal beside the manifest
(`.done.jsonl`), which knows source files by size and time, and is no part of what the store holds.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

from dagman.config import difference, to_dict
from dagman.ct import crops, store
from dagman.ct.case import (
    PrepareConfig,
    Prepared,
    Row,
    fingerprint,
    is_of,
    is_stored,
    named_anew,
    origin_of,
    prepare_case,
    prepare_volume,
    refuse_other_case,
    rejected_row,
    relative,
    source_name,
)
from dagman.ct.fanout import stoppable, unordered
from dagman.ct.index import index, patient_key_id, refuse_missing, refuse_nothing
from dagman.errors import DagmanError, ExitCode, count, printable
from dagman.files import (
    TEMPORARY_SUFFIX,
    append_line,
    fault_point,
    folder_lock,
    json_line,
    read_lines,
    refuse_no_utf8,
    repair_log,
    write_json,
    write_text,
)
from dagman.types import Scan

__all__ = ["PrepareConfig", "Prepared", "Summary", "prepare", "prepare_volume"]

REJECTED = "rejected.jsonl"
_KEY = "patient_key"
"""Setting of a store that holds DICOM: the `patient_key_id` of its patients."""
JOURNAL = ".done.jsonl"
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a preparation came to."""

    stored: int
    """Cases prepared now."""
    already_there: int
    """Cases that an earlier run had finished, unchanged since."""
    kept: int
    """Cases in the store whose source is not among those given now."""
    rejected: int
    given: dict[str, str] = field(default_factory=dict)
    """Where each case lies whose source is among those given now: its file, or the folder of its series."""
    codes: dict[str, int] = field(default_factory=dict)
    """Rejections by error code, most frequent first."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Cases with the same voxels."""
    notes: tuple[str, ...] = ()
    """What was assumed of a source, or left alone in it."""
    seconds: float = 0.0

    @property
    def exit_code(self) -> ExitCode:
        """0; 3 when something was rejected; 5 when the store is empty."""
        if not self.stored + self.already_there + self.kept:
            return ExitCode.NOTHING_USABLE
        return ExitCode.REJECTED if self.rejected else ExitCode.OK


def prepare(
    sources: Sequence[Path | str] | Path | str,
    output: Path | str,
    config: PrepareConfig | None = None,
    *,
    workers: int | None = None,
    progress: Tell | None = None,
) -> Summary:
    """Prepare every CT in `sources` into the store `output`; run again, it continues, and adds what is new.

    A source that changed (size or time) is prepared anew, what was rejected is tried again, and a case whose source is
    no longer given stays; under its new name alone, where that has changed with what else is given (`index`).

    Args:
        sources: Files, folders of NIfTI / NRRD / MHA, trees of DICOM, data sets, tables (`index`); or one of them.
        output: The store; outside of all sources.
        config: Settings; those of the paper, but anti-aliased, by default.
        workers: Processes; None: those a surrounding `joblib.parallel_config` names, else 1, in this process.
        progress: Called with (cases done, cases in all, the case or error that came last).

    Raises:
        DagmanError: `E-GONE` for a source that does not exist; `E-NODATA` (exit code 5) where no scan is found;
            `E-OUTPUT`, `E-SETTINGS`, `E-LOCKED` (4), `E-DISK` (6), `E-STOPPED` (75).
    """
    started = time.monotonic()
    config = config or PrepareConfig()
    given = [Path(source) for source in ([sources] if isinstance(sources, Path | str) else sources)]
    output = Path(output)
    refuse_missing(given)
    refuse_overlap(given, output)
    store.require_storage(config.storage, output)
    with folder_lock(output):
        _adopt_settings(output, config)
        _remove_leftovers(output)
        try:
            with stoppable():
                run = _Run(given, output, config)
                if any(scan.kind == "dicom" for scan in run.scans.values()):
                    _adopt_key(output)
                run.work(workers, progress or _silent)
                return run.finish(started)
        except KeyboardInterrupt:
            raise DagmanError(
                "STOPPED",
                output,
                "stopped before every case was done",
                "run the same command to continue",
                exit_code=ExitCode.STOPPED,
            ) from None


def _silent(_done: int, _total: int, _note: str) -> None:
    """Tell nobody."""


class _Run:
    """One run of `prepare`, holding the lock."""

    def __init__(self, sources: Sequence[Path], output: Path, config: PrepareConfig) -> None:
        self.sources, self.output, self.config = sources, output, config
        scans, problems = index(sources)
        refuse_nothing(sources, scans, problems)
        self.scans = {scan.case_id: scan for scan in sorted(scans, key=lambda scan: scan.case_id)}
        self.rejected = [
            rejected_row(problem.case_id, relative(Path(problem.source), sources), problem)
            for problem in problems
            if not problem.ignored
        ]
        self.notes = tuple(
            f"{problem.source}: {problem.problem}" for problem in problems if problem.ignored and problem.told
        )
        repair_log(output / JOURNAL)
        self.journal = {entry["case_id"]: entry for entry in read_lines(output / JOURNAL, required=("case_id", "row"))}
        self.done: dict[str, Row] = {}
        self.attempted: set[str] = set()
        self.num_stored = 0

    def work(self, workers: int | None, tell: Tell) -> None:
        """Prepare what is not finished."""
        pending = self._pending()
        _check_space(self.output, pending)
        if any(scan.case_id in self.journal for scan in pending):
            # A case about to change leaves the manifest first: at no time does it list what is not there.
            self._commit()
        tell(len(self.done), len(self.scans), "")
        prepare_one = partial(prepare_case, sources=tuple(self.sources), output=self.output, config=self.config)
        total, tried = len(self.scans), len(self.done)
        # The items of one file share what was read of it, so they stay in this process.
        shared = [scan for scan in pending if scan.index is not None]
        others = [scan for scan in pending if scan.index is None]
        for scans, processes in ((shared, 1), (others, workers)):
            with closing(unordered(prepare_one, scans, processes, self._lost)) as outcomes:
                for scan, outcome in outcomes:
                    tried += 1
                    self._note(outcome)
                    tell(tried, total, scan.case_id if "row" in outcome else f"{scan.case_id}: E-{outcome['code']}")

    def _note(self, outcome: Row) -> None:
        """Keep an outcome; a stored case is on record before the next one counts."""
        fault_point("prepare.before_journal")
        if "row" in outcome:
            append_line(self.output / JOURNAL, outcome)
            self.done[outcome["case_id"]] = outcome
            self.num_stored += 1
        else:
            self.rejected.append(outcome)
        fault_point("prepare.after_case")

    def _lost(self, scan: Scan) -> Row:
        """The rejection of a scan that ended its process twice."""
        size = sum(path.stat().st_size for path in scan.files if path.exists()) / 2**20
        problem = f"ended its process twice, most often for want of memory ({size:.0f} MiB on disk)"
        error = DagmanError("MEMORY", scan.source, problem, "free memory, or leave this scan out")
        return rejected_row(scan.case_id, source_name(scan, self.sources), error)

    def _pending(self) -> list[Scan]:
        """What is to be prepared; the finished is noted, with what a table says of it now."""
        pending = []
        for scan in self.scans.values():
            try:
                now = fingerprint(scan)
                if self._is_finished(scan, now):
                    entry = self.journal[scan.case_id]
                    self.done[scan.case_id] = {**entry, **now, "row": named_anew(entry["row"], scan)}
                else:
                    pending.append(scan)
            except DagmanError as error:
                self.rejected.append(rejected_row(scan.case_id, source_name(scan, self.sources), error))
        self.attempted = {scan.case_id for scan in pending}
        return pending

    def _is_finished(self, scan: Scan, now: Row) -> bool:
        """Whether the store holds this scan as it is now."""
        entry = self.journal.get(scan.case_id)
        if entry is None or not is_stored(self.output, entry["row"], self.config.storage):
            return False
        if entry["place"] != now["place"]:
            refuse_other_case(scan, entry["row"])
            return is_of(scan, entry["row"])
        moved = "mask_place" in entry and entry["mask_place"] != now["mask_place"]  # not said by earlier versions
        return bool(entry["files"] == now["files"]) and (not moved or is_of(scan, entry["row"]))

    def _kept(self) -> dict[str, Row]:
        """Stored cases that this run has no say on."""
        gone = self.attempted | self._renamed().keys()
        return {
            case_id: entry for case_id, entry in self.journal.items() if case_id not in gone and self._is_stored(entry)
        }

    def _renamed(self) -> dict[str, str]:
        """Old and new names of scans that the store has under two since names depend on what else is given."""
        names = {
            origin_of(entry): case_id
            for case_id, entry in (self.journal | self.done).items()
            if case_id in self.done or (case_id not in self.attempted and self._is_stored(entry))
        }
        names |= {origin_of(entry): case_id for case_id, entry in self.done.items()}
        names.pop(None, None)
        return {
            case_id: name
            for case_id, entry in self.journal.items()
            if case_id not in self.scans and (name := names.get(origin_of(entry), case_id)) != case_id
        }

    def _is_stored(self, entry: Row) -> bool:
        return is_stored(self.output, entry["row"], self.config.storage)

    def _commit(self) -> list[Row]:
        """Write the manifest of what is done and kept."""
        entries = [entry for _, entry in sorted((self._kept() | self.done).items())]
        write_text(self.output / store.MANIFEST, "".join(json_line(entry["row"]) for entry in entries))
        return entries

    def finish(self, started: float) -> Summary:
        """Write manifest and rejections, remove what they do not list, and count."""
        renamed = self._renamed()
        entries = self._commit()
        fault_point("prepare.after_manifest")
        rejected = sorted(self.rejected, key=lambda row: (row["source"], row["code"], row["problem"]))
        write_text(self.output / REJECTED, "".join(map(json_line, rejected)))
        write_text(self.output / JOURNAL, "".join(map(json_line, entries)))
        rows = [entry["row"] for entry in entries]
        _remove_unlisted(self.output, rows)
        same: dict[str, list[str]] = {}
        for row in rows:
            same.setdefault(row["voxel_sha256"], []).append(row["case_id"])
        empty = [str(row["case_id"]) for row in rows if row["mask"] and not row["mask"]["voxels"]]
        if empty:
            self.notes = (*self.notes, crops.told_empty(empty))
        if renamed:
            old, new = min(renamed.items())
            counted = count(len(renamed), "case has another name now", "cases have other names now")
            self.notes = (*self.notes, f"{counted}, such as {new}, which was {old}")
        return Summary(
            stored=self.num_stored,
            already_there=len(self.done) - self.num_stored,
            kept=len(rows) - len(self.done),
            rejected=len(rejected),
            given={case_id: printable(self.scans[case_id].source) for case_id in sorted(self.done)},
            codes=dict(Counter(row["code"] for row in rejected).most_common()),
            duplicates=tuple(tuple(cases) for cases in same.values() if len(cases) > 1),
            notes=self.notes,
            seconds=time.monotonic() - started,
        )


def refuse_overlap(sources: Sequence[Path], output: Path) -> None:
    """Sources are never written to, a store is no source, and its path is UTF-8."""
    refuse_inside(sources, output)
    refuse_no_utf8(output, "OUTPUT", "choose another output folder, or rename the one it lies in")
    for source in (Path(source).resolve() for source in sources):
        if source.is_relative_to(output.resolve()):
            raise _overlap(output, f"holds the source {source}")


def refuse_inside(sources: Sequence[Path], output: Path) -> None:
    """Folders of scans are never written to: what is written there would be read as a scan."""
    for source in (Path(source).resolve() for source in sources):
        if source.is_dir() and output.resolve().is_relative_to(source):
            raise _overlap(output, f"lies inside the source {source}")


def _overlap(output: Path, problem: str) -> DagmanError:
    advice = "choose an output folder beside the sources"
    return DagmanError("OUTPUT", output, problem, advice, exit_code=ExitCode.REFUSED)


def _adopt_settings(output: Path, config: PrepareConfig) -> None:
    """Write the settings of a new store; refuse to mix others into one that holds a case."""
    path = output / store.SETTINGS
    wanted = {"format": store.FORMAT, **to_dict(config)}
    if not path.exists():
        if (output / JOURNAL).exists() or (output / store.MANIFEST).exists():
            raise _settings_error(output, f"has lost its {store.SETTINGS}")
        foreign = sorted(found.name for found in output.iterdir() if not found.name.startswith("."))
        if foreign:
            raise DagmanError(
                "OUTPUT",
                output,
                f"holds other things ({', '.join(foreign[:3])})",
                "choose an empty or new folder for the store",
                exit_code=ExitCode.REFUSED,
            )
        write_json(path, wanted)
        return
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        raise _settings_error(output, f"has an unreadable {store.SETTINGS}") from None
    if lines := difference({name: value for name, value in known.items() if name != _KEY}, wanted):
        if "format" not in known or any(read_lines(output / name) for name in (JOURNAL, store.MANIFEST)):
            raise _settings_error(output, f"was prepared otherwise ({', '.join(lines)})")
        write_json(path, wanted)


def _adopt_key(output: Path) -> None:
    """One key hashes the patients of a store: two would make two patients of one, in two folds."""
    path = output / store.SETTINGS
    known = json.loads(path.read_text())
    own = patient_key_id()
    if known.setdefault(_KEY, own) != own:
        raise _settings_error(output, "hashes its patients with another DAGMAN_PATIENT_KEY")
    write_json(path, known)


def _settings_error(output: Path, problem: str) -> DagmanError:
    advice = "give the same settings, or choose a new output"
    return DagmanError("SETTINGS", output, problem, advice, exit_code=ExitCode.REFUSED)


def _remove_leftovers(output: Path) -> None:
    """Delete what a killed run left half-written; the lock says that nobody is at it."""
    for folder in (output, *(output / kind for kind in get_args(store.Kind))):
        for path in folder.glob(f".*{TEMPORARY_SUFFIX}*"):
            path.unlink()


def _remove_unlisted(output: Path, rows: Sequence[Row]) -> None:
    """Delete arrays that the manifest does not list: those of cases that have since been rejected."""
    for kind in get_args(store.Kind):
        cases = {row["case_id"] for row in rows if kind in store.recorded(row)}
        for suffix in store.SUFFIXES.values():
            for path in (output / kind).glob(f"*{suffix}"):
                if path.name.removesuffix(suffix) not in cases:
                    path.unlink()


def _check_space(output: Path, pending: Sequence[Scan]) -> None:
    """Refuse to start what cannot end: a store is seldom smaller than a twentieth of its sources.

    Raises:
        DagmanError: `E-DISK`, exit code 6.
    """
    sizes = {
        (path, scan.case_id if scan.index is None else ""): path.stat().st_size
        for scan in pending
        for path in scan.files
        if path.exists()
    }
    needed, free = sum(sizes.values()) // 20, shutil.disk_usage(output).free
    if needed > free:
        raise DagmanError(
            "DISK",
            output,
            f"has {free / 2**30:.1f} GiB free, where {len(pending)} scans need {needed / 2**30:.1f} GiB at the least",
            "free space or choose another output folder, then run the same command again",
            exit_code=ExitCode.RESOURCES,
        )
