"""Files and folders to scans without names: every file is looked at once, by content, and nothing is decoded."""

import dataclasses
import hashlib
import itertools
import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dagman.ct import guard
from dagman.errors import DagmanError, count

PATIENT_KEY = "dagman patient hash 1"
"""The default key of `patient`. It is public: see `index`."""
_BATCH = 200
_SNIFF_BYTES = 2 * 2**30
"""Enough for any header; not for one that unpacks without end."""
_ENDINGS = re.compile(r"(\.nii\.gz|\.nii|\.nrrd|\.mha|\.gz)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that is not used, and why."""

    code: str
    source: str
    problem: str
    advice: str
    case_id: str | None = None
    ignored: bool = False
    """True for what was rightly passed over (a localizer, a README): no scan was lost."""

    @classmethod
    def of(cls, error: DagmanError, *, ignored: bool = False) -> "Problem":
        """The problem an error describes."""
        return cls(code=error.code, source=error.subject, problem=error.problem, advice=error.advice, ignored=ignored)

    def __str__(self) -> str:
        return f"{'Note:' if self.ignored else f'E-{self.code}'} {self.source}: {self.problem}; {self.advice}"

    @property
    def told(self) -> bool:
        """Whether a verb that goes on says it: what is lost, or how a file was taken; not what was passed over."""
        return not self.ignored or self.code in ("LAYOUT", "MEDMNIST", "TABLE")

    def row(self) -> dict[str, Any]:
        """A line of `rejected.jsonl`."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class Found:
    """A scan before it has its name."""

    files: tuple[Path, ...]
    kind: str
    stem: str
    patient: str | None = None


@dataclass(kw_only=True)
class Survey:
    """What is shared while several sources are looked through."""

    key: str
    limits: guard.Limits
    visited: set[tuple[int, int]] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    rows: "dict[str, tuple[Path, str]]" = field(default_factory=dict)
    """Case names and image-mask pairs of all tables, and the table and row that used each first."""
    images: "dict[Path, Found | None]" = field(default_factory=dict)
    """What each image of a table holds."""
    lost: list[Path] = field(default_factory=list)
    """Links to what is not here, as those of data sets whose files were not fetched."""

    def reject(
        self, code: str, source: object, problem: str, advice: str, *, ignored: bool = False, case_id: str | None = None
    ) -> None:
        """Note something that is not used."""
        found = Problem.of(DagmanError(code, source, problem, advice), ignored=ignored)
        self.problems.append(dataclasses.replace(found, case_id=case_id))


def short_hash(text: str) -> str:
    """Eight hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:8]


def clean_name(name: str) -> str:
    """A text as the name of a case: letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:80] or "scan"


def without_ending(name: str) -> str:
    """A file's name without what says its format."""
    return _ENDINGS.sub("", name)


def folder_of(path: Path) -> str:
    """Name of the folder that a file lies in."""
    return os.path.basename(os.path.dirname(os.path.abspath(path)))  # noqa: PTH100, PTH119, PTH120


def look_through(sources: Sequence[Path], survey: Survey) -> list[Found]:
    """Every scan in files and folders; what is not used goes to `survey.problems`.

    The files of a DICOM series may lie in several sources, as `*.dcm` gives them.
    """
    files = [(source, path) for source in sources for path in _files(source, survey)]
    facts = sniff_files([path for _, path in files], survey.limits, survey.key)
    found: list[Found] = []
    images: dict[Path, dict[str, Any]] = {}
    others: dict[Path, list[Path]] = defaultdict(list)
    ill: list[Path] = []
    for (source, path), fact in zip(files, facts, strict=True):
        if fact["kind"] == "error":
            code, problem, advice = fact["error"]
            survey.reject(code, path, problem, advice)
            ill.append(path)
        elif fact["kind"] == "other":
            others[source].append(path)
            ill.append(path)
        elif fact["kind"] == "dicom":
            # Without a UID the files of one folder are a series, and those of no two.
            name = fact["series"] or short_hash(str(Path(_place(source, path)).parent))
            images[path] = fact | {"name": name, "folder": "" if fact["series"] else str(path.absolute().parent)}
        else:
            found.append(Found(files=(path,), kind=fact["kind"], stem=without_ending(_place(source, path))))
    for (name, _, modality, patient), slices in sorted(_sorted_out(images).items()):
        if each := _series(name, patient, modality, slices, survey):
            found.append(each)
    ill += [path for path, fact in images.items() if not fact["series"] and fact["modality"] in ("CT", "unknown")]
    ill += survey.lost
    survey.lost = []
    found = _without_shortened(found, ill, survey)
    for source, paths in others.items():
        _report_others(source, paths, survey, ignored=source.is_dir())
    return found


def _sorted_out(images: dict[Path, dict[str, Any]]) -> dict[tuple[str, ...], list[tuple[Path, dict[str, Any]]]]:
    """Slices by series, modality and patient; one that lacks its patient is of the only one there is."""
    series: dict[tuple[str, ...], list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    for path, fact in images.items():
        series[fact["name"], fact["folder"], fact["modality"], fact["patient"] or ""].append((path, fact))
    named: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for key in series:
        named[key[:-1]] += [key] if key[-1] else []
    for key in [key for key in series if not key[-1] and len(named[key[:-1]]) == 1]:
        series[named[key[:-1]][0]] += series.pop(key)
    return series


def _without_shortened(found: list[Found], ill: Sequence[Path], survey: Survey) -> list[Found]:
    """Scans but for series that may lack a slice: a file that is no image stands next to theirs, with a name like them.

    One that is missing in the middle leaves a gap; one at an end would shorten the scan without a trace.
    """
    series = {path: place for place, each in enumerate(found) if each.kind == "dicom" for path in each.files}
    likes: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path in {*ill} - series.keys():
        likes[_like(path)].append(path)
    for path in series if likes else ():
        if _like(path) in likes:
            likes[_like(path)].append(path)
    may_lack: dict[int, list[Path]] = defaultdict(list)
    for names in likes.values():
        for path, places in _beside(sorted(names, key=_counting), series):
            for place in places:
                may_lack[place].append(path)
    for place, each in enumerate(found):
        if lost := may_lack.get(place):
            more = f", as {count(len(lost) - 1, 'other is', 'others are')}," if len(lost) > 1 else ""
            slices = count(len(each.files), "file", "files")
            problem = f"is empty, damaged or no image of a series{more} and may be a slice of {each.stem} ({slices})"
            advice = "copy or export it again, or move it away where it is none"
            survey.reject("SLICE", min(lost), problem, advice, case_id=each.stem)
    return [each for place, each in enumerate(found) if place not in may_lack]


def _beside(names: Sequence[Path], series: Mapping[Path, int]) -> list[tuple[Path, set[int]]]:
    """Files that are of no series, and the series next to each by name; all, where the names of series mix."""
    places = [series[path] for path in names if path in series]
    if sum(one != other for one, other in itertools.pairwise(places)) >= len(set(places)):
        return [(path, set(places)) for path in names if path not in series]
    beside: dict[Path, set[int]] = {path: set() for path in names if path not in series}
    for one_way in (names, reversed(names)):
        last: set[int] = set()
        for path in one_way:
            if path in series:
                last = {series[path]}
            else:
                beside[path] |= last
    return list(beside.items())


def _like(path: Path) -> tuple[Path, str]:
    """A file's folder, and its name without that in which slices of a series differ: numbers, or all of it in hex."""
    name = path.name.lower()
    if re.fullmatch(r"[0-9a-f-]{8,}", path.stem.lower()):
        return path.parent, "#" + path.suffix.lower()
    return path.parent, re.sub(r"[0-9a-f]{16,}|\d+", "#", name)


def _counting(path: Path) -> list[tuple[int, str]]:
    """Sorts names as people count: 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def _files(source: Path, survey: Survey) -> list[Path]:
    """The regular files of one source."""
    if source.is_dir():
        return _walk(source, survey)
    return [source] if _is_regular(source, survey) else []


def _series(
    name: str, patient: str, modality: str, slices: list[tuple[Path, dict[str, Any]]], survey: Survey
) -> Found | None:
    first = slices[0][0]
    place = first if len(slices) == 1 else first.parent
    if modality != "CT":
        kind = modality or "unnamed"
        problem = f"a series of {count(len(slices), f'{kind} object', f'{kind} objects')}, not CT"
        survey.reject("MODALITY", place, problem, "give CT images, or leave it out")
        return None
    files = tuple(path for path, fact in slices if not fact["localizer"])
    if len(files) < len(slices):
        out = len(slices) - len(files)
        problem = f"{count(out, 'localizer image is', 'localizer images are')} left out of a series of {len(slices)}"
        survey.reject("LOCALIZER", place, problem, "give the axial series if it is missing here", ignored=True)
    if not files:
        return None
    return Found(files=files, kind="dicom", stem=f"ct-{name}", patient=patient or None)


def _report_others(source: Path, others: list[Path], survey: Survey, *, ignored: bool) -> None:
    endings = Counter(path.suffix.lower()[:12] or "without ending" for path in others)
    listed = ", ".join(f"{number} {ending}" for ending, number in sorted(endings.items())[:5])
    problem = f"{count(len(others), 'file is no scan', 'files are no scans')} ({listed})"
    one = "it" if len(others) == 1 else "one of them"
    advice = f"give .nii, .nii.gz, .nrrd, .mha or DICOM files if {one} should be"
    survey.reject("FORMAT", source, problem, advice, ignored=ignored)


def _place(source: Path, path: Path) -> str:
    """Where a file lies, counted from its source, so that its name is the same on every machine."""
    return path.name if path == source else f"{source.absolute().name}/{path.relative_to(source).as_posix()}"


def sniff_files(paths: Sequence[Path], limits: guard.Limits, key: str = PATIENT_KEY) -> list[dict[str, Any]]:
    """What each file is, by its content, in guarded batches; a batch that fails is gone through file by file."""
    limits = dataclasses.replace(limits, memory_bytes=min(limits.memory_bytes, _SNIFF_BYTES))
    facts: list[dict[str, Any]] = []
    for start in range(0, len(paths), _BATCH):
        batch = [str(path) for path in paths[start : start + _BATCH]]
        try:
            facts += guard.run("sniff", Path(batch[0]), {"paths": batch, "key": key}, limits)[0]
        except DagmanError as error:
            if len(batch) > 1:
                facts += [fact for path in batch for fact in sniff_files([Path(path)], limits, key)]
            else:
                facts.append({"kind": "error", "error": [error.code, error.problem, error.advice]})
    return facts


def _walk(source: Path, survey: Survey) -> list[Path]:
    """Regular files below a folder, sorted, each once however many links lead to it."""
    files: list[Path] = []
    passed: dict[str, list[Path]] = defaultdict(list)
    folders = [source]
    while folders:
        folder = folders.pop()
        if folder.name == "segmentations" and (folder.parent / "ct.nii.gz").is_file() and folder != source:
            passed["masks as TotalSegmentator writes them"].append(folder)
            continue
        why, identity = _new(folder, survey, stat.S_ISDIR)
        if why:
            passed[why].append(folder)
            continue
        survey.visited.add(identity)
        try:
            names = sorted(os.listdir(folder))  # noqa: PTH208
        except OSError:
            survey.reject("PERM", folder, "may not be listed", "give yourself the right to read it")
            continue
        below = []
        for name in names:
            path = folder / name
            if name.startswith("."):
                passed["hidden"].append(path)
            elif path.is_dir():
                below.append(path)
            else:
                why, identity = _new(path, survey, stat.S_ISREG)
                if why:
                    passed[why].append(path)
                    survey.lost += [path] * (not path.exists())
                else:
                    survey.visited.add(identity)
                    files.append(path)
        folders += reversed(below)
    for why, paths in sorted(passed.items()):
        problem = f"{count(len(paths), 'entry is', 'entries are')} passed over ({why}), such as {paths[0].name}"
        survey.reject("SKIPPED", source, problem, "give scans among them as a source of their own", ignored=True)
    return sorted(files)


def _new(path: Path, survey: Survey, wanted: Any) -> tuple[str, tuple[int, int]]:
    try:
        status = path.stat()
    except OSError:
        return "link to nothing or unreadable", (0, 0)
    identity = (status.st_dev, status.st_ino)
    if not wanted(status.st_mode):
        return "no regular file", identity
    return ("already seen under another name" if identity in survey.visited else ""), identity


def _is_regular(source: Path, survey: Survey) -> bool:
    why, identity = _new(source, survey, stat.S_ISREG)
    if why:
        survey.reject("SKIPPED", source, f"is passed over ({why})", "give a file or a folder of scans")
    survey.visited.add(identity)
    return not why
