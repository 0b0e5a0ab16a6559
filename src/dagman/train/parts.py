"""The parts of a labelled study, learnt and tested one after the other; what is finished is not done again."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from dagman import files
from dagman.errors import DagmanError, count
from dagman.tasks.protocol import Part
from dagman.train.finetune import FinetuneConfig, Fitted, Lesson, Progress, finished, fit, forget

_SIDE = re.compile(r"(?i:(?<![a-z])(left|right)(?![a-z]))|(?<![A-Za-z])[LlRr](?![A-Za-z0-9])|(Left|Right)(?![a-z])")
"""A side as a word, as a letter of its own (not the L of L1), or at the start of a part of a CamelCase name."""
_UNNAMED = re.compile(r"label \d+")


@runtime_checkable
class Study(Protocol):
    """A labelled study: what each of its parts learns, and what becomes of it."""

    @property
    def folder(self) -> Path:
        """Where all is written."""

    def lesson(self, part: Part) -> Lesson:
        """What a part learns, anew."""

    def conclude(self, part: Part, lesson: Any, fitted: Fitted, seconds: float) -> dict[str, Any]:
        """Test what was learnt and write it, the part's `result.json` last."""

    def told(self, part: Part, result: dict[str, Any]) -> str:
        """How good it is, for a person."""

    def summarise(self, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
        """Write the study over its finished parts, by number; its `result.json`."""


def place(study: Study, part: Part) -> Path:
    """The folder of a part."""
    return study.folder / f"fold-{part.number}"


def learn(
    study: Study,
    parts: Sequence[Part],
    config: FinetuneConfig,
    *,
    only: Sequence[int] | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    workers: int = 0,
    progress: Progress | None = None,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Learn and test every part that is not finished; the study's result, or None when a signal stopped it.

    Other processes may learn other parts meanwhile: the result is over all that are finished at its end.

    Args:
        study: What is learnt.
        parts: Of the study.
        config: How long and how fast.
        only: Parts to do now; all without.
        device: Where to compute; the GPU where there is one.
        workers: Processes that read crops ahead.
        progress: Hears of each step.
        say: Hears a line before and after each part.

    Raises:
        DagmanError: `E-RESUME` (exit code 4) for a part that was learnt with other settings; and as `fit`.
    """
    identities = []
    for part in parts:
        lesson = study.lesson(part)
        identities.append(lesson.identity)
        result = finished(place(study, part), lesson.identity)
        if result is None and (only is None or part.number in only):
            say(
                f"fold {part.number}: {len(part.train)} cases to learn from, {len(part.held_out)} to choose the best "
                f"step on, {len(part.test)} to test"
            )
            started = time.monotonic()
            fitted = fit(lesson, config, place(study, part), device=device, workers=workers, progress=progress)
            if not fitted.finished:
                return None
            result = study.conclude(part, lesson, fitted, time.monotonic() - started)
            forget(place(study, part))
        if result is not None:
            say(f"fold {part.number}: best step {result['best_step']}, {study.told(part, result)}")
    with files.folder_lock(study.folder, wait=True):  # whoever is last sees all
        found = {part.number: finished(place(study, part), one) for part, one in zip(parts, identities, strict=True)}
        done = {number: result for number, result in found.items() if result is not None}
        if missing := len(parts) - len(done):
            say(f"{count(missing, 'fold is', 'folds are')} not finished yet, of {len(parts)}")
        return study.summarise(done)


def sided(classes: Sequence[str]) -> list[str]:
    """The classes whose names tell a side of the body: left lung, kidney_l, RightAtrium."""
    return [name for name in classes if _SIDE.search(name)]


def refuse_mirrored_sides(classes: Sequence[str], *, keep_sides: bool, say: Callable[[str], None]) -> None:
    """Whoever mirrors crops swaps left and right.

    Args:
        classes: Their names: words tell sides (`sided`), numbers do not.
        keep_sides: Crops are not mirrored.
        say: Hears a warning about classes whose names tell nothing.

    Raises:
        DagmanError: `E-CONFIG` where classes name a side and crops are mirrored.
    """
    if keep_sides:
        return
    if swapped := sided(classes):
        raise DagmanError(
            "CONFIG",
            "keep_sides",
            f"is off, and classes name a side ({', '.join(swapped[:4])}), which mirrored crops swap",
            "add --keep-sides",
        )
    unnamed = [name for name in classes if _UNNAMED.fullmatch(name)]
    if len(unnamed) > 1:
        say(f"crops are mirrored: where {', '.join(unnamed[:4])} are left and right of one thing, add --keep-sides")
