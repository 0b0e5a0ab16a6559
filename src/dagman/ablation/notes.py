"""Sentences of a comparison's heading: what was asked of each run, and how to read it."""

from collections.abc import Mapping, Sequence
from typing import Any

from dagman.ablation import scores
from dagman.tasks.family import Probed

PAPER = "Paper: 10,412 CTs, 800 epochs, crops of 128 voxels"
NUMBERS = "its numbers are of other tasks, data and sizes and say which way to expect, not how much."
NO_NUMBERS = "it gives no numbers for this, only pictures."
ANOTHER = "The paper's AUC is of malignancy, mostly after fine-tuning: another quantity than this probe's."
INTERVALS = (
    "Intervals draw patients again, the same for all runs, and keep what was fitted; those of folds have their "
    "standard error times 1.41, as each fold's cases taught what tests the others. One seed gives no range."
)
TUNING = "AUC after fine-tuning (`--finetune STEPS`)"
FEATURES = {"all": "all features (pooled, cells and [CLS])", "pooled": "pooled features"}


def probe(probed: Sequence[Probed]) -> str:
    """About the linear probes of all runs that have one."""
    if not probed:
        return "No labelled cases were given: nothing was probed."
    words = [FEATURES[name] for name in sorted({one.features for one in probed})]
    features = ", or of encoders without [CLS] ".join(words)
    return f"Probe: a linear probe on {features} about {task(probed[0].study)} {ANOTHER}"


def task(study: Mapping[str, Any]) -> str:
    """What was probed about, and how much of it pretraining saw."""
    seen = study["seen"]
    same, others = seen["same_voxels"]["count"], seen["same_patient"]["count"]
    share = f"The training store holds {same} of these cases ({same / seen['tested']:.0%})"
    patients = f" and other CTs of the patients of {others} more" if others else ""
    return (
        f"'{study['positive']}' (the positive class) against '{study['negative']}', {seen['tested']} cases of "
        f"{study['patients']} patients in the store '{study['store']}'. {share}{patients}, without their labels."
    )


def tuned(steps: int) -> str:
    """About fine-tuning, on the cases of the probe."""
    config = scores.tuning(steps)
    return (
        f"Fine-tuned: all layers and a linear one on {FEATURES[config.which]}, {config.finetune.steps} steps of "
        f"{config.finetune.batch_size} crops in each of the probe's folds, the best step chosen on patients held out "
        "of the training part; untrained encoders from new random weights, at one learning rate."
    )


def organs(asked: Mapping[str, Any]) -> str:
    """About clusters of organs."""
    among = "" if asked["group_by"] == "patient" else ", which knows no patients: neighbours may be of one"
    crops = f"{asked['crops']} crops of {asked['of']}, {asked['classes']} classes"
    where = f"{asked['groups']} {asked['group_by']}s of the store '{asked['store']}'{among}"
    how = "pooled features, one UMAP of seed 0; intervals over them are in each run's clusters.json"
    return f"Organs: {crops}, in {where}; {how}. The paper's are OrganMNIST3D."
