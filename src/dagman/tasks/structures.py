"""Labelled crops of label maps: around every connected structure of a case's organs, or around whole cases."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dagman.ct import crops
from dagman.ct.store import PreparedStore, Triple
from dagman.errors import DagmanError
from dagman.nets.classifier import Which, vector
from dagman.nets.encoder import Encoder
from dagman.randomness import generator
from dagman.tasks import study
from dagman.tasks.embed import Progress, crops_at_once, encode, suited
from dagman.tasks.table import Table, read_rows
from dagman.types import Preparation

SMALLEST_MM3 = 1000.0
CROPS_EACH = 4


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a labelled crop has its middle."""

    name: str
    """Of the crop: case, label, and numbers."""
    case_id: str
    row: int
    """Of the store."""
    label: str
    voxel: Triple

    @property
    def structure(self) -> str:
        """What the crop is of; crops of one structure overlap."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The structures of a store."""

    places: tuple[Place, ...]
    structures: int
    too_small: Mapping[str, int]
    """Label to how many of its structures were left out for their size."""
    unnamed: tuple[str, ...] = ()
    """Labels in the maps that the names leave out."""
    without_map: tuple[str, ...] = ()
    """Cases without a label map, or with an empty one."""

    def __str__(self) -> str:
        cases = len({place.case_id for place in self.places})
        classes = len({place.label for place in self.places})
        told = [f"{len(self.places)} crops of {self.structures} structures of {classes} classes in {cases} cases"]
        if self.too_small:
            some = ", ".join(f"{name} {count}" for name, count in sorted(self.too_small.items())[:8])
            some += ", ..." if len(self.too_small) > 8 else ""
            told.append(f"{sum(self.too_small.values())} structures too small ({some})")
        if self.unnamed:
            told.append(f"labels without a name left out: {', '.join(self.unnamed)}")
        if self.without_map:
            told.append(f"{len(self.without_map)} cases without a label map")
        return "; ".join(told)


def structures(
    store: PreparedStore,
    names: Mapping[int, str] | None = None,
    *,
    smallest_mm3: float = SMALLEST_MM3,
    crops_each: int = CROPS_EACH,
    seed: int = 0,
) -> Found:
    """Places in every connected structure: the voxel nearest its centre of mass, then voxels of it drawn at random.

    Args:
        store: Cases whose masks are label maps.
        names: Number to name of a label; labels of one name are one class, those without a name are left out. What
            the store calls them, or else the numbers themselves, where None.
        smallest_mm3: Smaller structures are left out.
        crops_each: Places in each structure.
        seed: Of the draws.

    Raises:
        DagmanError: `E-NOMASK` when nothing is left; `E-CONFIG` for less than one crop a structure.
    """
    if crops_each < 1:
        raise DagmanError("CONFIG", "crops of each structure", f"cannot be {crops_each}", "take 1 or more")
    places: list[Place] = []
    too_small, unnamed, without, number = Counter[str](), set[str](), [], 0
    known = study.agreed(map(study.label_names, store.rows))
    smallest = smallest_mm3 / float(store.settings["spacing_mm"]) ** 3
    for row in range(len(store)):
        case_id, labels = str(store.rows[row]["case_id"]), store.mask(row)
        if labels is None or not labels.any():
            without.append(case_id)
            continue
        for label, voxels in _connected(labels):
            name = known.get(label, str(label)) if names is None else names.get(label)
            if name is None:
                unnamed.add(str(label))
            elif len(voxels) < smallest:
                too_small[name] += 1
            else:
                number += 1
                middles = _middles(voxels, crops_each, generator(seed, "cluster.places", row, label, len(voxels)))
                places += [
                    Place(
                        name=f"{case_id}.{_slug(name)}.{number}.{place}",
                        case_id=case_id,
                        row=row,
                        label=name,
                        voxel=voxel,
                    )
                    for place, voxel in enumerate(middles)
                ]
    if not places:
        left_out = f"{len(without)} of {len(store)} cases have no label map, {sum(too_small.values())} structures"
        raise DagmanError(
            "NOMASK",
            store.folder,
            f"holds no structure to cut crops around ({left_out} are below {smallest_mm3:g} mm3)",
            "prepare the scans with label maps in the mask column, or cluster whole cases with --of cases",
        )
    return Found(
        places=tuple(places),
        structures=number,
        too_small=dict(too_small),
        unnamed=tuple(sorted(unnamed, key=int)),
        without_map=tuple(without),
    )


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _connected(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Every label's connected parts (touching corners count) as voxels (n, 3), largest label last."""
    from scipy import ndimage

    for label, box in enumerate(ndimage.find_objects(labels), 1):
        if box is None:
            continue
        parts, count = ndimage.label(labels[box] == label, structure=np.ones((3, 3, 3)))
        first = np.array([side.start for side in box])
        for part, around in enumerate(ndimage.find_objects(parts, count), 1):
            yield label, np.argwhere(parts[around] == part) + [side.start for side in around] + first


def _middles(voxels: np.ndarray, count: int, draws: np.random.Generator) -> list[Triple]:
    middle = np.linalg.norm(voxels - voxels.mean(axis=0), axis=1).argmin()
    some = [middle, *draws.integers(len(voxels), size=count - 1)]
    return [(int(x), int(y), int(z)) for x, y, z in voxels[some]]


def read_names(path: Path) -> dict[int, str]:
    """Label names from a CSV with the columns `label,name`, or from JSON: `{"1": "spleen"}` or `{"spleen": 1}`.

    Raises:
        DagmanError: `E-TABLE` for a file that is neither.
    """
    try:
        if path.suffix.lower() == ".json":
            pairs = [
                (value, key) if isinstance(value, int) else (key, value)
                for key, value in json.loads(path.read_text(encoding="utf-8-sig")).items()
            ]
        else:
            pairs = [(row["label"], row["name"]) for row in read_rows(path)]
        named = {int(label): str(name).strip() for label, name in pairs}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"names no labels ({type(error).__name__})"
        raise DagmanError("TABLE", path, problem, 'give a CSV label,name or a JSON {"1": "spleen", ...}') from None
    if not named or len(named) < len(pairs) or not all(named.values()):
        raise DagmanError("TABLE", path, "names a label twice, or none, or leaves a name empty", "name each label once")
    return named


def embed_places(
    encoder: Encoder,
    store: PreparedStore,
    places: Sequence[Place],
    *,
    which: Which = "pooled",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Table:
    """One vector for the crop around each place, as `embed.embed` for cases."""
    preparation = suited(store, encoder.preparation)
    together = crops_at_once(preparation)

    def features(images: Float[Tensor, "batch 1 x y z"]) -> Tensor:
        return vector(encode(encoder, images, device=device, precision="float32"), which).float().cpu()

    return _each(store, places, preparation, features, together=together, progress=progress)


def voxels_of_places(
    store: PreparedStore, places: Sequence[Place], preparation: Preparation, *, side: int = 8
) -> Table:
    """The baseline that knows no network: the same crops, windowed, averaged to `side`^3 voxels."""

    def features(images: Float[Tensor, "batch 1 x y z"]) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool3d(images, side).flatten(1)

    return _each(store, places, preparation, features)


def _each(
    store: PreparedStore,
    places: Sequence[Place],
    preparation: Preparation,
    features: Callable[[Tensor], Tensor],
    *,
    together: int = 1,
    progress: Progress | None = None,
) -> Table:
    found = []
    for start in range(0, len(places), together):
        part = places[start : start + together]
        hu = np.stack([_around(store, place, preparation.crop) for place in part])
        found.append(features(torch.from_numpy(crops.window(hu, preparation.window_hu))[:, None]).float().numpy())
        if progress:
            progress(start + len(part), len(places))
    return Table(
        case_ids=tuple(place.name for place in places),
        patients=tuple(store.rows[place.row].get("patient") for place in places),
        labels=tuple(place.label for place in places),
        features=np.concatenate(found),
    )


def _around(store: PreparedStore, place: Place, crop: Triple) -> np.ndarray:
    x, y, z = (middle - side // 2 for middle, side in zip(place.voxel, crop, strict=True))
    return store.hu(place.row, (x, y, z), crop)
