"""What is known of a finished run, kept as files: how it ended, its heads, a linear probe, fine-tuning, organs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dagman import files
from dagman.ct.store import PreparedStore
from dagman.figures import clusters as figure
from dagman.nets.encoder import Encoder
from dagman.run import Run
from dagman.tasks import cluster, diversity, leakage, predictions, structures, study, watching
from dagman.tasks.embed import suited
from dagman.tasks.family import Judged, Probed
from dagman.tasks.statistics import Estimate
from dagman.train import classify
from dagman.train.parts import sided
from dagman.types import Preparation

LAST_STEPS = 50
METRICS = (
    "hidden_ratio",
    "image_error_ratio",
    "aitd_loss_ratio",
    "ampd_loss_ratio",
    "gitd_loss_ratio",
    "pooled_spread",
)
"""Means over the last steps of a run."""
ATTENTION = "clean_attention_entropy"
"""Of the last examination of a run: there whatever is hidden, where the encoder has [CLS]."""
_PROBE, _CLUSTERS = "probe.json", "clusters.json"


def kept(path: Path) -> dict[str, Any]:
    """A JSON file; empty where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def ends(run: Path) -> dict[str, float]:
    """Measures of a run at its end, those of `METRICS` as means over the last steps."""
    rows = Run(run).metrics()
    values = {name: [row[name] for row in rows[-LAST_STEPS:] if row.get(name) is not None] for name in METRICS}
    found = {name: float(np.mean(some)) for name, some in values.items() if some}
    examined = [row[ATTENTION] for row in rows if row.get(ATTENTION) is not None]
    return found | ({ATTENTION: examined[-1]} if examined else {})


def heads(encoder: Encoder, store: PreparedStore, device: str) -> dict[str, float]:
    """`PLACE: READING` to its value, as `dagman diversity` finds it on its crops of the store."""
    looks = diversity.head_diversity(encoder, store, device=device)
    return {
        f"{row['place']}: {reading}": row[reading]["value"]
        for row in diversity.summary({"run": looks})
        for reading in diversity.READINGS
        if row[reading]["value"] is not None
    }


def probe(encoder: Encoder, labelled: PreparedStore, place: Path, run: Path, device: str) -> None:
    """Probe all features of an encoder, and keep what was found in the folder `place`.

    Args:
        encoder: Of the run, or untrained.
        labelled: Cases of two classes.
        place: Of `probe.json` and the predictions.
        run: Whose list of training cases tells what was seen of the labelled ones.
        device: Where to compute.
    """
    which = watching.features_of(encoder)
    found = watching.predict(encoder, labelled, which=which, device=device)
    if found:
        predictions.write(found, place)
    study = watching.check(labelled, encoder.preparation)
    negative, positive = study.classes.names
    told = {
        "auc": vars(found.auc() if found else watching.NOTHING_TO_READ),
        "features": which,
        "predicted": found is not None,
        "study": {
            "store": "/".join(labelled.folder.absolute().parts[-2:]),
            "positive": positive,
            "negative": negative,
            "patients": len(np.unique(study.groups)),
            "seen": leakage.report(leakage.seen(labelled.rows, run), study.table.case_ids),
        },
    }
    files.write_json(place / _PROBE, told)


def probed(place: Path) -> Probed | None:
    """What `probe` kept; None where nothing was probed."""
    told = kept(place / _PROBE)
    if not told:
        return None
    found = predictions.read(place) if told["predicted"] else None
    auc = found.auc() if found else Estimate(**told["auc"])
    return Probed(auc=auc, features=told["features"], study=told["study"], predictions=found)


def tuning(steps: int) -> classify.ClassifyConfig:
    """How fine-tuning goes, but for what the labelled cases decide."""
    start = classify.ClassifyConfig()
    return replace(start, unlabelled="leave_out", finetune=replace(start.finetune, steps=steps))


def finetune(
    encoder: Encoder, labelled: PreparedStore, place: Path, steps: int, *, weights: Path | None, **how: Any
) -> bool:
    """Fine-tune all layers of an encoder on the folds of the probe, or go on; False where a stop was asked for.

    Args:
        encoder: Of the run, or untrained; its layers then learn at one rate, as nothing is to be kept in the first.
        labelled: Cases of two classes. Crops are mirrored, but for classes that name a side of the body.
        place: Folder of the study.
        steps: Of each fold.
        weights: The run; None for an untrained encoder.
        how: Device, workers, and who hears of it, as `classify.finetune` takes them.

    Raises:
        DagmanError: As `classify.finetune`.
    """
    config, classes = tuning(steps), watching.check(labelled, encoder.preparation).classes.names
    config = replace(config, positive=watching.positive_of(labelled), keep_sides=bool(sided(classes)))
    if weights is None:
        config = replace(config, finetune=replace(config.finetune, layer_decay=1.0))
    return classify.finetune(encoder, labelled, place, config, weights=weights, **how) is not None


def tuned(place: Path) -> Judged | None:
    """What `finetune` found; None where it has not ended."""
    if not kept(place / predictions.RESULT):
        return None
    found = predictions.read(place)
    return Judged(auc=found.auc(), predictions=found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Organs:
    """Crops that every encoder lays out: of the structures of label maps, or whole cases where none has a map."""

    store: PreparedStore
    names: Mapping[int, str] | None = None
    """Of the maps' labels, as `structures.structures` takes them."""

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that change with the cases, their voxels, maps, labels and patients, and with names."""
        given = self.names or study.agreed(map(study.label_names, self.store.rows))
        said = [watching.identity(self.store), sorted(given.items())]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    @cached_property
    def places(self) -> tuple[structures.Place, ...] | None:
        """Where the crops have their middles; None for whole cases."""
        if not any(row["mask"] for row in self.store.rows):
            return None
        return structures.structures(self.store, self.names).places

    @property
    def group_by(self) -> Literal["patient", "case"]:
        """What a neighbour must not share: the case where a patient is unknown, as in MedMNIST."""
        return "patient" if all(row.get("patient") for row in self.store.rows) else "case"

    def check(self, look: Preparation) -> dict[str, Any]:
        """What is laid out, for the heading; fails early where an encoder that was shown `look` cannot do it.

        Raises:
            DagmanError: `E-GRID` for a store of another spacing; `E-UMAP` and `E-LABEL` as `cluster.check`; `E-NOMASK`
                as `structures.structures`.
        """
        suited(self.store, look)
        counts = cluster.check(self.store, self.places)
        groups = {row.get("patient") or row["case_id"] for row in self.store.rows}
        return {
            "identity": self.identity,
            "store": self.store.folder.name,
            "crops": counts.total(),
            "of": "whole cases" if self.places is None else f"{len({one.structure for one in self.places})} structures",
            "classes": len(counts),
            "group_by": self.group_by,
            "groups": len(groups),
        }


def clusters(encoder: Encoder, organs: Organs, place: Path, device: str) -> None:
    """Lay out an encoder's crops of organs, as `dagman cluster` does, and keep figures and map in the folder `place`.

    Args:
        encoder: Of the run, or untrained.
        organs: The crops.
        place: Of `clusters.json`.
        device: Where to compute.

    Raises:
        DagmanError: As `cluster.cluster`.
    """
    table, places = cluster.features(encoder, organs.store, organs.places, device=device), organs.places
    cases = table.case_ids if places is None else [one.case_id for one in places]
    structure = None if places is None else [one.structure for one in places]
    found = cluster.cluster(table, groups=cases if organs.group_by == "case" else None, structures=structure)
    figures = {meaning: vars(found.estimate(name)) for name, meaning in cluster.MEANINGS.items()}
    drawn = cluster.panel("", found)._asdict()
    drawn["map"] = [[round(x, 3), round(y, 3)] if np.isfinite(x + y) else [None, None] for x, y in found.map.tolist()]
    files.write_json(place / _CLUSTERS, {"measures": figures, "panel": drawn})


def clustered(place: Path) -> tuple[dict[str, float], figure.Panel] | None:
    """The figures that `clusters` kept and the map of crops; None where nothing was laid out."""
    told = kept(place / _CLUSTERS)
    if not told:
        return None
    figures = {name: one["value"] for name, one in told["measures"].items() if one["value"] is not None}
    return figures, figure.Panel(**told["panel"] | {"map": np.array(told["panel"]["map"], dtype=float)})
