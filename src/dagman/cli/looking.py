"""The verbs that look into encoders, one or several side by side: attention, cluster, diversity."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from dagman.cli.watching import Output, progress, require, say
from dagman.errors import ExitCode

if TYPE_CHECKING:
    from dagman.nets.encoder import Encoder

Weights = Annotated[list[Path], Parameter(consume_multiple=True, negative=())]
Store = Annotated[Path, Parameter(name=["--input", "-i"])]


def diversity(
    *,
    weights: Weights,
    data: Store,
    output: Output,
    crops: int = 16,
    seed: int = 0,
    device: str = "cpu",
) -> int:
    """Compare how far attention heads look, and how differently: distances in mm and entropies by stage.

    Args:
        weights: Run folders or .safetensors files; the first is what the others are compared with.
        data: A prepared store.
        output: Folder for heads.csv, crops.csv, result.json and diversity.png.
        crops: How many crops are drawn from the store, the same for all weights.
        seed: Of the crops and the bootstrap.
        device: `cpu` or `cuda`.
    """
    from dagman.ct.store import PreparedStore
    from dagman.tasks import diversity as heads

    encoders, store = _loaded(weights), PreparedStore(data)
    runs = {}
    for name, encoder in encoders.items():
        with progress(f"Heads of {name}") as tell:
            runs[name] = heads.head_diversity(encoder, store, num_crops=crops, seed=seed, device=device, progress=tell)
    cases = {look.case_id for look in next(iter(runs.values()))}
    say(f"{crops} crops of {len(cases)} cases, seed {seed}")
    say("mean over crops with 95 % interval: distance in mm; entropy of the heads' distances, and of their rows, over")
    say("the largest possible")
    rows = heads.summary(runs, seed=seed)
    for row in rows:
        far, apart, spread = (brief(row[name]) for name in ("distance_mm", "distance_entropy_ratio", "row_entropy"))
        print(f"{row['weights']:24s} {row['place']:18s} {row['heads']:3d} heads: {far:24s} {apart:24s} {spread}")
    _say_why_no_interval(rows[0]["distance_mm"])
    say(f"wrote {', '.join(map(str, heads.write(runs, output, seed=seed)))}")
    return ExitCode.OK


def _loaded(weights: list[Path]) -> "dict[str, Encoder]":
    """Encoders by name: the run folder's or the file's, with what lies above it where two are alike."""
    from dagman.nets.weights import load_encoder

    found = {}
    for path, name in zip(weights, names(weights), strict=True):
        found[name] = load_encoder(path)
        say(str(found[name].report))
    return found


def names(weights: list[Path]) -> list[str]:
    """A short name for each path that no other has, which can stand in a file's name.

    Raises:
        DagmanError: `E-USAGE` for weights that are given twice.
    """
    whole = [path.resolve().with_suffix("") if path.suffix == ".safetensors" else path.resolve() for path in weights]
    twice = [str(path) for path, count in Counter(whole).items() if count > 1]
    require(not twice, "--weights", f"names {', '.join(twice)} twice", "name all weights once")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return ["-".join(path.parts[-depth:]).replace(" ", "_") for path in whole]


def brief(estimate: dict[str, Any]) -> str:
    """An estimate of a result as a table shows it: no words."""
    if estimate["value"] is None:
        return "n/a"
    bounds = "" if estimate["low"] is None else f" ({estimate['low']:.3f} to {estimate['high']:.3f})"
    return f"{estimate['value']:.3f}{bounds}"


def _say_why_no_interval(estimate: dict[str, Any]) -> None:
    if estimate["low"] is None:
        say(f"No interval: {estimate['why']}")
