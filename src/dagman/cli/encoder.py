"""The verbs that use an encoder: embed, attention, export, info."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from dagman.cli.watching import Device, Number, Output, Switch, by, maker, next_step, progress, require, say
from dagman.errors import DagmanError, ExitCode, count

KNOWN = (
    "a recipe's name, a run folder, weights, a classifier, a segmenter, a prepared store, features with their .json, "
    "or what a verb wrote"
)
OUTPUTS = {"comparison.json": "compare", "predictions.jsonl": "segment predict"}
"""Files by which a verb's output is known that has no `result.json`."""


def embed(
    *,
    weights: Path,
    data: Annotated[Path, Parameter(name=["--input", "-i"])],
    output: Output,
    which: Literal["pooled", "cells", "cls", "all"] = "pooled",
    untrained: Switch = False,
    seed: int = 0,
    device: Device = "cpu",
    batch_size: Number | None = None,
) -> int:
    """Turn every case of a prepared store into one vector; write a CSV.

    The crop is centred on the centroid of the case's mask where it has one; else the mean over crops that cover the
    scan is taken.

    Args:
        weights: A run folder or a .safetensors file.
        data: A prepared store.
        output: The CSV file: case_id, patient, label, f0, f1, ...
        which: Mean of the final tokens, mean of the cell tokens (more of what is small), [CLS], or all side by side.
        untrained: Give the encoder new random weights first, to compare with.
        seed: Of these weights; several seeds tell what is chance.
        device: `cpu` or `cuda`.
        batch_size: Crops at a time, by their size if not given; no influence on the result.
    """
    from dagman.config import to_dict
    from dagman.ct import crops
    from dagman.ct.store import PreparedStore, refuse_inside
    from dagman.files import sha256_file
    from dagman.nets.weights import load_encoder
    from dagman.tasks import embed as embedding
    from dagman.tasks import leakage
    from dagman.tasks.labels import classes_of, last_of_two
    from dagman.tasks.origin import Origin, origin_file, refuse_foreign, write_origin
    from dagman.tasks.table import write_csv

    require(untrained or seed == 0, "--seed", "is of new random weights", "add --untrained")
    refuse_inside(output)
    refuse_foreign(output)
    encoder, store = load_encoder(weights), PreparedStore(data)
    say(f"new random weights, of the sizes of {weights}" if untrained else str(encoder.report))
    start, preparation = None if untrained else weights, embedding.suited(store, encoder.preparation)
    origin = Origin(
        weights=start,
        which=which,
        store=store.store_id,
        seen=leakage.seen(store.rows, start),
        twins=leakage.twins(store),
        masks=sum(row["mask"] is not None for row in store.rows),
        weights_sha256=sha256_file(encoder.report.source) if start and encoder.report else None,
        cases=[leakage.told(row) for row in store.rows],
        preparation=to_dict(preparation),
        crop_mm=crops.sides_mm(store, preparation.crop),
        crops_around=crops.around(store),
        encoder=to_dict(encoder.config),
    )
    if untrained:
        encoder = embedding.untrained(encoder, seed)
    rows, empty = crops.croppable(store)
    for line in empty:
        say(line)
    if not rows:
        return ExitCode.NOTHING_USABLE
    asked: dict[str, Any] = {"which": which, "rows": rows, "device": device, "batch_size": batch_size}
    with progress("Embedding") as tell:
        table = embedding.embed(encoder, store, **asked, progress=tell)
    write_csv(table, output)
    write_origin(origin, output)
    cases = f"{count(len(table.case_ids), 'case', 'cases')}, {table.features.shape[1]} features each"
    say(f"{cases}; wrote {output} and {origin_file(output)}")
    if masks := sum(store.rows[row]["mask"] is not None for row in rows):
        size = f" of {by(origin.crop_mm)} mm" if origin.crop_mm else ""
        say(f"{masks} of them by a crop{size} around {origin.crops_around}")
    if len(classes := classes_of(table.labels)) > 1:
        last = last_of_two(table.labels)
        positive = ["--positive", shlex.quote(last)] if last else []
        if last:
            say(f"--positive says which class counts as positive: {classes[0]} or {classes[1]}")
        grouped = [] if all(table.patients) else ["--group-by case"]
        place = output.with_name(f"{output.stem}-probe")
        next_step("dagman classify probe -i", output, "-o", place, *positive, *grouped)
    return ExitCode.OK if len(rows) == len(store) else ExitCode.REJECTED


def export(*, weights: Path, output: Output, to: Literal["monai"] = "monai") -> int:
    """Write an encoder for another program.

    Args:
        weights: A run folder or a .safetensors file.
        output: The .safetensors file to write.
        to: `monai`: the keys `swinViT.*` that MONAI's SwinUNETR loads.
    """
    from dagman.ct.store import refuse_inside
    from dagman.nets.weights import export_monai

    refuse_inside(output)
    say(str(export_monai(weights, output)))
    say(f"wrote {output} for {to}")
    return ExitCode.OK


def info(thing: str, /) -> int:
    """Say what a recipe, a run folder, a weights file, a classifier, a segmenter, a store or a verb's output is.

    Args:
        thing: A recipe's name or a path.
    """
    from dagman import config as configs
    from dagman import recipes
    from dagman.ct.store import MANIFEST, PreparedStore
    from dagman.nets.weights import load_encoder
    from dagman.run import Run
    from dagman.tasks import classifier, segmenter

    path = Path(thing)
    cards = [place / module.CARD for module in (classifier, segmenter) for place in module.places(path)]
    if thing in (*recipes.RECIPES, recipes.ALIAS):
        print(configs.to_yaml(recipes.get(thing)), end="")
    elif (path / MANIFEST).is_file():
        store = PreparedStore(path)
        patients = {row.get("patient") for row in store.rows} - {None}
        labelled = sum(row.get("label") is not None for row in store.rows)
        named = f" of {count(len(patients), 'patient', 'patients')}" if patients else ", patients not named"
        cases = count(len(store), "prepared case", "prepared cases")
        print(f"{cases}{named}, {labelled} with a label, store {store.store_id}")
        print(json.dumps(store.settings))
    elif cards:
        print(f"{count(len(cards), 'network', 'networks')}: {', '.join(map(str, cards))}")
        print(cards[0].read_text(), end="")
    elif Run(path).config_file.is_file():
        rows = Run(path).metrics()
        print(f"run after {rows[-1]['step'] if rows else 0} steps")
        print(Run(path).config_file.read_text(), end="")
    elif _may_be_weights(path):
        encoder = load_encoder(path)
        print(encoder.report)
        print(encoder.preparation)
    elif line := _made(path):
        print(line)
    elif path.exists():
        raise DagmanError("THING", path, "is not known", f"give {KNOWN}; of scans, `dagman check` says what they are")
    else:
        raise configs.unknown("THING", thing, [*recipes.RECIPES, "a path that exists"])
    return ExitCode.OK


def _may_be_weights(path: Path) -> bool:
    """Whether a file begins as safetensors or a pickle do, or a folder holds weights; what is wrong is then told."""
    if not path.is_file():
        return (path / "weights").is_dir() or (path / "model.safetensors").is_file()
    with path.open("rb") as stream:
        start = stream.read(9)
    return path.suffix == ".safetensors" or start[8:] == b"{" or start.startswith((b"PK\x03\x04", b"\x80"))


def _made(path: Path) -> str | None:
    """What a verb wrote, in one line: a table of features, or what lies in the folder of its results."""
    from dagman.tasks.origin import read_origin

    if path.suffix in (".csv", ".json") and path.is_file() and (origin := read_origin(path.with_suffix(".csv"))):
        cases = count(len(origin.cases), "case", "cases")
        return f"features ({origin.which}) of {cases}, by {origin.weights or 'new random weights'}"
    folder = path if path.is_dir() else path.parent
    others = (verb for name, verb in OUTPUTS.items() if (folder / name).is_file())
    verb = (maker(folder) or next(others, None)) if path.exists() else None
    return verb and f"{'the result' if path.is_dir() else 'a file in the result'} of `dagman {verb}`"
