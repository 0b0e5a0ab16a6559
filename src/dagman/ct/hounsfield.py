"""Stored numbers to Hounsfield units, exactly, and the question whether they are Hounsfield units at all."""

import math
from pathlib import Path
from typing import Literal

import numpy as np

from dagman.errors import DagmanError

LARGEST = 2**24
"""Beyond this float32 no longer holds every integer."""
PADDING_HU = -1024
_SAMPLES = 500_000


def check_finite(path: Path, array: np.ndarray) -> None:
    """Refuse NaN and infinite voxels.

    Raises:
        DagmanError: `E-NONFINITE` with their count and the first index.
    """
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array)
    count = int(array.size - finite.sum())
    if count:
        first = tuple(int(i) for i in np.unravel_index(int(np.argmin(finite)), array.shape))
        raise DagmanError(
            "NONFINITE",
            path,
            f"{count} voxels are NaN or infinite, the first at {first}",
            "replace them with -1024 HU and save the file again",
        )


def rescaled(path: Path, array: np.ndarray, slope: float = 1.0, intercept: float = 0.0) -> np.ndarray:
    """`array * slope + intercept` without wrapping: int16 where that holds it exactly, else float32.

    Raises:
        DagmanError: `E-NONFINITE`; `E-RANGE` beyond 2^24.
    """
    check_finite(path, array)
    if array.dtype == np.int16 and (slope, intercept) == (1.0, 0.0):
        return array
    ends = [float(array.min()) * slope + intercept, float(array.max()) * slope + intercept]
    if not all(abs(end) <= LARGEST for end in ends):
        raise DagmanError(
            "RANGE",
            path,
            f"values reach from {min(ends):.4g} to {max(ends):.4g}, beyond any HU",
            "export the scan again in Hounsfield units",
        )
    whole = array.dtype.kind in "iu" and float(slope).is_integer() and float(intercept).is_integer()
    small = min(ends) >= -(2**15) and max(ends) < 2**15
    result = np.empty(array.shape, np.int16 if whole and small else np.float32, order="F")
    for z in range(array.shape[2]):
        result[:, :, z] = array[:, :, z] * np.float64(slope) + np.float64(intercept)
    return result


def check_hu(path: Path, hu: np.ndarray) -> None:
    """Refuse numbers that cannot be Hounsfield units of a patient.

    Padding (up to -1024) is set aside first. Then: nothing negative, or hardly anything below -20 beside much
    above 300, is a raw, windowed or MR image; a spread below 20 is a normalised one; all below -400, or much that is
    neither padding nor as bright as air, is shifted.
    Cropped organs pass: they hold fat or noise below -20, or nothing above 300.

    Raises:
        DagmanError: `E-EMPTY` for a constant volume, else `E-NOTHU` with the 1st, 50th and 99th percentile.
    """
    flat = hu.ravel(order="K")
    if flat.min() == flat.max():
        raise DagmanError("EMPTY", path, f"every voxel is {flat[0]:g}", "leave it out or export the scan again")
    step = max(1, flat.size // _SAMPLES)
    while any(math.gcd(step, side) > 1 for side in hu.shape):  # else some rows or slices are never looked at
        step += 1
    sample = np.sort(flat[::step], kind="stable")  # of int16 a radix sort: 6 times as fast
    tissue = sample[_rank(sample, PADDING_HU, "right") :]
    too_dark = _between(sample, -1900, -1100)
    why = f"{too_dark:.0%} are darker than air" if too_dark > 0.1 else _not_hu(tissue)
    if why:
        p1, p50, p99 = (_percentile(sample, percent) for percent in (1, 50, 99))
        raise DagmanError(
            "NOTHU",
            path,
            f"{why}, so these are no Hounsfield units (1/50/99 % at {p1:.5g}, {p50:.5g}, {p99:.5g})",
            "export the CT in Hounsfield units, or leave it out if it is no CT",
        )


def _not_hu(tissue: np.ndarray) -> str:
    """What speaks against sorted values without padding being Hounsfield units; empty where nothing does."""
    if tissue.size == 0:
        return f"nothing lies above {PADDING_HU}"
    low, high = _percentile(tissue, 1), _percentile(tissue, 99)
    signs = {
        "nothing is negative but padding": _rank(tissue, 0, "left") / tissue.size < 1e-3,
        f"98 % of the values span only {high - low:.3g}": high - low < 20,
        "nothing is as dark as fat or air": low > -20 and high > 300,
        "nothing is as bright as soft tissue": high < -400,
        "most tissue lies near 1000 and air near 0": low > -200 and _between(tissue, 850, 1200) > 0.15,
    }
    return next((sign for sign, seen in signs.items() if seen), "")


def _between(ordered: np.ndarray, low: int, high: int) -> float:
    """Share of sorted values above `low` and below `high`."""
    return (_rank(ordered, high, "left") - _rank(ordered, low, "right")) / ordered.size


def _rank(ordered: np.ndarray, value: int, side: Literal["left", "right"]) -> int:
    """Where a value belongs; looked up in the type of the array, which would be converted to the value's."""
    return int(np.searchsorted(ordered, ordered.dtype.type(value), side=side))


def _percentile(ordered: np.ndarray, percent: int) -> float:
    """`np.percentile` of sorted values, which it would sort again."""
    below, part = divmod(percent / 100 * (ordered.size - 1), 1)
    first, second = float(ordered[int(below)]), float(ordered[min(int(below) + 1, ordered.size - 1)])
    return first + part * (second - first)
