"""The verb that lays results of the same cases side by side."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dagman.cli.looking import brief
from dagman.cli.watching import require, say, short_names
from dagman.errors import ExitCode


def compare(runs: list[Path], /, *, output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None) -> int:
    """Compare results of the same cases: scores of the first less those of each other, with interval (AUC: and p).

    Where several of the others come from untrained encoders, a last line holds the first against any of them.

    Args:
        runs: Output folders of `dagman classify probe` or `finetune`, on the same cases with the same folds; or of
            `dagman segment train` or `score`, of the same references.
        output: Folder for comparison.csv, and roc.png of classifications.
    """
    from dagman import files
    from dagman.figures import roc
    from dagman.tasks import comparison, predictions

    require(len(runs) > 1, "compare", "was given fewer than two results", "give two folders or more")
    if all((run / "cases.csv").is_file() for run in runs):
        return _compare_segmentations(runs, output)
    names = short_names(runs, "compare")
    found = {name: predictions.read(run) for name, run in zip(names, runs, strict=True)}
    told = [json.loads((run / predictions.RESULT).read_text()) for run in runs]
    alike = [result.get("source") == "new random weights" for result in told]
    untrained = [name for name, random in zip(names[1:], alike[1:], strict=True) if random]
    rows = comparison.rows(found, untrained)
    for line in comparison.lines(rows):
        print(line)
    say(comparison.NOTE)
    if len(untrained) == 1:
        say(comparison.ONE_DRAW)
    shown = {str(result.get("preparation")) for result in told} - {"None"}
    if len(shown) > 1:
        say("Note: they were shown other windows, crops or spacings: what differs need not come of the weights")
    if any(one.group_by == "case" for one in found.values()):
        say("Note: not grouped by patient: scores may be too good, and intervals too narrow")
    if output:
        comparison.write(rows, output)
        labelled = {f"{name}: {brief(vars(one.auc()))}": one for name, one in found.items()}
        files.write_bytes(output / "roc.png", roc.png(labelled))
        say(f"wrote {output / 'comparison.csv'} and {output / 'roc.png'}")
    return ExitCode.OK


def _compare_segmentations(runs: list[Path], output: Path | None) -> int:
    from dagman.tasks import segmentation_comparison as comparison

    names = short_names(runs, "compare")
    rows = comparison.differences({name: comparison.read(run) for name, run in zip(names, runs, strict=True)})
    for line in comparison.lines(rows):
        print(line)
    say(comparison.NOTE)
    if output:
        say(f"wrote {comparison.write(rows, output)}")
    return ExitCode.OK
