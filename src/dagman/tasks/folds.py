"""Cross-validation plans: patients whole, classes spread evenly, both classes in every fold, or a refusal."""

import numpy as np
from jaxtyping import Bool, Int, Shaped

from dagman import randomness
from dagman.errors import DagmanError

_PLAN_ATTEMPTS = 50


def fold_plan(
    positive: Bool[np.ndarray, " cases"], groups: Shaped[np.ndarray, " cases"], *, folds: int, seed: int
) -> Int[np.ndarray, " cases"]:
    """Fold of each case: patients whole, classes spread evenly, both classes in every fold.

    Raises:
        DagmanError: `E-FOLDS` when there are too few patients of a class, or no plan was found.
    """
    plan = _find_plan(positive, groups, folds, seed)
    if plan is None:
        raise _no_plan(positive, groups, folds)
    return plan


def inner_plan(
    positive: Bool[np.ndarray, " cases"], groups: Shaped[np.ndarray, " cases"], *, seed: int
) -> Int[np.ndarray, " cases"]:
    """Fold plan inside one training part: 3 folds, or 2 where 3 cannot all hold both classes.

    Raises:
        DagmanError: `E-FOLDS` when there is neither.
    """
    for folds in (3, 2):
        plan = _find_plan(positive, groups, folds, seed)
        if plan is not None:
            return plan
    raise _no_plan(positive, groups, 2, "training part of a fold")


def _no_plan(positive: np.ndarray, groups: np.ndarray, folds: int, subject: str = "fold plan") -> DagmanError:
    num_positive, num_negative = _patients_per_class(positive, groups)
    return DagmanError(
        "FOLDS",
        subject,
        f"{len(np.unique(groups))} patients, {num_positive} with positive and {num_negative} with negative cases: "
        f"{folds} folds cannot all hold both classes",
        "label more patients, or change the number of folds (at least 2)",
    )


def _patients_per_class(positive: np.ndarray, groups: np.ndarray) -> tuple[int, int]:
    return len(np.unique(groups[positive])), len(np.unique(groups[~positive]))


def _find_plan(positive: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray | None:
    if folds < 2 or min(_patients_per_class(positive, groups)) < folds:
        return None
    for attempt in range(_PLAN_ATTEMPTS):
        fold = _draw_plan(positive, groups, folds, randomness.torch_seed(seed, "folds", attempt) % 2**32)
        if all(len(np.unique(positive[fold == number])) == 2 for number in range(folds)):
            return fold
    return None


def _draw_plan(positive: np.ndarray, groups: np.ndarray, folds: int, state: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold

    # StratifiedGroupKFold warns where a class has fewer cases than folds: then there are too few patients as well.
    splitter = StratifiedGroupKFold(n_splits=folds, shuffle=True, random_state=state)
    fold = np.empty(len(positive), dtype=np.int64)
    for number, (_, test) in enumerate(splitter.split(positive, positive, groups)):
        fold[test] = number
    return fold
