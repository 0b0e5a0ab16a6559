"""What a linear probe reads off features with few labels: 8, 32 or all of one half of the patients, over many draws.

A draw halves the patients, takes labels from one half, balanced over the classes, fits a logistic regression on
standardised features, and ranks the cases of the other half. The score is the mean AUC over the draws, of one class
against the others and then over the classes where there are more than two. Its interval draws patients again and keeps
the fitted probes and their labels; features that are compared meet the same draws and the same resamples. Beside
untrained networks the interval draws one of them, too.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dagman.randomness import generator
from dagman.tasks import statistics

DRAWS = 10
TOGETHER = "all"
"""The name of all features of an encoder side by side."""
LABELS = (8, 32, None)
"""None is all labels of a half."""
STRENGTH = 0.1
"""Inverse regularisation of the logistic regression, the same for all features."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What the probes of one set of features said."""

    probability: np.ndarray
    """(draws, cases, classes); NaN for cases that the draw did not test."""
    truth: np.ndarray
    """(cases, classes), boolean."""
    patients: np.ndarray
    known: dict[int, np.ndarray] = field(default_factory=dict)
    """Statistics of weights that were asked for before: all comparisons meet the same resamples."""

    def statistic(self, weights: np.ndarray) -> np.ndarray:
        """Mean AUC over draws and classes, for each row of case weights."""
        key = hash(weights.tobytes())
        if key not in self.known:
            self.known[key] = self._statistic(weights)
        return self.known[key]

    def _statistic(self, weights: np.ndarray) -> np.ndarray:
        """`statistics.auc` of every draw and class, by pairs of patients: the cases of one share its weight."""
        people, first, person = np.unique(self.patients, return_index=True, return_inverse=True)
        times, of = weights[:, first], np.eye(len(people))[person]
        classes = range(1, 2) if self.truth.shape[1] == 2 else range(self.truth.shape[1])
        found = []
        for probability in self.probability:
            tested = np.isfinite(probability[:, 0])
            for column in classes if tested.any() else ():
                up, down = tested & self.truth[:, column], tested & ~self.truth[:, column]
                wins = 0.5 + 0.5 * np.sign(probability[up, column, None] - probability[None, down, column])
                won = (times @ (of[up].T @ wins @ of[down]) * times).sum(axis=1)
                pairs = (times @ of[up].sum(axis=0)) * (times @ of[down].sum(axis=0))
                with np.errstate(invalid="ignore"):  # a resample may leave a draw without a class
                    found.append(won / pairs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            mean: np.ndarray = np.nanmean(np.stack(found), axis=0)
        return mean


def probe(
    features: np.ndarray,
    words: np.ndarray,
    patients: np.ndarray,
    labels: int | None,
    scored: np.ndarray | None = None,
) -> Scores:
    """Fit and apply the probes of all draws.

    Args:
        features: (cases, width).
        words: Class of each case.
        patients: Of each case; never on both sides.
        labels: Labelled cases of a draw, None for all of its half.
        scored: Cases that count in the score; all where None.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names, people = np.unique(words), np.unique(patients)
    truth = words[:, None] == names
    probability = np.full((DRAWS, *truth.shape), np.nan)
    for draw in range(DRAWS):
        draws = generator(0, "learning.probe", draw)
        first = np.isin(patients, draws.permutation(people)[: len(people) // 2])
        shuffled = draws.permutation(np.flatnonzero(first))
        share = len(shuffled) if labels is None else max(1, labels // len(names))
        chosen = np.concatenate([shuffled[truth[shuffled, column]][:share] for column in range(len(names))])
        if len(np.unique(words[chosen])) < len(names):
            continue
        model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
        model.fit(features[chosen], words[chosen])
        probability[draw, ~first] = model.predict_proba(features[~first])
    if scored is not None:
        probability[:, ~scored] = np.nan
    return Scores(probability, truth, patients)


def estimate(scores: Scores, beside: Scores | None = None) -> dict[str, Any]:
    """AUC with its 95 % interval over patients; with `beside`, how much it lies above that, on the same resamples."""

    def difference(weights: np.ndarray) -> np.ndarray:
        assert beside is not None
        gained: np.ndarray = np.subtract(scores.statistic(weights), beside.statistic(weights))
        return gained

    found = statistics.estimate(
        scores.statistic if beside is None else difference,
        scores.patients,
        scores.truth[:, 1],
        seed=0,
    )
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in vars(found).items()}


def above(scores: Scores, networks: Sequence[Scores]) -> dict[str, Any]:
    """How much an AUC lies above that of a network like `networks`, with a 95 % interval.

    Each resample draws patients again and one of the networks: an interval that leaves out which random weights the
    other network happened to have calls most pairs of untrained networks different from each other.
    """
    people, person = np.unique(scores.patients, return_inverse=True)
    draws = generator(0, "learning.above")
    weights = draws.multinomial(len(people), np.full(len(people), 1 / len(people)), statistics.RESAMPLES)[:, person]
    others = np.stack([network.statistic(weights.astype(float)) for network in networks])
    drawn = others[draws.integers(len(networks), size=len(weights)), np.arange(len(weights))]
    low, high = np.nanquantile(scores.statistic(weights.astype(float)) - drawn, (0.025, 0.975))
    once = np.ones((1, len(person)))
    value = scores.statistic(once)[0] - np.mean([network.statistic(once)[0] for network in networks])
    return {"value": round(float(value), 4), "low": round(float(low), 4), "high": round(float(high), 4), "why": ""}


def together(runs: Sequence[Scores], others: Sequence[Scores]) -> dict[str, Any]:
    """How much the mean AUC of some runs lies above that of others, with one 95 % interval for all of them.

    Each resample draws patients, runs and others again. Draws of n runs vary by less than runs do, by the square root
    of (n - 1) / n: their distances from their mean are stretched by as much. And resamples of a few runs know nothing
    of how little a few runs say of their variance: `by_t` widens the interval by that.
    """
    people, person = np.unique(runs[0].patients, return_inverse=True)
    draws = generator(0, "learning.together")
    weights = draws.multinomial(len(people), np.full(len(people), 1 / len(people)), statistics.RESAMPLES)[:, person]
    once, parts = np.ones((1, len(person))), []
    for some in (runs, others):
        resampled = np.stack([one.statistic(weights.astype(float)) for one in some])
        mean, many = resampled.mean(axis=0), len(some)
        shares = draws.multinomial(many, np.full(many, 1 / many), statistics.RESAMPLES).T / many
        parts.append(mean + ((resampled - mean) * shares).sum(axis=0) * (many / max(1, many - 1)) ** 0.5)
    ends = np.nanquantile(parts[0] - parts[1], (0.025, 0.975))
    each = [[float(one.statistic(once)[0]) for one in some] for some in (runs, others)]
    first, second = map(np.mean, each)
    low, high = first - second + statistics.widening(2) * (ends - (first - second))
    low, high = by_t(first - second, (low, high), each)
    found = {"value": first - second, "low": low, "high": high, "first": first, "second": second}
    return {name: round(float(value), 4) for name, value in found.items()}


def by_t(value: float, ends: tuple[float, float], each: Sequence[Sequence[float]]) -> tuple[float, float]:
    """An interval with normal tails in what comes of a few runs, with those of Student's t in their place.

    Args:
        value: The difference of two means.
        ends: Of its 95 % interval.
        each: The values behind either mean; one alone is no draw.
    """
    from scipy.stats import norm, t

    normal, more = float(norm.ppf(0.975)), 0.0
    for values in each:
        if len(values) > 1:
            more += (
                (float(t.ppf(0.975, len(values) - 1)) ** 2 - normal**2) * float(np.var(values, ddof=1)) / len(values)
            )
    low, high = (float(np.sign(end - value) * np.hypot(end - value, more**0.5)) for end in ends)
    return value + low, value + high
