"""The verb that lays results of the same cases side by side."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dagman.cli.watching import require, say
from dagman.errors import ExitCode


def compare(runs: list[Path], /, *, output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None) -> int:
    """Compare results of the same cases: scores of the first less those of each other, with interval (AUC: and p).

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
    found = {str(run): predictions.read(run) for run in runs}
    rows = comparison.rows(found)
    for line in comparison.lines(rows):
        print(line)
    say(comparison.NOTE)
    shown = {str(json.loads((run / predictions.RESULT).read_text()).get("preparation")) for run in runs} - {"None"}
    if len(shown) > 1:
        say("Note: they were shown other windows, crops or spacings: what differs need not come of the weights")
    if any(one.group_by == "case" for one in found.values()):
        say("Note: not grouped by patient: scores may be too good, and intervals too narrow")
    if output:
        comparison.write(rows, output)
        files.write_bytes(output / "roc.png", roc.png({f"{name}: {one.auc()}": one for name, one in found.items()}))
        say(f"wrote {output / 'comparison.csv'} and {output / 'roc.png'}")
    return ExitCode.OK


def _compare_segmentations(runs: list[Path], output: Path | None) -> int:
    from dagman.tasks import segmentation_comparison as comparison

    rows = comparison.differences({str(run): comparison.read(run) for run in runs})
    for line in comparison.lines(rows):
        print(line)
    say(comparison.NOTE)
    if output:
        say(f"wrote {comparison.write(rows, output)}")
    return ExitCode.OK
