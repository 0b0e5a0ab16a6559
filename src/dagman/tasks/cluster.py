"""Do features of one organ lie together? Labelled crops in feature space and in a UMAP of it.

Every figure is a mean over classes of the mean over their crops of one value a crop: its mean distance to the other
crops of its class (intra), to those of other classes (inter), its silhouette, and whether its nearest neighbours among
other patients' crops say its class. A class with many structures counts no more than one with few. Features are
standardised column by column; their distances are told over the root mean square of all of them, so that 1 is the
distance of any two crops and neither the width nor the scale of the features plays a part. The map's distances are in
the map's own units, as in the paper, and as the ratio intra / inter, which has none.

Reference: paper, task 4, figures 7, 9 and 10: intra- and inter-cluster Euclidean distance in a UMAP.
"""

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped

from dagman import files
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.figures import clusters as figure
from dagman.nets.classifier import Which
from dagman.nets.encoder import Encoder
from dagman.tasks import embed as embedding
from dagman.tasks import labels as label_rules
from dagman.tasks import statistics
from dagman.tasks.embed import Progress
from dagman.tasks.layout import lay_out
from dagman.tasks.separation import NEIGHBOURS, between, measured, standardised, usual, votes
from dagman.tasks.statistics import Estimate
from dagman.tasks.structures import Place, embed_places, voxels_of_places
from dagman.tasks.table import Table, write_csv, write_rows

MEANINGS = {
    "map_intra": "map: distance within a class",
    "map_inter": "map: distance between classes",
    "map_ratio": "map: within / between",
    "map_silhouette": "map: silhouette",
    "intra": "features: distance within a class",
    "inter": "features: distance between classes",
    "ratio": "features: within / between",
    "silhouette": "features: silhouette",
    "knn": f"{NEIGHBOURS}-NN accuracy among other patients",
}
VALUES = tuple(MEANINGS)
BASELINES = ("untrained", "raw voxels")


@dataclass(frozen=True, kw_only=True, eq=False)
class Clusters:
    """One set of features: their map, and the values of each crop."""

    table: Table
    """Crops of classes with at least two of them."""
    groups: Shaped[np.ndarray, " crops"]
    """Patients, or cases where those are asked for."""
    map: Float[np.ndarray, "crops 2"]
    """NaN where the features hold nothing."""
    values: Mapping[str, Float[np.ndarray, " crops"]]
    """Of `VALUES` all but the ratios; NaN where a crop has none."""
    left_out: Mapping[str, int]
    """Classes with a single crop, which can form no cluster."""
    seed: int
    why: str = ""
    """Why there are no values."""

    def estimate(self, name: str, above: "Clusters | None" = None) -> Estimate:
        """A figure with its interval over patients; with `above`, how far it lies above that one's.

        Args:
            name: One of `VALUES`.
            above: Features of the same crops.
        """
        if self.why or (above and above.why):
            return Estimate(value=None, why=self.why or (above.why if above else ""))

        def statistic(weights: np.ndarray) -> np.ndarray:
            mine: np.ndarray = self._mean(name, weights)
            return mine - above._mean(name, weights) if above else mine

        found = statistics.estimate(statistic, self.groups, seed=self.seed)
        if found.value is None and name == "knn":
            return replace(found, why="no class is there in two patients")
        return found

    def _mean(self, name: str, weights: np.ndarray) -> np.ndarray:
        if name.endswith("ratio"):
            start = name.removesuffix("ratio")
            quotient: np.ndarray = self._mean(f"{start}intra", weights) / self._mean(f"{start}inter", weights)
            return quotient
        labels, values = np.array(self.table.labels), self.values[name]
        classes = [labels == label for label in np.unique(labels)]
        means = np.stack([statistics.mean(values[one], weights[:, one]) for one in classes], axis=1)
        known = np.isfinite(means)  # a resample may leave a class without crops
        count = np.where(known.any(axis=1), known.sum(axis=1), np.nan)
        balanced: np.ndarray = np.where(known, means, 0.0).sum(axis=1) / count
        return balanced


def compare(
    encoders: Mapping[str, Encoder],
    store: PreparedStore,
    places: Sequence[Place] | None = None,
    *,
    which: Which = "pooled",
    group_by: Literal["patient", "case"] = "patient",
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Clusters]:
    """Clusters of the same crops for several encoders, and for the baselines `untrained` and `raw voxels`.

    Args:
        encoders: Name to encoder, in eval mode; the baselines have the first one's sizes and crops.
        store: Cases on the grid that the encoders were trained on.
        places: From `structures.structures`; None for the store's whole cases that have a label.
        which: Features, as in `embed.embed`.
        group_by: `case` where patients are unknown.
        seed: Of the map and the bootstrap.
        device: Where to compute.
        progress: Hears of each finished set of features.

    Raises:
        DagmanError: As `cluster` and `embed.embed`; `E-USAGE` for an encoder with the name of a baseline.
    """
    require_umap()
    if taken := [name for name in BASELINES if name in encoders]:
        raise DagmanError("USAGE", f"encoder {taken[0]}", "bears the name of a baseline", "give it another name")
    first = next(iter(encoders.values()))
    plan = {**encoders, **dict(zip(BASELINES, (embedding.untrained(first), None), strict=True))}
    runs = {}
    for number, (name, encoder) in enumerate(plan.items(), 1):
        if encoder:
            table = features(encoder, store, places, which=which, device=device)
        elif places is None:
            table, _ = label_rules.labelled(embedding.voxels(store, first.preparation), "leave_out")
        else:
            table = voxels_of_places(store, places, first.preparation)
        cases = table.case_ids if places is None else [place.case_id for place in places]
        structures = None if places is None else [place.structure for place in places]
        runs[name] = cluster(table, groups=cases if group_by == "case" else None, structures=structures, seed=seed)
        if progress:
            progress(number, len(plan))
    return runs


def features(
    encoder: Encoder,
    store: PreparedStore,
    places: Sequence[Place] | None,
    *,
    which: Which = "pooled",
    device: torch.device | str = "cpu",
) -> Table:
    """Features of the crops around places, or of the whole cases that have a label where there are none."""
    if places is not None:
        return embed_places(encoder, store, places, which=which, device=device)
    return label_rules.labelled(embedding.embed(encoder, store, which=which, device=device), "leave_out")[0]


def require_umap() -> None:
    """Fail early where the map cannot be drawn.

    Raises:
        DagmanError: `E-UMAP`.
    """
    if importlib.util.find_spec("umap") is None:
        raise DagmanError("UMAP", "cluster", "needs the package umap-learn", "run pip install umap-learn")


def cluster(
    table: Table,
    *,
    groups: Sequence[str] | None = None,
    structures: Sequence[str] | None = None,
    seed: int = 0,
    neighbours: int = NEIGHBOURS,
) -> Clusters:
    """Lay labelled features out in a map, and measure how well their classes hold together.

    Args:
        table: Features with a class each; `structures.embed_places` or `embed.embed` make it.
        groups: What counts as the patient of each crop, its case for example; the table's patients where None.
        structures: What each crop is of; crops of one structure are no pair. Each of its own where None.
        seed: Of the map and the bootstrap.
        neighbours: Of the k-NN vote, fewer where fewer crops are there.

    Returns:
        For features that are all the same or not finite, no values but the reason.

    Raises:
        DagmanError: `E-UMAP`; `E-LABEL` for a crop without a class or fewer than two classes with two crops;
            `E-PATIENT`, exit code 4, for crops without patient.
    """
    require_umap()
    people = np.array(groups) if groups is not None else _patients(table)
    table, keep, left_out = _clustered(table)
    people = people[keep]
    own = np.array(structures)[keep] if structures is not None else None
    why = _unusable(table.features)
    nothing = np.full(len(table.labels), np.nan)
    if why:
        values = {name: nothing for name in VALUES if not name.endswith("ratio")}
        drawn = np.stack([nothing, nothing], axis=1)
    else:
        labels, features = np.array(table.labels), standardised(table.features)
        drawn = lay_out(features, seed=seed)
        distances = between(features)
        values = {
            **measured(distances / usual(distances), labels, own),
            "knn": votes(distances, labels, people, neighbours),
            **{f"map_{name}": each for name, each in measured(between(drawn), labels, own).items()},
        }
    return Clusters(table=table, groups=people, map=drawn, values=values, left_out=left_out, seed=seed, why=why)


def check(store: PreparedStore, places: Sequence[Place] | None) -> Counter[str]:
    """How many crops of each class can be laid out; fails early where they cannot.

    Raises:
        DagmanError: `E-UMAP`; `E-LABEL` for a class without name or written in several ways, or fewer than two
            classes with two crops.
    """
    require_umap()
    labels = [place.label for place in places] if places is not None else [row.get("label") for row in store.rows]
    table = Table(
        case_ids=tuple(map(str, range(len(labels)))),
        patients=(None,) * len(labels),
        labels=tuple(labels),
        features=np.zeros((len(labels), 0), np.float32),
    )
    if places is None:
        table, _ = label_rules.labelled(table, "leave_out")
    return Counter(map(str, _clustered(table)[0].labels))


def _clustered(table: Table) -> tuple[Table, list[int], dict[str, int]]:
    """The crops of classes that have two, their rows, and the other classes with their counts."""
    counts = Counter(table.labels)
    if None in counts or "" in counts:
        raise DagmanError(
            "LABEL", "crops", f"{counts[None] + counts['']} have no class", "label them or leave them out"
        )
    label_rules.refuse_spellings([str(label) for label in table.labels])
    few = {str(label): count for label, count in counts.items() if count < 2}
    if len(counts) - len(few) < 2:
        told = ", ".join(f"{label}: {count}" for label, count in sorted(counts.items(), key=str)[:5])
        raise DagmanError(
            "LABEL",
            "crops",
            f"{len(counts) - len(few)} classes with two crops or more over {len(table.labels)} crops ({told})",
            "give two classes",
        )
    keep = [row for row, label in enumerate(table.labels) if label not in few]
    chosen = Table(
        case_ids=tuple(table.case_ids[row] for row in keep),
        patients=tuple(table.patients[row] for row in keep),
        labels=tuple(table.labels[row] for row in keep),
        features=table.features[keep],
    )
    return chosen, keep, few


def _patients(table: Table) -> np.ndarray:
    without = [case for case, patient in zip(table.case_ids, table.patients, strict=True) if not patient]
    if without:
        raise DagmanError(
            "PATIENT",
            "crops",
            f"{len(without)} of {len(table.case_ids)} have no patient ({', '.join(without[:5])}): "
            "a crop's neighbour could be of its own patient",
            "add a patient column, or say --group-by case, which is then written into the result",
            exit_code=ExitCode.REFUSED,
        )
    return np.array([str(patient) for patient in table.patients])


def _unusable(features: np.ndarray) -> str:
    if not np.isfinite(features).all():
        return f"features of {int((~np.isfinite(features).all(axis=1)).sum())} crops are not finite"
    return "" if np.ptp(features, axis=0).any() else "the features are the same for all crops"


def summary(runs: Mapping[str, Clusters], *, group_by: str) -> dict[str, Any]:
    """The result as plain values for JSON: one row for each set of features, and how far the first lies above it."""
    first = next(iter(runs.values()))
    classes = Counter(str(label) for label in first.table.labels)
    rows = []
    for name, one in runs.items():
        row: dict[str, Any] = {"features": name, "width": one.table.features.shape[1]}
        row |= {value: vars(one.estimate(value)) for value in VALUES}
        if one is not first:
            row |= {f"first_minus_this_{value}": vars(first.estimate(value, one)) for value in VALUES}
        rows.append(row)
    return {
        "crops": len(first.table.labels),
        "classes": dict(sorted(classes.items())),
        "largest_class_share": max(classes.values()) / len(first.table.labels),
        "left_out_single": dict(first.left_out),
        f"{group_by}s": len(np.unique(first.groups)),
        "group_by": group_by,
        "warning": None if group_by == "patient" else "not grouped by patient: k-NN accuracy may be too good",
        "asked_by_knn": int(np.isfinite(first.values["knn"]).sum()),
        "neighbours": NEIGHBOURS,
        "seed": first.seed,
        "interval": f"95 %, bias-corrected and accelerated bootstrap over {group_by}s of the crops' values, which stay",
        "rows": rows,
    }


def write(
    runs: Mapping[str, Clusters], folder: Path, *, group_by: str = "patient", found: Mapping[str, Any] | None = None
) -> list[Path]:
    """Write the embeddings of each set of features, `crops.csv`, `result.json` and `clusters.png`.

    Args:
        runs: Name to clusters, the first compared with the others.
        folder: Where.
        group_by: As in `cluster`.
        found: What else the result should say of the crops, as plain values.
    """
    paths = [folder / f"embeddings-{name}.csv" for name in files.names_in_files([*runs])]
    for path, one in zip(paths, runs.values(), strict=True):
        write_csv(one.table, path)
    others = [folder / name for name in ("crops.csv", "result.json", "clusters.png")]
    plain = [name for name in VALUES if not name.endswith("ratio")]
    write_rows(
        others[0],
        ("features", "crop", "patient", "label", "map_x", "map_y", *plain),
        (
            (name, crop, patient or "", label, *place, *("" if np.isnan(value) else value for value in values))
            for name, one in runs.items()
            for crop, patient, label, place, *values in zip(
                one.table.case_ids,
                one.table.patients,
                one.table.labels,
                one.map,
                *(one.values[value] for value in plain),
                strict=True,
            )
        ),
    )
    files.write_json(others[1], {**summary(runs, group_by=group_by), **(found or {})})
    files.write_bytes(others[2], figure.png([panel(name, one) for name, one in runs.items()]))
    return [*paths, *others]


def panel(name: str, one: Clusters) -> figure.Panel:
    """What the picture shows of one set of features."""
    told = [
        f"{word} {estimate.value:.2f}" if (estimate := one.estimate(value)).value is not None else f"{word} n/a"
        for value, word in (
            ("map_intra", "intra"),
            ("map_inter", "inter"),
            ("silhouette", "silhouette of the features"),
            ("knn", "k-NN"),
        )
    ]
    labels = [str(label) for label in one.table.labels]
    return figure.Panel(name, one.map, labels, one.why or f"{', '.join(told[:2])} in the map\n{', '.join(told[2:])}")
