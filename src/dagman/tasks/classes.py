"""Which values of a label map are classes, and their names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Integer, UInt8

from dagman.errors import DagmanError

MOST = 254


@dataclass(frozen=True, kw_only=True)
class Classes:
    """The classes of a segmentation, numbered from 1; what belongs to none is background, 0."""

    names: tuple[str, ...]
    labels: tuple[tuple[int, ...], ...]
    """Values of a label map that make up each class; the first stands for it in what is written."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def text(self) -> str:
        """As `choose` reads it, without knowing what labels are called: `tumour=3+7,5`."""
        parts = []
        for name, values in zip(self.names, self.labels, strict=True):
            joined = "+".join(map(str, values))
            plain = name == f"label {joined}" or {",", "="} & set(name)  # a name with these cannot be written
            parts.append(joined if plain else f"{name}={joined}")
        return ",".join(parts)

    def numbers(self, label_map: Integer[np.ndarray, "x y z"]) -> UInt8[np.ndarray, "x y z"]:
        """Label values to class numbers."""
        numbers = np.zeros(label_map.shape, np.uint8)
        for number, values in enumerate(self.labels, 1):
            for value in values:
                numbers[label_map == value] = number
        return numbers

    def label_map(self, numbers: UInt8[np.ndarray, "x y z"]) -> Integer[np.ndarray, "x y z"]:
        """Class numbers to label values."""
        table = np.array([0, *(values[0] for values in self.labels)])
        kind = next(each for each in (np.uint8, np.int16, np.int32) if table.max() <= np.iinfo(each).max)
        found: np.ndarray = table.astype(kind)[numbers]
        return found


def choose(text: str | None, found: Iterable[int], known: Mapping[int, str] | None = None) -> Classes:
    """Classes from what a person wrote, or one for each label found.

    Args:
        text: Such as `2,5` or, where names are known, `liver,spleen` (two classes, the rest is background), or
            `tumour=1+2,node=5` (labels 1 and 2 as one class); None for all.
        found: Labels that occur, 0 left out.
        known: What labels are called.

    Raises:
        DagmanError: `E-LABEL` for what is no label, occurs nowhere, stands in two classes; or no label at all.
    """
    present = sorted({int(label) for label in found} - {0})
    if not present:
        raise DagmanError("LABEL", "masks", "hold no label but 0", "give masks with labels 1, 2, ...")
    called = {name: str(label) for label, name in (known or {}).items()}
    parts = [part.strip() for part in text.split(",")] if text else [str(label) for label in present]
    parts = [called.get(part, part) for part in parts]
    names, labels = [], []
    for part in parts:
        name, equals, values = part.partition("=")
        try:
            merged = tuple(int(value) for value in (values if equals else name).split("+"))
        except ValueError:
            raise DagmanError("LABEL", part, "is no label", "write such as 2,5 or tumour=1+2,node=5") from None
        own = (known or {}).get(merged[0]) if len(merged) == 1 else None
        names.append(name.strip() if equals else own or f"label {name}")
        labels.append(merged)
    every = [value for values in labels for value in values]
    absent = [value for value in every if value not in present]
    if absent:
        there = ", ".join(map(str, present[:20]))
        raise DagmanError("LABEL", f"label {absent[0]}", f"occurs in no mask (there are {there})", "name others")
    if len(set(every)) < len(every) or len(set(names)) < len(names) or len(names) > MOST:
        raise DagmanError("LABEL", text or "masks", f"name a label or class twice, or over {MOST}", "name each once")
    return Classes(names=tuple(names), labels=tuple(labels))
