"""Labels as people write them, to classes; anything doubtful is refused with counts and the first five cases."""

import collections
import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from dagman.errors import DagmanError
from dagman.tasks.table import Table, read_rows

MISSING = frozenset({"", "nan", "na", "n/a", "none", "null"})
Unlabelled = Literal["refuse", "leave_out"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Classes:
    """The classes of a table."""

    numbers: Int[np.ndarray, " cases"]
    """Class of each case; of two classes 1 is the positive one."""
    names: tuple[str, ...]


def override(table: Table, path: Path, column: str = "label") -> Table:
    """The table with labels (and patients, where it has that column) taken from a CSV with `case_id` and `column`.

    Cases that the CSV does not name become unlabelled.

    Raises:
        DagmanError: `E-LABEL` when a column is absent, a case comes twice, or the CSV names cases without features.
    """
    rows = read_rows(path)
    absent = [name for name in ("case_id", column) if rows and name not in rows[0]]
    if absent or not rows:
        found = ", ".join(rows[0]) if rows else "no rows"
        raise DagmanError("LABEL", path, f"lacks {', '.join(absent) or 'rows'} (found: {found})", "name the columns")
    _refuse_repeats(path, [row["case_id"] for row in rows])
    by_case = {row["case_id"]: row for row in rows}
    known = set(table.case_ids)
    _refuse(path, "labels for cases without features", [case for case in by_case if case not in known])
    found_rows = [by_case.get(case, {}) for case in table.case_ids]
    patients = table.patients
    if "patient" in rows[0]:
        patients = tuple(row.get("patient") or None for row in found_rows)
    return dataclasses.replace(table, labels=tuple(row.get(column) for row in found_rows), patients=patients)


def labelled(table: Table, unlabelled: Unlabelled = "refuse") -> tuple[Table, int]:
    """The rows that have a label, sorted by case, and how many had none.

    Raises:
        DagmanError: `E-LABEL` for cases that come twice, and for cases without a label unless they are to be left out.
    """
    _refuse_repeats("feature table", table.case_ids)
    keep = {case: not _is_missing(label) for case, label in zip(table.case_ids, table.labels, strict=True)}
    missing = [case for case, kept in keep.items() if not kept]
    if unlabelled == "refuse":
        _refuse(
            "feature table", "cases without a label", missing, "label them, or leave them out: --unlabelled leave_out"
        )
    rows = [index for _, index in sorted((case, index) for index, case in enumerate(table.case_ids) if keep[case])]
    chosen = Table(
        case_ids=tuple(table.case_ids[row] for row in rows),
        patients=tuple(table.patients[row] for row in rows),
        labels=tuple(table.labels[row] for row in rows),
        splits=tuple(table.splits[row] for row in rows) if table.splits else (),
        features=table.features[rows],
    )
    return chosen, len(missing)


def classes(labels: Sequence[str], positive: str | None = None, *, left_out: int = 0) -> Classes:
    """Classes from words or numbers; of two numbers the larger is positive, of two words the caller says.

    Args:
        labels: One per case, none missing. `1`, `1.0` and ` 1 ` are the same number.
        positive: The positive one of two classes; None where the labels are numbers, or of more than two classes.
        left_out: Cases without a label beside them, for the message.

    Raises:
        DagmanError: `E-LABEL` for fewer than two classes, one written in several ways, or where it is not clear which
            of two is positive.
    """
    words = _same_spelling([label.strip() for label in labels])
    refuse_spellings(words)
    counts = collections.Counter(words)
    listed = ", ".join(f"{word}: {count}" for word, count in sorted(counts.items())[:5])
    if len(counts) < 2 or (len(counts) > 2 and positive is not None):
        beside = f"; {left_out} more count as unlabelled: empty, none, na, nan or null" if left_out else ""
        raise DagmanError(
            "LABEL",
            "labels",
            f"{len(counts)} classes over {len(words)} cases ({listed}{', ...' if len(counts) > 5 else ''}){beside}",
            "give two classes, or none as positive" if len(counts) > 2 else "give two classes or more",
        )
    if len(counts) == 2:
        first = _positive_of(counts, positive, words, listed)
        names: tuple[str, ...] = (next(word for word in counts if word != first), first)
    else:
        names = tuple(sorted(counts, key=lambda word: (_number(word) or 0.0, word)))
    number_of = {name: number for number, name in enumerate(names)}
    return Classes(numbers=np.array([number_of[word] for word in words]), names=names)


def numbers_of(labels: Sequence[str | None], names: Sequence[str]) -> list[int | None]:
    """Number of each label among the classes of an earlier study; None where a case has no label.

    Raises:
        DagmanError: `E-LABEL` for labels that are none of the classes.
    """
    words: list[str | None] = [None if label is None or _is_missing(label) else label.strip() for label in labels]
    if all(_number(name) is not None for name in names):
        words = [word if word is None or _number(word) is None else _same_spelling([word])[0] for word in words]
    strange = collections.Counter(word for word in words if word is not None and word not in names)
    if strange:
        listed = ", ".join(f"{word}: {count}" for word, count in sorted(strange.items())[:5])
        raise DagmanError(
            "LABEL",
            "labels",
            f"{strange.total()} cases are of no class that the classifier knows ({listed}); known: {', '.join(names)}",
            "spell them as its classes, or leave the label of such cases empty",
        )
    return [None if word is None else list(names).index(word) for word in words]


def classes_of(labels: Sequence[str | None]) -> list[str]:
    """What labels say that are not missing, each once, sorted."""
    return sorted({label.strip() for label in labels if label is not None and not _is_missing(label)})


def last_of_two(labels: Sequence[str | None]) -> str | None:
    """The word that stands last of two; None for other numbers of classes, and for two numbers: the larger is positive.

    Args:
        labels: One per case; those that are missing are of no class.
    """
    words = classes_of(labels)
    both_numbers = all(_number(word) is not None for word in words)
    return words[-1] if len(words) == 2 and not both_numbers else None


def _positive_of(counts: collections.Counter[str], positive: str | None, words: list[str], listed: str) -> str:
    if positive is not None:
        positive = _same_spelling([*words, positive.strip()])[-1]
    elif all(_number(word) is not None for word in counts):
        positive = max(counts, key=float)
    if positive is None or positive not in counts:
        problem = f"two words ({listed})" if positive is None else f"no case is {positive} ({listed})"
        such = f"--positive {shlex.quote(max(counts))}"
        raise DagmanError("LABEL", "labels", problem, f"name the positive class, such as {such}")
    return positive


def refuse_spellings(labels: Sequence[str]) -> None:
    """Refuse labels that differ in capitals or surrounding blanks alone: they would be several classes.

    Raises:
        DagmanError: `E-LABEL`, which names them.
    """
    counts = collections.Counter(label.strip() for label in labels)
    plain = collections.Counter(word.casefold() for word in counts)
    if several := sorted((word for word in counts if plain[word.casefold()] > 1), key=str.casefold):
        listed = ", ".join(f"{word}: {counts[word]}" for word in several[:6]) + ", ..." * (len(several) > 6)
        raise DagmanError("LABEL", "labels", f"write one label in several ways ({listed})", "spell it in one way")


def _same_spelling(words: list[str]) -> list[str]:
    """One spelling for each number, where all words are numbers."""
    numbers = [_number(word) for word in words]
    if any(number is None for number in numbers):
        return words
    return [str(int(number)) if number == int(number) else repr(number) for number in numbers if number is not None]


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def told(labels: Sequence[str | None]) -> str:
    """How many cases have which label, and how many count as unlabelled, with the words that make them so.

    Empty where no case has any.
    """
    counts = collections.Counter(label.strip() for label in labels if label and not _is_missing(label))
    without = collections.Counter((label or "").strip() for label in labels if _is_missing(label))
    words = sorted(without.keys() - {""})
    if not counts and not words:
        return ""
    said = [f"{count} {word}" for word, count in sorted(counts.items(), key=lambda item: -item[1])[:5]]
    said += [f"{len(counts) - 5} more classes"] if len(counts) > 5 else []
    if without.total():
        said.append(f"{without.total()} without" + (f" ({', '.join(words)} says that there is none)" if words else ""))
    return "labels: " + ", ".join(said)


def _is_missing(label: str | None) -> bool:
    return label is None or label.strip().lower() in MISSING


def _refuse_repeats(subject: object, case_ids: Sequence[str]) -> None:
    repeated = [case for case, count in collections.Counter(case_ids).items() if count > 1]
    _refuse(subject, "cases in more than one row", repeated, "keep one row for each case")


def _refuse(subject: object, what: str, cases: Sequence[str], advice: str = "make the two agree") -> None:
    if cases:
        first = ", ".join(cases[:5]) + (", ..." if len(cases) > 5 else "")
        raise DagmanError("LABEL", subject, f"{len(cases)} {what} ({first})", advice)
