"""Labelled cases that watch a run or judge it: checked before anything is trained, probed afterwards."""

import hashlib
import json

import torch

from dagman.ct import crops
from dagman.ct.store import PreparedStore
from dagman.errors import DagmanError
from dagman.nets.classifier import Which
from dagman.nets.encoder import Encoder
from dagman.tasks import classify
from dagman.tasks import cohort as cohorts
from dagman.tasks.classify import ProbeResult
from dagman.tasks.cohort import Cohort
from dagman.tasks.embed import embed, suited
from dagman.tasks.labels import last_of_two
from dagman.tasks.protocol import Protocol
from dagman.tasks.statistics import Estimate
from dagman.types import Preparation

NOTHING_TO_READ = Estimate(value=None, why="the features are all the same or not finite")


def check(store: PreparedStore, preparation: Preparation) -> Cohort:
    """Refuse cases that `probe` could not use; returns those that it would.

    Raises:
        DagmanError: `E-GRID` for another spacing; `E-LABEL`, `E-PATIENT` and `E-FOLDS` as `classify.probe`;
            `E-NOMASK` for cases with an empty mask.
    """
    suited(store, preparation)
    crops.refuse_empty_masks(store, range(len(store)))
    if not any(row.get("label") is not None for row in store.rows):
        advice = "prepare its cases from a table with a column label: `dagman prepare -i CASES.csv -o labelled`"
        raise DagmanError("LABEL", store.folder, "holds no case with a label", advice)
    return cohorts.cohort(cohorts.stored(store), Protocol(), positive=positive_of(store), unlabelled="leave_out")


def features_of(encoder: Encoder) -> Which:
    """What is probed of an encoder: all that it has."""
    return "all" if encoder.config.has_cls else "pooled"


def probe(
    encoder: Encoder, store: PreparedStore, *, which: Which = "pooled", device: torch.device | str = "cpu"
) -> Estimate:
    """AUC of a linear probe; without a value where the features are all the same."""
    found = predict(encoder, store, which=which, device=device)
    return NOTHING_TO_READ if found is None else found.auc()


def predict(
    encoder: Encoder, store: PreparedStore, *, which: Which = "pooled", device: torch.device | str = "cpu"
) -> ProbeResult | None:
    """A linear probe's predictions for the labelled cases; None where the features are all the same or not finite."""
    table = embed(encoder, store, which=which, device=device)
    try:
        return classify.probe(table, positive=positive_of(store), unlabelled="leave_out")
    except DagmanError as error:
        if error.code != "FEATURES":
            raise
        return None


def positive_of(store: PreparedStore) -> str | None:
    """The class called positive where nobody says: as `labels.last_of_two`."""
    return last_of_two([row.get("label") for row in store.rows])


def identity(store: PreparedStore) -> str:
    """Changes with the scans, their labels and patients, and with the place of crops of those that have masks."""
    said = [[row["case_id"], row.get("label"), row.get("patient")] for row in store.rows]
    where = [place] if (place := crops.around(store)) else []
    return hashlib.sha256(json.dumps([store.store_id, said, *where]).encode()).hexdigest()
