"""Where to cut a prepared volume, and how a crop becomes what a network sees."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int16, Num

from dagman.ct.store import PreparedStore, Triple, padded_crop
from dagman.errors import DagmanError, count

LUNG_HU = -950
"""Lung and everything denser is body, the air around the patient is not."""
AROUND = "the centroid of the mask"
"""What crops of cases with masks lie around, in earlier versions the middle of the mask's box: part of what tells
results apart."""
EMPTY_MASK_ADVICE = "draw it, or name no mask for the case in the CSV, then prepare again"
TRIES = 20
"""Draws of a pair of views before the best one so far is taken."""


def window(hu: Num[np.ndarray, "*shape"], window_hu: tuple[float, float]) -> Float32[np.ndarray, "*shape"]:
    """Hounsfield units to [0, 1]: the window's lower edge is 0, its upper edge 1, clipped.

    Args:
        hu: Intensities, any shape.
        window_hu: Lower and upper edge.
    """
    low, high = window_hu
    scaled: np.ndarray = np.subtract(hu, np.float32(low), dtype=np.float32)
    scaled *= np.float32(1 / (high - low))
    np.clip(scaled, 0, 1, out=scaled)
    return scaled


def first_corners(num: int, side: int) -> tuple[int, int]:
    """Lowest and highest first voxel of a crop along one axis; equal, and centred, where the volume is no longer."""
    return (0, num - side) if num >= side else (-((side - num) // 2),) * 2


def overlapping_corners(
    shape: Triple, crop: Triple, overlap_ratio: float, generator: np.random.Generator
) -> tuple[Triple, Triple]:
    """Two random crops inside a volume that share at least `overlap_ratio` of their length along every axis.

    The first is uniform; the second is uniform among those that overlap it enough.
    """
    u, v = [], []
    for num, side in zip(shape, crop, strict=True):
        low, high = first_corners(num, side)
        reach = int(np.floor((1 - overlap_ratio) * side + 1e-9))
        first = int(generator.integers(low, high + 1))
        u.append(first)
        v.append(int(generator.integers(max(low, first - reach), min(high, first + reach) + 1)))
    return (u[0], u[1], u[2]), (v[0], v[1], v[2])


class Pair(NamedTuple):
    """Two overlapping crops of one volume."""

    u: Int16[np.ndarray, "x y z"]
    v: Int16[np.ndarray, "x y z"]
    corners: tuple[Triple, Triple]


def two_views(
    store: PreparedStore,
    row: int,
    crop: Triple,
    *,
    overlap_ratio: float,
    body_ratio: float,
    generator: np.random.Generator,
) -> Pair:
    """Two random overlapping crops, drawn again until each holds enough body; after 20 draws, the best so far.

    Args:
        store: Where the volume lies.
        row: Its row.
        crop: Voxels (x, y, z).
        overlap_ratio: Shared length along every axis at least.
        body_ratio: Share of a crop's voxels at or above -950 HU (lung and denser), at least.
        generator: Draws the corners; a keyed one gives the same crops every time.

    Reference: section 3.1 ("two randomly cropped views"); the ratios are the defaults of `DataConfig`.
    """

    def draw() -> tuple[float, Pair]:
        corners = overlapping_corners(store.shape(row), crop, overlap_ratio, generator)
        low = np.minimum(*corners)
        x, y, z = (np.maximum(*corners) + crop - low).tolist()
        both = store.hu(row, tuple(low.tolist()), (x, y, z))
        u, v = (padded_crop(both, np.subtract(corner, low).tolist(), crop, 0) for corner in corners)
        body = min(np.count_nonzero(view >= LUNG_HU) / view.size for view in (u, v))
        return body, Pair(u, v, corners)

    most, best = draw()
    for _ in range(TRIES - 1):
        if most >= body_ratio:
            break
        body, pair = draw()
        if body > most:
            most, best = body, pair
    return best


def has_empty_mask(store: PreparedStore, row: int) -> bool:
    """Whether a case has a mask, and nothing in it."""
    mask = store.rows[row]["mask"]
    return mask is not None and not mask["voxels"]


def croppable(store: PreparedStore) -> tuple[list[int], list[str]]:
    """Rows of which crops can be cut, and a line for each other one: its mask is empty."""
    empty = [row for row in range(len(store)) if has_empty_mask(store, row)]
    rows = sorted(set(range(len(store))) - set(empty))
    return rows, [f"E-NOMASK {store.rows[row]['case_id']}: its mask is empty; {EMPTY_MASK_ADVICE}" for row in empty]


def told_empty(cases: Sequence[str]) -> str:
    """What is said of cases whose masks are empty, where nothing is lost yet."""
    more = ", ..." if len(cases) > 5 else ""
    named = f"{count(len(cases), 'mask is', 'masks are')} empty ({', '.join(cases[:5])}{more})"
    return f"{named}: no crop can be cut around an empty mask"


def refuse_empty_masks(store: PreparedStore, rows: Iterable[int]) -> None:
    """Find all cases at once around whose mask no crop can be cut, before the work begins.

    Raises:
        DagmanError: `E-NOMASK`, which names them.
    """
    if empty := [str(store.rows[row]["case_id"]) for row in rows if has_empty_mask(store, row)]:
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        which = f"{count(len(empty), 'case', 'cases')} with an empty mask ({', '.join(empty[:5])}{more})"
        raise DagmanError("NOMASK", store.folder, f"holds {which}", EMPTY_MASK_ADVICE)


def around(store: PreparedStore) -> str | None:
    """`AROUND` for a store with masks; None where no crop is cut around one."""
    return AROUND if any(row["mask"] for row in store.rows) else None


def sides_mm(store: PreparedStore, crop: Triple) -> list[float] | None:
    """Sides of a crop of a store's volumes in mm; None for cubes that have no size of their own (MedMNIST)."""
    if any(row.get("window_hu") for row in store.rows):
        return None
    return [side * float(store.settings["spacing_mm"]) for side in crop]


def centroid(mask: Num[np.ndarray, "x y z"]) -> Float[np.ndarray, "3"] | None:
    """Mean place of a mask's voxels, whatever their label, as a voxel index (x, y, z); None for an empty mask."""
    lines = [np.count_nonzero(mask, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
    if not lines[0].any():
        return None
    return np.array([line @ np.arange(len(line)) / line.sum() for line in lines])


def centred(store: PreparedStore, row: int, crop: Triple, on: Literal["mask", "centre"]) -> Int16[np.ndarray, "x y z"]:
    """The crop around the centroid of a case's mask, or in the middle of the volume.

    Raises:
        DagmanError: `E-NOMASK` when the case has no mask, or an empty one.
    """
    return store.hu(row, centred_corner(store, row, crop, on), crop)


def centred_corner(store: PreparedStore, row: int, crop: Triple, on: Literal["mask", "centre"]) -> Triple:
    """First voxel of `centred`, rounded down at a half: the crop's middle misses by half a voxel at most.

    The centroid is that of the mask on the scan's own voxels; of the stored mask in stores that do not tell it.

    Raises:
        DagmanError: `E-NOMASK`.
    """
    middle: np.ndarray | None = (np.array(store.shape(row)) - 1) / 2
    if on == "mask":
        middle = _mask_centroid(store, row)
    if middle is None:
        what = "no mask" if store.rows[row]["mask"] is None else "an empty mask"
        raise DagmanError("NOMASK", store.rows[row]["case_id"], f"has {what} to centre a crop on", EMPTY_MASK_ADVICE)
    x, y, z = np.ceil(np.round(middle - np.array(crop) / 2, 6)).astype(int).tolist()
    return x, y, z


def _mask_centroid(store: PreparedStore, row: int) -> np.ndarray | None:
    """As the manifest tells it, else of the stored mask; None where there is none, or it is empty."""
    told = (store.rows[row]["mask"] or {}).get("centroid")
    if told is not None:
        return np.array(told)
    mask = store.mask(row)
    return None if mask is None else centroid(mask)


def near(store: PreparedStore, row: int, crop: Triple, shift_ratio: float, draws: np.random.Generator) -> Triple:
    """First voxel of a random crop: near the centroid of a case's mask, or anywhere in a volume without one.

    A volume without a mask that is no longer than the crop stays in its middle: someone has cut it to what it shows.

    Args:
        store: Where the volume lies.
        row: Its row.
        crop: Voxels (x, y, z).
        shift_ratio: Of each side, by which a crop may miss the centroid of the mask.
        draws: Source of the draws.

    Raises:
        DagmanError: `E-NOMASK` for an empty mask.
    """
    masked = store.rows[row]["mask"] is not None
    middle = centred_corner(store, row, crop, "mask" if masked else "centre")
    found = []
    for first, num, side in zip(middle, store.shape(row), crop, strict=True):
        reach = int(shift_ratio * side)
        low, high = (first - reach, first + reach) if masked else first_corners(num, side)
        found.append(int(draws.integers(low, high + 1)))
    return found[0], found[1], found[2]


def sliding(shape: Triple, crop: Triple, overlap_ratio: float = 0.5) -> list[Triple]:
    """First voxels of evenly spread crops that cover a volume, neighbours sharing at least `overlap_ratio`.

    An axis shorter than the crop gets one crop, centred, that reaches out on both sides.
    """
    axes = []
    for num, side in zip(shape, crop, strict=True):
        low, high = first_corners(num, side)
        stride = max(1, int(np.floor((1 - overlap_ratio) * side + 1e-9)))
        count = int(np.ceil((high - low) / stride)) + 1
        axes.append([round(low + (high - low) * i / max(1, count - 1)) for i in range(count)])
    x, y, z = axes
    return list(itertools.product(x, y, z))
