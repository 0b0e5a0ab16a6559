"""The feature table: one row per case, the interface between encoders and everything that scores them."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from dagman import files
from dagman.ct.table import refuse_separator
from dagman.errors import DagmanError

_LEADING = ("case_id", "patient", "label", "split")


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Features of a set of cases."""

    case_ids: tuple[str, ...]
    patients: tuple[str | None, ...]
    labels: tuple[str | None, ...]
    """As the user wrote them; None where there is none."""
    features: Float[np.ndarray, "cases width"]
    """float32."""
    splits: tuple[str | None, ...] = ()
    """`train`, `validation` or `test` of each case; empty where nobody said."""

    def __post_init__(self) -> None:
        lengths = {len(self.case_ids), len(self.patients), len(self.labels), len(self.features)}
        lengths |= {len(self.splits)} if self.splits else set()
        if len(lengths) != 1:
            raise DagmanError("TABLE", "feature table", f"columns of {sorted(lengths)} rows", "give one row per case")


def write_csv(table: Table, path: Path) -> None:
    """Write `case_id, patient, label, split, f0, f1, ...`; numbers read back as the same float32."""
    features = table.features.astype(np.float32)
    splits = table.splits or (None,) * len(features)
    rows = zip(table.case_ids, table.patients, table.labels, splits, features, strict=True)
    write_rows(
        path,
        (*_LEADING, *(f"f{index}" for index in range(features.shape[1]))),
        (
            (case_id, patient or "", label or "", split or "", *values)
            for case_id, patient, label, split, values in rows
        ),
    )


def write_rows(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]], *, note: str = "") -> None:
    """Write a CSV file with a header; floats in the fewest digits that read back as the same number.

    Args:
        path: The file.
        header: Names of the columns.
        rows: Their cells.
        note: A line before the header, behind `#`.
    """
    text = io.StringIO(f"# {note}\n" if note else "")
    text.seek(0, io.SEEK_END)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([str(cell) for cell in row] for row in rows)
    files.write_text(path, text.getvalue())


def read_csv(path: Path) -> Table:
    """Read a feature table as `write_csv` writes it; `patient`, `label` and `split` may be absent.

    Raises:
        DagmanError: `E-TABLE` with the line and column at fault.
    """
    rows = read_rows(path)
    header = list(rows[0]) if rows else []
    names = [name for name in header if name not in _LEADING]
    if "case_id" not in header or not names:
        raise DagmanError(
            "TABLE", path, f"holds {len(rows)} rows and no features", "give case_id,patient,label,split,f0,..."
        )
    features = np.empty((len(rows), len(names)), dtype=np.float32)
    for line, row in enumerate(rows, 2):
        try:
            features[line - 2] = [float(row[name]) for name in names]
        except ValueError:
            name = next(name for name in names if not _is_number(row[name]))
            raise DagmanError(
                "TABLE",
                f"{path}:{line}",
                f"has {row[name][:40]!r} in the column {name}, which is taken for a feature",
                f"give a table of `dagman embed`: {', '.join(_LEADING)}, and numbers in all other columns",
            ) from None
    return Table(
        case_ids=tuple(row["case_id"] for row in rows),
        patients=tuple(row.get("patient") or None for row in rows),
        labels=tuple(row.get("label") or None for row in rows),
        splits=tuple(row.get("split") or None for row in rows) if any(row.get("split") for row in rows) else (),
        features=features,
    )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file with a header; cells are stripped of surrounding blanks.

    Raises:
        DagmanError: `E-GONE` for a file that is not there; `E-TABLE` for an unreadable one, columns separated by
            semicolons or tabs, a repeated column, or a line of another length than the header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = [row for row in csv.reader(io.StringIO(text), strict=True) if row]
    except FileNotFoundError:
        raise DagmanError("GONE", path, "does not exist", "give a CSV file that does") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DagmanError("TABLE", path, f"cannot be read ({error})", "give a CSV file in UTF-8") from None
    header = [name.strip() for name in lines[0]] if lines else []
    refuse_separator(path, header)
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise DagmanError("TABLE", path, f"repeats the columns {', '.join(sorted(twice))}", "name every column once")
    for number, cells in enumerate(lines[1:], 2):
        if len(cells) != len(header):
            raise DagmanError(
                "TABLE",
                f"{path}:{number}",
                f"holds {len(cells)} cells, the header {len(header)}",
                "repair the line; a cell with a comma needs quotes",
            )
    return [dict(zip(header, map(str.strip, cells), strict=True)) for cells in lines[1:]]
