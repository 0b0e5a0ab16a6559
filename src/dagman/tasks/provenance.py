"""Which scan a file was made from: a line of a log beside it, so that no other scan's file replaces it unseen."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dagman import files
from dagman.ct.case import of_several, source_sha256
from dagman.ct.sources import medmnist
from dagman.errors import DagmanError, ExitCode, printable
from dagman.types import Scan


def of(scan: Scan) -> dict[str, Any]:
    """What a log says of a scan: its name, where it lies (a file, or the folder of a series), and its checksum.

    Raises:
        DagmanError: `E-GONE` for a file that cannot be read.
    """
    try:
        digest = medmnist.sha256(scan.files[0]) if scan.kind == "medmnist" else source_sha256(scan.files)
    except OSError as error:
        problem, advice = f"cannot be read ({error.strerror})", "put it back and run the command again"
        raise DagmanError("GONE", scan.source, problem, advice) from None
    return {"case_id": scan.case_id, "source": printable(scan.source), "source_sha256": digest}


def noted(log: Path, path: Path, required: Iterable[str] = ()) -> dict[str, Any] | None:
    """The last line of a log about a file; None where there is none, or the file is gone.

    Raises:
        DagmanError: `E-MANIFEST` with the line that is damaged, or lacks what is required.
    """
    if not path.is_file():
        return None
    rows = files.read_lines(log, required=("file", *required))
    found: dict[str, Any] | None = next((row for row in reversed(rows) if row["file"] == path.name), None)
    if found and isinstance(found.get("source"), list):  # of earlier versions: checksums alone
        return found | {"source": "elsewhere", "source_sha256": of_several(found["source"])}
    return found


def refuse_other(log: Path, path: Path, made: Mapping[str, Any]) -> None:
    """Refuse to write a file over that of another scan.

    Args:
        log: Beside the file.
        path: The file.
        made: Of the scan that it shall be made from, as `of` tells it.

    Raises:
        DagmanError: `E-DUPCASE`, exit code 4, naming both scans. Files that no line is about are of nobody.
    """
    known = noted(log, path)
    if known and known.get("source_sha256", made["source_sha256"]) != made["source_sha256"]:
        problem = f"is not the scan that {path} was made from, {known['source']}"
        advice = "choose another output folder, or remove that file"
        raise DagmanError("DUPCASE", made["source"], problem, advice, exit_code=ExitCode.REFUSED)
