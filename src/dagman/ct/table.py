"""A CSV table of scans: `case_id,image[,label][,mask][,split][,patient]`, paths relative to the table.

A mask cell may name structures of a DICOM RTSTRUCT or SEG: `rtstruct.dcm#GTV-1|Lung` gives labels 1 and 2.
Other columns are left alone, and said to be.
"""

import csv
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from dagman.ct.survey import Found, Survey, look_through
from dagman.errors import DagmanError, count, printable
from dagman.types import Scan

_COLUMNS = ("case_id", "image", "label", "mask", "split", "patient")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
_CORRECT = "correct the row"


def read(path: Path, survey: Survey) -> list[Scan]:
    """Scans of a table; rows that cannot be used go to `survey.problems` with their number (the header is row 1).

    One image may stand in several rows with different masks: several nodules of one scan are several cases. Columns
    that are not used are noted there too.

    Raises:
        DagmanError: `E-TABLE` when the file is no such table, or the name of a column is nearly one that it lacks.
    """
    header, rows = _rows(path)
    if unused := [name or "one without a name" for name in header if name not in _COLUMNS]:
        problem = f"{count(len(unused), 'column is', 'columns are')} not used ({', '.join(unused)[:120]})"
        survey.reject("TABLE", path, problem, f"those that are used are {','.join(_COLUMNS)}", ignored=True)
    return scans([(f"{path}:{number}", f"row {number} of {path.name}", row) for number, row in rows], path, survey)


def scans(
    rows: Iterable[tuple[str, str, dict[str, str]]],
    path: Path,
    survey: Survey,
    code: Literal["TABLE", "LAYOUT"] = "TABLE",
) -> list[Scan]:
    """Scans of the rows of any list; those that cannot be used go to `survey.problems`.

    Args:
        rows: What an error is about, how other rows speak of it, and the cells by column.
        path: The file they stand in; their paths count from its folder.
        survey: What is shared with other sources.
        code: Of the errors.
    """
    found = []
    for subject, here, row in rows:
        try:
            scan = _scan(row, path, here, survey)
        except OSError:
            problem = "names a path that cannot be looked at"
            survey.reject(code, subject, problem, _CORRECT, case_id=row.get("case_id"))
        except ValueError as error:
            survey.reject(code, subject, str(error), _CORRECT, case_id=row.get("case_id"))
        else:
            found += [scan] if scan else []
    return found


def _scan(row: dict[str, str], path: Path, here: str, survey: Survey) -> Scan | None:
    _check_cells(row, survey, path, here)
    image = _existing(path, row["image"])
    mask, rois = _mask(path, row.get("mask") or "")
    place = image.resolve()  # tables of several folders may name one image
    if place not in survey.images:
        survey.images[place] = _only(image, survey)
    found = survey.images[place]
    if found is None:
        return None
    if mask is not None:
        status = mask.stat()
        survey.visited.add((status.st_dev, status.st_ino))
    return Scan(
        case_id=row["case_id"],
        files=found.files,
        kind=found.kind,
        patient=row.get("patient") or found.patient,
        label=row.get("label") or None,
        mask=mask,
        rois=rois,
        split=row.get("split") or None,
    )


def _rows(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Names of the columns, and the lines with their number."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.reader(stream, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        why = f"is no CSV text ({type(error).__name__})"
        raise DagmanError("TABLE", path, why, "save it as comma-separated UTF-8") from None
    header = [name.strip() for name in lines[0]] if lines else []
    refuse_separator(path, header)
    missing = [name for name in _COLUMNS[:2] if name not in header]
    known = [name for name in header if name in _COLUMNS]
    absent = [name for name in _COLUMNS if name not in header]
    # Left alone, a misspelt column would be lost and few would read the note: no label is no error.
    near = [(name, like) for name in header if name not in _COLUMNS and (like := _like(name, absent))]
    if missing or near or len(set(known)) != len(known):
        what = f"lacks {', '.join(missing)}" if missing else f"has the columns {', '.join(header)[:120]}"
        if near:
            what += f", and {near[0][0]}, which is nearly {near[0][1]}"
        raise DagmanError("TABLE", path, what, f"name its columns {','.join(_COLUMNS)} (the last four as needed)")
    return header, [
        (number, dict(zip(header, (cell.strip() for cell in line), strict=False)) | _ragged(header, line))
        for number, line in enumerate(lines[1:], 2)
        if any(cell.strip() for cell in line)
    ]


def refuse_separator(path: Path, header: list[str]) -> None:
    """Refuse a table whose header is a single name because semicolons or tabs stand where commas should.

    Raises:
        DagmanError: `E-TABLE`.
    """
    for sign, told in ((";", "';'"), ("\t", "tabs")):
        if len(header) == 1 and sign in header[0]:
            raise DagmanError("TABLE", path, f"has its columns separated by {told}", "save it comma-separated")


def _like(name: str, columns: list[str]) -> str | None:
    """Which of the columns a name is nearly: a slip of the pen, or with `id` behind it."""
    word = re.sub("[^a-z]", "", name.lower()).removesuffix("id")
    plain = {re.sub("[^a-z]", "", column).removesuffix("id"): column for column in columns}
    found = difflib.get_close_matches(word, plain, 1, 0.8)
    return plain[found[0]] if found and abs(len(word) - len(found[0])) < 3 else None


def _ragged(header: list[str], line: list[str]) -> dict[Any, str]:
    """A mark for a line whose cells are not the header's."""
    return {} if len(header) == len(line) else {None: ""}


def _check_cells(row: dict[str, str], survey: Survey, path: Path, here: str) -> None:
    if None in row:
        raise ValueError("holds more or fewer cells than the header")
    for name in ("case_id", "image"):
        if not row.get(name):
            raise ValueError(f"{name} is empty")
    if row.get("patient") == "":
        raise ValueError("patient is empty in a table that names patients")
    case_id = row["case_id"]
    if not _NAME.fullmatch(case_id):
        raise ValueError(f"case_id {printable(case_id)[:60]} may hold letters, digits, '-', '_' and '.' only")
    place = "\n".join(str((path.parent / row.get(name, "")).absolute()) for name in ("image", "mask"))
    for what, value in (("case_id is", case_id.lower()), ("image and mask are", place)):
        table, earlier = survey.rows.setdefault(f"{what} {value}", (path.absolute(), here))
        if (table, earlier) != (path.absolute(), here):
            of = f" ({printable(table.parent)})" if table.name == path.name and table != path.absolute() else ""
            raise ValueError(f"{what} the same as in {earlier}{of}")


def _mask(table: Path, cell: str) -> tuple[Path | None, tuple[str, ...]]:
    """A cell `file`, or `file#name|name` for structures of an RTSTRUCT or SEG."""
    if not cell:
        return None, ()
    name, sign, chosen = cell.rpartition("#")
    if not sign or (table.parent / cell).exists():
        name, chosen = cell, ""
    mask = _existing(table, name)
    if not mask.is_file():
        raise ValueError(f"{printable(name)[:200]} is no file")
    rois = tuple(printable(roi.strip()) for roi in chosen.split("|"))
    if (chosen or name != cell) and (not all(rois) or len(set(rois)) != len(rois)):
        raise ValueError("mask names an empty structure, or one twice")
    return mask, rois if chosen else ()


def _existing(table: Path, cell: str) -> Path:
    path = table.parent / cell
    if not path.exists():
        raise ValueError(f"{printable(cell)[:200]} does not exist")
    return path


def _only(image: Path, survey: Survey) -> Found | None:
    """The one scan of a row; None when its own problem has been noted."""
    before = len(survey.problems)
    found = look_through([image], survey)
    if len(found) > 1:
        raise ValueError(f"{image.name} holds {len(found)} scans, name the file or folder of one")
    if not found and all(problem.ignored for problem in survey.problems[before:]):
        raise ValueError(f"{image.name} holds no scan")
    return found[0] if found else None
