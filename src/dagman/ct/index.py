"""Files, folders and tables to a list of named scans."""

import hmac
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dagman.ct import guard, layouts, table
from dagman.ct.sources import medmnist
from dagman.ct.store import MANIFEST, SETTINGS
from dagman.ct.survey import PATIENT_KEY, Found, Problem, Survey, clean_name, folder_of, look_through, short_hash
from dagman.errors import DagmanError, ExitCode
from dagman.types import Scan


def index(
    sources: Sequence[Path | str], *, key: str | None = None, limits: guard.Limits | None = None
) -> tuple[list[Scan], list[Problem]]:
    """List every CT in files, folders, DICOM trees, data sets and tables, in an order that no file system decides.

    `patient` is the table's value, or a keyed hash of the DICOM PatientID (HMAC-SHA256, 12 hexadecimal digits). The
    hash keeps names out of outputs and still groups a patient's scans. With the public default key, whoever guesses
    a PatientID can confirm it; give a secret `key` to prevent that, and the same key to all data of a study.

    Args:
        sources: Scan files, folders of scan files or DICOM trees, or CSV tables
            `case_id,image[,label][,mask][,split][,patient]` with paths relative to the table; data sets as nnU-Net and
            the Medical Segmentation Decathlon keep them, and MONAI datalists (`dagman.ct.layouts`); `.npz` of MedMNIST.
        key: For the hashes of PatientID and SeriesInstanceUID; by default the environment's `DAGMAN_PATIENT_KEY`,
            else the public one.
        limits: What looking at 200 files may cost.

    Returns:
        Scans sorted by `case_id`, and everything that is not used.

    Raises:
        DagmanError: `E-GONE` when a source does not exist.
    """
    given = [Path(source) for source in sources]
    survey = Survey(key=key or patient_key(), limits=limits or guard.Limits())
    refuse_missing(given)
    tables = [source for source in given if source.suffix.lower() == ".csv" and source.is_file()]
    scans = [scan for source in tables for scan in table.read(source, survey)]
    packed = [source for source in given if source.suffix.lower() == ".npz" and source.is_file()]
    scans += [scan for source in packed for scan in medmnist.scans(source, survey)]
    lists = {source: layouts.lists(source) for source in given if source not in tables + packed}
    scans += [scan for listed in lists.values() for path in listed for scan in layouts.read(path, survey)]
    walked = [source for source, listed in lists.items() if not layouts.is_whole(source, listed)]
    for source in walked:
        if source.is_dir() and not any(path.is_file() for path in source.rglob("*")):
            survey.reject("NODATA", source, "holds no file", "give the folder that holds the scans")
    found = look_through(walked, survey)
    taken = {scan.case_id for scan in scans}
    scans += [_named(each, case_id) for each, case_id in zip(found, _case_ids(found, taken), strict=True)]
    return sorted(scans, key=lambda scan: scan.case_id), survey.problems


def patient_key() -> str:
    """What PatientIDs are hashed with where nobody gives another key."""
    return os.environ.get("DAGMAN_PATIENT_KEY") or PATIENT_KEY


def patient_key_id() -> str:
    """Eight hexadecimal digits that tell keys of patients apart, and not what they are."""
    return hmac.new(patient_key().encode(), b"key", "sha256").hexdigest()[:8]


def refuse_missing(sources: Sequence[Path]) -> None:
    """Refuse a source that does not exist.

    Raises:
        DagmanError: `E-GONE`.
    """
    for source in sources:
        if not source.exists():
            raise DagmanError("GONE", source, "does not exist", "give a file or a folder that does")


def refuse_nothing(sources: Sequence[Path], scans: Sequence[Scan], problems: Sequence[Problem]) -> None:
    """Refuse sources in which `index` found neither a scan nor anything wrong.

    Raises:
        DagmanError: `E-NODATA`, exit code 5.
    """
    if scans or any(not problem.ignored for problem in problems):
        return
    made = [source for source in sources if (source / MANIFEST).is_file() and (source / SETTINGS).is_file()]
    subject = ", ".join(map(str, made or sources))
    problem = "is a prepared store, which holds no scan as it was made" if made else "holds no scan"
    advice = "give the scans themselves" if made else f"see what each file is with `dagman check {sources[0]}`"
    raise DagmanError("NODATA", subject, problem, advice, exit_code=ExitCode.NOTHING_USABLE)


def _named(found: Found, case_id: str) -> Scan:
    return Scan(case_id=case_id, files=found.files, kind=found.kind, patient=found.patient)


def _case_ids(found: Sequence[Found], taken: Iterable[str]) -> list[str]:
    """Names from stems: `ct`, or `pat1_ct` where several are `ct`; never those of series, which have no folder's name.

    A hash of where it lies is added to a stem where that had to be cleaned, or still is not the only one.
    """
    plain = [each.stem.rpartition("/")[2] for each in found]
    elsewhere = [name.lower() for name in taken]
    uses = Counter([clean_name(name).lower() for name in plain] + elsewhere)
    wanted = [
        name if uses[clean_name(name).lower()] == 1 or each.kind == "dicom" else f"{folder_of(each.files[0])}_{name}"
        for each, name in zip(found, plain, strict=True)
    ]
    uses = Counter([name.lower() for name in wanted] + elsewhere)
    names = [
        want if want == clean_name(want) and uses[want.lower()] == 1 else f"{clean_name(name)}-{short_hash(each.stem)}"
        for each, name, want in zip(found, plain, wanted, strict=True)
    ]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [
        f"{name}-{short_hash(os.path.abspath(each.files[0]))}" if name in twice else name  # noqa: PTH100
        for each, name in zip(found, names, strict=True)
    ]
