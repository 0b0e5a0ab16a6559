"""The verb that lays results of the same cases side by side."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from dagman.cli.looking import brief
from dagman.cli.watching import require, say, short_names
from dagman.errors import DagmanError, ExitCode

OVERLAP = "comparison.json"
"""Not `result.json`, which the folder of a result that is compared has already."""


def compare(runs: list[Path], /, *, output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None) -> int:
    """Compare results of the same cases: scores of the first less those of each other, with interval (AUC: and p).

    Where several of the others come from untrained encoders, a last line holds the first against any of them.

    Args:
        runs: Output folders of `dagman classify probe` or `finetune`, on the same cases with the same folds; or of
            `dagman segment train` or `score`, of the same references.
        output: Folder for comparison.csv, comparison.json (what pretraining has seen) and roc.png of classifications.
    """
    from dagman import files
    from dagman.figures import roc
    from dagman.tasks import comparison, predictions

    require(len(runs) > 1, "compare", "was given fewer than two results", "give two folders or more")
    if all((run / "cases.csv").is_file() for run in runs):
        return _compare_segmentations(runs, output)
    names = short_names(runs, "compare")
    found = {name: predictions.read(run) for name, run in zip(names, runs, strict=True)}
    told = [_result(run) for run in runs]
    untrained = _untrained(dict(zip(names[1:], told[1:], strict=True)))
    rows = comparison.rows(found, untrained)
    for line in comparison.lines(rows):
        print(line)
    say(comparison.NOTE)
    if any(len(alike) == 1 for alike in untrained):
        say(comparison.ONE_DRAW)
    shown = {str((how, result.get("crops_around"))) for result in told if (how := result.get("preparation"))}
    if len(shown) > 1:
        say("Note: they were shown other windows, crops or spacings: what differs need not come of the weights")
    if any(one.group_by == "case" for one in found.values()):
        say("Note: not grouped by patient: scores may be too good, and intervals too narrow")
    overlap = _overlap(dict(zip(names, told, strict=True)), next(iter(found.values())).case_ids)
    if output:
        comparison.write(rows, output)
        labelled = {f"{name}: {brief(vars(one.auc()))}": one for name, one in found.items()}
        files.write_bytes(output / "roc.png", roc.png(labelled))
        files.write_json(output / OVERLAP, overlap)
        say(f"wrote {output / 'comparison.csv'}, {output / 'roc.png'} and {output / OVERLAP}")
    return ExitCode.OK


def _untrained(told: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Names of probes of encoders with random weights, those together that differ by these weights alone."""
    groups: dict[str, list[str]] = {}
    for name, result in told.items():
        if result.get("source") == "new random weights" and result.get("method") == "linear probe":
            settings = [result.get(key) for key in ("encoder", "which", "preparation", "crops_around")]
            groups.setdefault(json.dumps(settings), []).append(name)
    return list(groups.values())


def _compare_segmentations(runs: list[Path], output: Path | None) -> int:
    from dagman import files
    from dagman.tasks import segmentation_comparison as comparison

    names = short_names(runs, "compare")
    found = {name: comparison.read(run) for name, run in zip(names, runs, strict=True)}
    told = {name: _result(run) for name, run in zip(names, runs, strict=True)}
    rows = comparison.differences(found)
    for line in comparison.lines(rows):
        print(line)
    say(comparison.NOTE)
    overlap = _overlap(told, [row.case_id for row in found[names[0]]])
    if output:
        files.write_json(output / OVERLAP, overlap)
        say(f"wrote {comparison.write(rows, output)} and {output / OVERLAP}")
    return ExitCode.OK


def _result(run: Path) -> dict[str, Any]:
    """What `result.json` in a folder tells; nothing where there is none.

    Raises:
        DagmanError: `E-COMPARE`, exit code 4, for a damaged one.
    """
    from dagman.tasks import leakage
    from dagman.tasks.predictions import RESULT

    path = run / RESULT
    if not path.is_file():
        return {}
    try:
        told = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        problem = f"cannot be read ({type(error).__name__})"
        advice = "make the result again, or remove the file: what pretraining saw is then unknown"
        raise DagmanError("COMPARE", path, problem, advice, exit_code=ExitCode.REFUSED) from None
    leakage.check_report(told.get("pretraining_overlap"), path)
    return told


def _overlap(told: dict[str, dict[str, Any]], tested: Iterable[str]) -> dict[str, Any]:
    """What pretraining has seen of the cases, for any of the results and for each; said, and to be written."""
    from dagman.tasks import leakage

    reports = {name: result.get("pretraining_overlap") for name, result in told.items()}
    found = leakage.together(list(reports.values()), tested)
    say(f"Note: of all results together: {leakage.line(found)}")
    return {"pretraining_overlap": found, "pretraining_overlap_of": reports}
