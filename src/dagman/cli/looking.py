"""The verbs that look into encoders, one or several side by side: attention, cluster, diversity."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from dagman.cli.watching import (
    Device,
    Output,
    Sources,
    Switch,
    claim,
    progress,
    require,
    say,
    say_problems,
    short_names,
)
from dagman.errors import DagmanError, ExitCode, count

if TYPE_CHECKING:
    from dagman.nets.encoder import Encoder

Weights = Annotated[list[Path], Parameter(consume_multiple=True, negative=())]
Store = Annotated[Path, Parameter(name=["--input", "-i"])]
MAPS = "maps.jsonl"
"""What maps were made from what, a line for each scan."""


def attention(
    *,
    weights: Weights,
    sources: Sources,
    output: Output,
    mask: Path | None = None,
    heads: Switch = False,
    group_by: Literal["patient", "case"] = "patient",
    device: Device = "cpu",
) -> int:
    """Show where encoders look: semantic attention on the scan's own grid as NIfTI, pictures, and how well it points.

    Args:
        weights: Run folders or .safetensors files, shown side by side; the others are compared with the first.
        sources: A CT file, DICOM folder, or CSV with masks; patients in the CSV give the gain an interval.
        output: Folder for CASE_attention.nii.gz and CASE_attention.png of each case, attention.csv, result.json, and
            maps.jsonl, which says what each was made from.
        mask: Label map of a single CT, outlined in the picture.
        heads: Also draw every head by itself, in CASE_heads.png.
        group_by: What the gain's interval draws again: `case` where patients are unknown; the result is stamped.
        device: `cpu` or `cuda`.
    """
    from dagman.ct.index import index, refuse_nothing
    from dagman.ct.prepare import refuse_inside
    from dagman.files import append_line, repair_log
    from dagman.tasks import leakage, pointing, provenance, statistics
    from dagman.tasks.attention import explain, picture_of

    refuse_inside(sources, output)
    claim(output, "attention")
    encoders = _loaded(weights)
    scans, problems = index(sources)
    refuse_nothing(sources, scans, problems)
    if mask:
        require(
            len(scans) == 1, "--mask", f"was given with {len(scans)} scans", "give one CT, or a CSV with a mask column"
        )
        scans = [replace(scans[0], mask=mask)]
    failed = say_problems(problems)
    looks, seen, ends = [], [], set()
    for number, scan in enumerate(scans, 1):
        try:
            made = provenance.of(scan)
            provenance.refuse_other(output / MAPS, picture_of(scan, output), made)
            with progress(f"Attention of {scan.case_id} ({number} of {len(scans)})") as tell:
                found = explain(encoders, scan, output, heads=heads, device=device, progress=tell)
        except DagmanError as error:
            if error.exit_code == ExitCode.RESOURCES or error.code == "NOATTENTION":
                raise
            say(str(error))
            ends.add(error.exit_code)
            continue
        repair_log(output / MAPS)
        append_line(output / MAPS, made | {"file": found.picture.name})
        seen.append(scan)
        looks += [look.pointing for look in found.looks.values()]
        for name, (nifti, look) in found.looks.items():
            points = f", {look.shares.gain:.2f} times the body's mean inside the mask" if look.shares else ""
            say(f"{scan.case_id}, {name}: {look.lowest:.2f} to {look.highest:.2f} times uniform over the body{points}")
            say(f"wrote {nifti}")
        say(f"wrote {', '.join(str(path) for path in (found.picture, found.heads) if path)}")
    if not seen:
        return ExitCode.REFUSED if ends == {ExitCode.REFUSED} else ExitCode.NOTHING_USABLE
    overlap = _overlap(encoders, weights, leakage.scan_rows(seen))
    for row in pointing.summary(looks, group_by=group_by)["rows"]:
        if row["cases_with_gain"]:
            _say_why_no_interval(row["gain"])
            print(f"{row['weights']}, {row['cases_with_gain']} masks: gain {statistics.Estimate(**row['gain'])}")
    overlap = {"made_by": "attention", **overlap}
    say(f"wrote {', '.join(map(str, pointing.write(looks, output, group_by=group_by, found=overlap)))}")
    return ExitCode.REJECTED if failed or len(seen) < len(scans) else ExitCode.OK


def cluster(
    *,
    weights: Weights,
    data: Store,
    output: Output,
    of: Literal["structures", "cases"] = "structures",
    names: Path | None = None,
    smallest_mm3: float = 1000.0,
    crops_each: int = 4,
    which: Literal["pooled", "cells", "cls", "all"] = "pooled",
    group_by: Literal["patient", "case"] = "patient",
    seed: int = 0,
    device: Device = "cpu",
) -> int:
    """Do features of one organ lie together? A UMAP of labelled crops, cluster distances, silhouette, k-NN accuracy.

    Beside the weights stand an untrained encoder like the first one, and raw voxels.

    Args:
        weights: Run folders or .safetensors files, shown side by side; the first is compared with the others.
        data: A prepared store with label maps, or with labels for whole cases.
        output: Folder for embeddings-NAME.csv, crops.csv, result.json and clusters.png.
        of: `structures`: crops around every connected structure of the label maps; `cases`: whole cases by their label.
        names: Names of the label map's numbers: CSV label,name or JSON; labels without a name are left out.
        smallest_mm3: Smaller structures are left out.
        crops_each: Crops in each structure, the first in its middle.
        which: Features, as in `dagman embed`.
        group_by: `case` where patients are unknown; the result is stamped.
        seed: Of the crops, the map and the bootstrap.
        device: `cpu` or `cuda`.
    """
    from dagman.ct.store import PreparedStore
    from dagman.tasks import cluster as clusters
    from dagman.tasks import statistics, structures

    claim(output, "cluster")
    clusters.require_umap()
    encoders, store, found, places = _loaded(weights, clusters.BASELINES), PreparedStore(data), {}, None
    if of == "structures":
        named = structures.read_names(names) if names else None
        crops = structures.structures(store, named, smallest_mm3=smallest_mm3, crops_each=crops_each, seed=seed)
        say(str(crops))
        places = crops.places
        found = {
            "structures": crops.structures,
            "smallest_mm3": smallest_mm3,
            "crops_each": crops_each,
            "too_small": dict(crops.too_small),
            "labels_without_name": list(crops.unnamed),
            "cases_without_map": list(crops.without_map),
        }
    with progress("Clustering") as tell:
        runs = clusters.compare(
            encoders, store, places, which=which, group_by=group_by, seed=seed, device=device, progress=tell
        )
    asked = {place.case_id for place in places} if places else set(next(iter(runs.values())).table.case_ids)
    found |= {"made_by": "cluster"}
    found |= _overlap(encoders, weights, [row for row in store.rows if row["case_id"] in asked])
    result = clusters.summary(runs, group_by=group_by)
    say(f"{result['crops']} crops, {len(result['classes'])} classes, {result[group_by + 's']} {group_by}s")
    for row in result["rows"]:
        print(f"{row['features']}:")
        for value, meaning in clusters.MEANINGS.items():
            print(f"  {meaning:48s} {statistics.Estimate(**row[value])}")
    if result["warning"]:
        say(f"Note: {result['warning']}")
    say(f"wrote {', '.join(map(str, clusters.write(runs, output, group_by=group_by, found=found)))}")
    return ExitCode.OK


def diversity(
    *,
    weights: Weights,
    data: Store,
    output: Output,
    crops: int = 16,
    group_by: Literal["patient", "case"] = "patient",
    seed: int = 0,
    device: Device = "cpu",
) -> int:
    """Compare how far attention heads look, and how evenly far: distances in mm and entropies by stage.

    Args:
        weights: Run folders or .safetensors files; the first is what the others are compared with.
        data: A prepared store.
        output: Folder for heads.csv, crops.csv, result.json and diversity.png.
        crops: How many crops are drawn from the store, of the same volumes for all weights.
        group_by: What intervals draw again: `case` where patients are unknown; the result is stamped.
        seed: Of the crops and the bootstrap.
        device: `cpu` or `cuda`.
    """
    from dagman.ct.store import PreparedStore
    from dagman.tasks import diversity as heads

    claim(output, "diversity")
    encoders, store = _loaded(weights), PreparedStore(data)
    runs = {}
    for name, encoder in encoders.items():
        with progress(f"Heads of {name}") as tell:
            runs[name] = heads.head_diversity(encoder, store, num_crops=crops, seed=seed, device=device, progress=tell)
    cases = {look.case_id for look in next(iter(runs.values()))}
    say(f"{count(crops, 'crop', 'crops')} of {count(len(cases), 'case', 'cases')}, seed {seed}")
    say("mean over crops with 95 % interval: distance in mm; entropy of the heads' distances, and of their rows, over")
    say("the largest possible")
    rows = heads.summary(runs, group_by=group_by, seed=seed)
    for row in rows:
        far, apart, spread = (brief(row[name]) for name in ("distance_mm", "distance_entropy_ratio", "row_entropy"))
        print(f"{row['weights']:24s} {row['place']:18s} {row['heads']:3d} heads: {far:24s} {apart:24s} {spread}")
    _say_why_no_interval(rows[0]["distance_mm"])
    found = {"made_by": "diversity"}
    found |= _overlap(encoders, weights, [row for row in store.rows if row["case_id"] in cases])
    say(f"wrote {', '.join(map(str, heads.write(runs, output, group_by=group_by, seed=seed, found=found)))}")
    return ExitCode.OK


def _overlap(encoders: Iterable[str], weights: list[Path], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of the cases each encoder was trained on; said, and for the result."""
    from dagman.tasks import leakage

    found = {}
    for name, path in zip(encoders, weights, strict=True):
        found[name] = leakage.report(leakage.seen(rows, path), [row["case_id"] for row in rows])
        say(f"Note: {name}: {leakage.line(found[name])}")
    return {"pretraining_overlap": found}


def _loaded(weights: list[Path], taken: Sequence[str] = ()) -> "dict[str, Encoder]":
    """Encoders by name: the run folder's or the file's, with what lies above it where one is not the only one."""
    from dagman.nets.weights import load_encoder

    found = {}
    for path, name in zip(weights, short_names(weights, taken=taken), strict=True):
        found[name] = load_encoder(path)
        say(str(found[name].report))
    return found


def brief(estimate: dict[str, Any]) -> str:
    """An estimate of a result as a table shows it: no words."""
    if estimate["value"] is None:
        return "n/a"
    bounds = "" if estimate["low"] is None else f" ({estimate['low']:.3f} to {estimate['high']:.3f})"
    return f"{estimate['value']:.3f}{bounds}"


def _say_why_no_interval(estimate: dict[str, Any]) -> None:
    if estimate["low"] is None:
        way_out = "; --group-by case draws cases" if estimate["why"] == "patients unknown" else ""
        say(f"No interval: {estimate['why']}{way_out}")
