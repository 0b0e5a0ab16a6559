"""Cross-validation plans: patients whole, classes spread evenly, every class in every fold, or a refusal."""

import numpy as np
from jaxtyping import Int, Shaped

from dagman import randomness
from dagman.errors import DagmanError

_PLAN_ATTEMPTS = 50


def fold_plan(
    classes: Shaped[np.ndarray, " cases"], groups: Shaped[np.ndarray, " cases"], *, folds: int, seed: int
) -> Int[np.ndarray, " cases"]:
    """Fold of each case: patients whole, classes spread evenly, every class in every fold.

    Raises:
        DagmanError: `E-FOLDS` when there are too few patients of a class, or no plan was found.
    """
    plan = _find_plan(classes, groups, folds, seed)
    if plan is None:
        raise _no_plan(classes, groups, folds)
    return plan


def inner_plan(
    classes: Shaped[np.ndarray, " cases"], groups: Shaped[np.ndarray, " cases"], *, seed: int
) -> Int[np.ndarray, " cases"]:
    """Fold plan inside one training part: 3 folds, or 2 where 3 cannot all hold every class.

    Raises:
        DagmanError: `E-FOLDS` when there is neither.
    """
    for folds in (3, 2):
        plan = _find_plan(classes, groups, folds, seed)
        if plan is not None:
            return plan
    raise _no_plan(classes, groups, 2, "training part of a fold")


def _no_plan(classes: np.ndarray, groups: np.ndarray, folds: int, subject: str = "fold plan") -> DagmanError:
    counts = _patients_per_class(classes, groups)
    if classes.dtype == bool or len(counts) == 2:
        told = f"{counts[-1]} with positive and {counts[0]} with negative cases"
        every = "both classes"
    else:
        told, every = f"{min(counts)} of the rarest of {len(counts)} classes", "every class"
    return DagmanError(
        "FOLDS",
        subject,
        f"{len(np.unique(groups))} patients, {told}: {folds} folds cannot all hold {every}",
        "label more patients, or change the number of folds (at least 2)",
    )


def _patients_per_class(classes: np.ndarray, groups: np.ndarray) -> list[int]:
    names = [False, True] if classes.dtype == bool else range(int(classes.max()) + 1)
    return [len(np.unique(groups[classes == name])) for name in names]


def _find_plan(classes: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray | None:
    counts = _patients_per_class(classes, groups)
    if folds < 2 or min(counts) < folds:
        return None
    for attempt in range(_PLAN_ATTEMPTS):
        fold = _draw_plan(classes, groups, folds, randomness.torch_seed(seed, "folds", attempt) % 2**32)
        if all(len(np.unique(classes[fold == number])) == len(counts) for number in range(folds)):
            return fold
    return None


def _draw_plan(classes: np.ndarray, groups: np.ndarray, folds: int, state: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold

    # StratifiedGroupKFold warns where a class has fewer cases than folds: then there are too few patients as well.
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=state)
    fold = np.empty(len(classes), dtype=np.int64)
    for number, (_, test) in enumerate(splitter.split(classes, classes, groups)):
        fold[test] = number
    return fold
