"""What the alarms of `dagman.train.health` say of the recorded runs of `dagman-tiny`: `docs/learning.md`."""

import json
import re
from typing import Any, NamedTuple

from common import rows
from learning import asked, learning

from dagman.pretext import examination
from dagman.train.health import ALARMS, COLLAPSED, Watch


class Heard(NamedTuple):
    """A run, what rang in it, and where it ended."""

    name: str
    changed: bool
    """Whether a setting, or what no setting changes, differs from the recipe."""
    rang: bool
    lasting: set[str]
    """What still rings at the end; `features collapsed` among it is exit code 7."""
    organs: str
    """Above, below or not apart from an untrained encoder, with 32 labels; empty where it was not asked."""


def learning_alarms() -> str:
    """In how many runs an alarm rang without need, and how many runs that ended useless rang none."""
    # One run may stand in two files: in the table of factors, and among the compared methods.
    results = {json.dumps(result["curve"]): result for result in learning("*-seed*.json")}.values()
    results = [result for result in results if result["config"]["recipe"] == "dagman-tiny" and result["curve"]]
    heard = [_heard(result) for result in results]
    kinds = {
        "the recipe as it is": [run for run in heard if not run.changed],
        "changed, organs end below an untrained encoder": [r for r in heard if r.changed and r.organs == "below"],
        "changed, organs end above or not apart": [
            run for run in heard if run.changed and run.organs in ("above", "not apart")
        ],
        "changed, not asked of organs": [run for run in heard if run.changed and not run.organs],
    }
    body = [
        [
            meaning,
            str(len(runs)),
            *(str(sum(run.organs == end for run in runs)) for end in ("above", "not apart", "below", "")),
            str(sum(run.rang for run in runs)),
            str(sum(run.rang and run.organs == "above" for run in runs)),
            str(sum(COLLAPSED in run.lasting for run in runs)),
        ]
        for meaning, runs in kinds.items()
    ]
    header = ["`dagman-tiny`", "runs", "organs above untrained", "not apart", "below", "not asked", "an alarm rang"]
    table = rows([*header, "of these, organs above", "collapsed at the end: exit code 7"], body)
    return f"{table}\n\n{_told(heard)} {_sources(results)}"


def learning_limits() -> str:
    """Every alarm of the package: what it watches, its limit, from when, and what it says."""
    body = []
    for alarm in ALARMS:
        column = re.sub("^(aitd|ampd|gitd)_", "*_", alarm.column)
        parts = ([f"{alarm.first_ratio:.0%} of the run"] if alarm.first_ratio else []) + (
            [f"step {alarm.first_step}"] if alarm.first_step > 1 else []
        )
        row = [alarm.name, f"`{column}`", alarm.limit, str(alarm.steps), " and ".join(parts) or "the start"]
        if row not in body:
            body.append(row)
    return rows(["alarm", "column", "rings", "rows in a row", "watched from"], body)


def _told(heard: list[Heard]) -> str:
    plain, below = [run for run in heard if not run.changed], [run for run in heard if run.organs == "below"]
    false = [run for run in plain if run.rang]
    caught, missed = ([run for run in below if run.rang == rang] for rang in (True, False))
    above = f" ({sum(run.organs == 'above' for run in false)} end with organs above untrained)" if false else ""
    silent, names = sum(COLLAPSED not in run.lasting for run in below), ", ".join(f"`{run.name}`" for run in missed)
    return (
        f"**False alarms: {len(false)} of {len(plain)}** runs of the recipe as it is{above}. **Caught: {len(caught)} "
        f"of {len(below)}** runs that end below an untrained encoder; at their end still ring: {_ends(caught)}. "
        f"**Missed**, with nothing that rings: {len(missed)} ({names}). Exit code "
        f"7 catches {len(below) - silent} of the {len(below)}."
    )


def _ends(runs: list[Heard]) -> str:
    return "; ".join(f"`{run.name}`: {', '.join(sorted(run.lasting)) or 'nothing'}" for run in runs)


def _sources(results: list[dict[str, Any]]) -> str:
    logged = [result for result in results if "alarms" in result]
    same = sum(bool(result["alarms"]) == bool(replay(result)[0]) for result in logged)
    return (
        f"{len(logged)} of these {len(results)} results tell what rang in the run; for the others the watch was shown "
        "their thinned curves again, each point for all steps since the last, so that it may ring where the run did "
        f"not, or the other way (where both are there they agree in {same} of {len(logged)})."
    )


def replay(result: dict[str, Any]) -> tuple[list[str], set[str]]:
    """What the watch says of a recorded curve, and what still rings at its end.

    A point of a thinned curve stands for the steps since the last, but for what is examined at its own step alone.
    """
    watch, last, messages = Watch(result["steps"]), 0, []
    for point in result["curve"]:
        often = {name: value for name, value in point.items() if name not in examination.MEANINGS}
        for step in range(last + 1, point["step"]):
            messages += watch.see({**often, "step": step})
        messages += watch.see(point)
        last = point["step"]
    return messages, watch.ringing()


def _heard(result: dict[str, Any]) -> Heard:
    messages, ringing = replay(result)
    table = result["probes"][-1]["rows"] if result["probes"] else []
    organ = asked(table, "organ", "all", 32)
    above = organ["above untrained"] if organ else None
    return Heard(
        name=f"{result['name'].removeprefix('today-')}, seed {result['seed']}",
        changed=bool(result["settings"] or result["altered"]),
        rang=bool(result.get("alarms", messages)),
        lasting=ringing,
        organs="" if not above else "above" if above["low"] > 0 else "below" if above["high"] < 0 else "not apart",
    )
