"""Tables about speed: `docs/performance.md`."""

import json
import statistics
from typing import Any

from common import NOT_YET, RESULTS, load, machine, measured, number, rows


def store() -> str:
    """Reading a random crop from each kind of storage."""
    result = load("store")
    names = [row["storage"] for row in result["volumes"][0]["storages"]]
    body = []
    for index, name in enumerate(names):
        found = [volume["storages"][index] for volume in result["volumes"]]
        times = " to ".join(f"{pick(row['crop_ms'] for row in found):.1f}" for pick in (min, max))
        sizes = " to ".join(f"{pick(row['mib'] for row in found):.1f}" for pick in (min, max))
        writing = " to ".join(f"{pick(row['write_s'] for row in found):.2f}" for pick in (min, max))
        body.append([name, times, sizes, writing])
    names = [volume["volume"] for volume in result["volumes"]]
    what = f"{len(names)} real CTs at 2 mm" if len(names) > 1 else names[0]
    note = f"{what}, medians of random 128^3 crops. {machine(result)}."
    return rows(["storage", "ms a crop", "MiB a volume", "s to write one"], body) + "\n\n" + note


def bench() -> str:
    """How long `make bench` took."""
    result = measured("bench")
    if result is None:
        return "`make bench` has not been timed as a whole yet."
    took = ", ".join(f"{name} {seconds} s" for name, seconds in result["seconds"].items())
    return f"`make bench` took {sum(result['seconds'].values()) / 60:.0f} minutes ({took}). {machine(result)}."


def threads() -> str:
    """What threads cost where products are too small for them."""
    result = measured("threads")
    if result is None:
        return NOT_YET
    body = [
        [
            row["work"],
            "every core busy" if row["busy"] else "no other work",
            number(row["one"], 2),
            number(row["free"], 2),
            number(row["free"] / row["one"], 1),
        ]
        for row in result["rows"]
    ]
    header = ["what", "beside", "s with one thread", "s with the library's own number", "times as long"]
    return rows(header, body) + f"\n\n{machine(result)}."


def step() -> str:
    """Whole pretraining steps beside MONAI's Swin put together plainly."""
    result = load("step")
    case = ("crop", "batch", "precision", "allocator")
    bases = {tuple(row[name] for name in case): row for row in result["rows"] if row["variant"] == "monai"}
    body = []
    whole = [row for row in result["rows"] if not row["variant"].startswith("fast ")]
    for row in sorted(whole, key=lambda row: [*(row[name] for name in case), row["variant"] != "monai"]):
        base = bases.get(tuple(row[name] for name in case))
        base = base if base and base.get("date") == row.get("date") else None  # of another day: another pace
        columns = ("seconds_median", "cpu_seconds", "peak_mib")
        ratios = [number(base[name] / row[name]) if base else "" for name in columns]
        places = [str(row["crop"]), str(row["batch"]), row["precision"], row["allocator"], row["variant"]]
        figures = [number(row["seconds_median"]), number(row["cpu_seconds"]), number(row["peak_mib"], 0)]
        body.append([*places, *figures, *ratios])
    header = [*("crop", "pairs", "precision", "allocator", "variant", "s a step", "CPU s", "peak MiB")]
    header += ["monai / this: time", "CPU", "memory"]
    counts = [row["steps"] for row in whole]
    note = f"Medians of {min(counts)} to {max(counts)} steps"
    return rows(header, body) + f"\n\n{note}. {sittings(whole)}"


def step_ladder() -> str:
    """What a step takes without one part of the fast path, beside the whole in the same rounds."""
    result = load("step")
    found = [row for row in result["rows"] if row["variant"].startswith("fast ") and "over_fast" in row]
    if not found:
        return NOT_YET
    found.sort(key=lambda row: -row["over_fast"]["seconds"])
    body = [
        [
            f"{row['crop']}, {row['batch']}, {row['precision']}, {row['allocator']}",
            row["variant"].removeprefix("fast "),
            *(number(row["over_fast"][kind]) for kind in ("seconds", "cpu_seconds", "peak_mib")),
        ]
        for row in found
    ]
    header = ["crop, pairs, precision, allocator", "fast", "times as long", "CPU time", "memory"]
    counts = {row["steps"] for row in found}
    note = f"Medians of {' or '.join(map(str, sorted(counts)))} rounds. {sittings(found)}"
    return rows(header, body) + f"\n\n{note}"


def sittings(taken: list[dict[str, Any]]) -> str:
    """When and where rows of `step.json` were measured: each sitting keeps the rows of others."""
    known = {(row["date"], row["machine"]) for row in taken if "date" in row}
    before = sum("date" not in row for row in taken)
    told = [f"{before} row{'s'[: before - 1]} in earlier sittings"] if before else []
    return "; ".join([*told, *(f"{'others ' * bool(told)}on {date}, {where}" for date, where in sorted(known))]) + "."


def step_targets() -> str:
    """What was aimed at on two cores, and what is reached: ours in bf16 beside MONAI's in float32."""
    result = measured("targets")
    if result is None:
        return NOT_YET
    aims = {(64, "default"): 5, (128, "default"): 7} | {(crop, "tuned"): 4 for crop in (64, 96, 128)}
    sittings: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        sittings.setdefault((row["crop"], row["allocator"]), []).append(row)
    body = []
    for (crop, allocator), same in sittings.items():
        aim, last = aims.get((crop, allocator)), same[-1]
        body.append(
            [
                str(crop),
                "as it comes" if allocator == "default" else "with our allocator",
                f"{aim} times" if aim else "",
                f"{over_sittings(same, 'times')} times",
                f"{over_sittings(same, 'cpu_times')} times",
                str(len(same)),
                f"{last['monai']['seconds_median']:.2f}, {last['fast']['seconds_median']:.2f}",
                f"{last['fast']['peak_mib'] / last['monai']['peak_mib']:.2f}",
            ]
        )
    header = ["crop", "MONAI", "aim: time", "reached", "CPU time", "sittings", "s a step, last: MONAI, ours"]
    told = (
        f"Medians over sittings (least to most), each the median of {min(row['steps'] for row in result['rows'])} or "
        "more pairs of steps taken in turns."
    )
    return rows([*header, "our memory / theirs (aim .5)"], body) + f"\n\n{told} {machine(result)}."


def over_sittings(same: list[dict[str, Any]], name: str) -> str:
    """The median, and where there are several the least and the most."""
    values = sorted(row[name] for row in same)
    spread = f" ({values[0]:.1f} to {values[-1]:.1f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.1f}{spread}"


def step_parts() -> str:
    """Where the time of a step goes."""
    found = [row for row in load("step")["rows"] if row.get("parts")]
    body = [
        [
            *(f"{row['crop']}, {row['batch']}, {row['precision']}, {row['allocator']}", row["variant"]),
            *(f"{100 * share:.0f} %" for share in row["parts"].values()),
        ]
        for row in found
    ]
    return rows(["crop, pairs, precision, allocator", "variant", *found[0]["parts"]], body)


PREPARING = {"antialiased": "anti-aliased", "linear": "linear", "monai": "by MONAI"}
ALLOCATORS = {"default": "as it comes", "tuned": "that keeps memory"}


def kind(row: dict[str, Any]) -> str:
    """Of a store; the packing of those before it was written down was lz4."""
    return f"{row['storage']} {row.get('packed', 'lz4')}" if row["storage"] == "blosc2" else row["storage"]


def input_rates() -> str:
    """Crops a second, preparing beside MONAI, and waiting."""
    result = measured("input")
    if result is None:
        return NOT_YET
    taken = [
        [
            f"{kind(row)}, {row['processes']} loader processes",
            f"{row['crops_a_second']:.0f} crops a second",
            "500 a second" if row["processes"] == 4 else "",
        ]
        for row in result["crops"]
    ]
    prepared = [
        [
            f"{row['scan']}, {row['slices']} slices to 2 mm, allocator {ALLOCATORS[row['allocator']]}",
            ", ".join(f"{row[name]:.2f} s {how}" for name, how in PREPARING.items())
            + f": {row['monai'] / row['antialiased']:.1f} times",
            "3 times MONAI",
        ]
        for row in result.get("preparing", [])
    ]
    waited = [
        [f"`dagman-tiny` without a batch, {name}", f"{share:.2%}", "2 %"] for name, share in result["waiting"].items()
    ]
    note = f"Views of 128^3 of volumes of 300^3 for the crops; load of the machine {result['machine']['load']}"
    return rows(["what", "measured", "aim"], [*taken, *prepared, *waited]) + f"\n\n{note}. {machine(result)}."


def others() -> str:
    """Steps and input on processors of other kinds: a folder of results each."""
    steps, inputs = [], []
    for folder in sorted((RESULTS / "others").glob("*")):
        place = folder / "step.json"
        taken = json.loads(place.read_text())["rows"] if place.exists() else []
        steps += [
            [
                f"{row['machine']}, {row['date']}",
                f"{row['crop']}, {row['batch']}, {row['precision']}, {row['allocator']}",
                row["variant"],
                number(row["seconds_median"]),
                *(number(row["over_fast"][kind]) for kind in ("seconds", "cpu_seconds", "peak_mib")),
            ]
            for row in taken
            if "over_fast" in row
        ]
        place = folder / "input.json"
        found = json.loads(place.read_text()) if place.exists() else {"crops": []}
        for storage in ("blosc2", "npy"):
            rates = [row for row in found["crops"] if row["storage"] == storage]
            if rates:
                most = max(rates, key=lambda row: row["crops_a_second"])
                told = f"{most['crops_a_second']:.0f} crops a second by {most['processes']} processes"
                inputs.append([machine(found), kind(most), told])
        for row in found.get("preparing", []):
            times = f"{row['monai'] / row['antialiased']:.1f} times as fast as MONAI"
            inputs.append([machine(found), f"preparing, allocator {ALLOCATORS[row['allocator']]}", times])
    if not steps or not inputs:
        return NOT_YET
    header = [
        "processor",
        "crop, pairs, precision, allocator",
        "variant",
        "s a step",
        "this / ours: time",
        "CPU",
        "memory",
    ]
    return rows(header, steps) + "\n\n" + rows(["processor", "input", "measured"], inputs)


def scaling() -> str:
    """What a sample costs as everything around it grows."""
    result = measured("scaling")
    if result is None:
        return NOT_YET
    body = []
    for point in result["points"]:
        if point["quantity"] == "volumes":
            told = f"{point['pair_ms']:.2f} ms a pair of crops, {point['open_ms']:.0f} ms to open the store"
        else:
            told = f"{point['seconds_a_pair']:.3f} s a pair, {point['seconds_a_step']:.2f} s a step"
        body.append([point["quantity"], str(point["value"]), told])
    note = f"load of the machine {result['machine']['load']}. {machine(result)}."
    return rows(["what grows", "to", "costs"], body) + f"\n\nMedians; {note}"


def gpu_cards() -> list[dict[str, Any]]:
    """What was found on each card."""
    return [json.loads(path.read_text()) for path in sorted((RESULTS / "gpu").glob("*.json"))]


def gpu_proofs() -> str:
    """Largest relative errors of the kernels on a card against float64."""
    body = [
        [
            found["card"],
            str(row["width"]),
            row["type"],
            f"{row['out']:.1e}",
            f"{row['gradient']:.1e}",
            f"{row['plain_gradient']:.1e}",
            "yes" if row["holds"] else "NO",
        ]
        for found in gpu_cards()
        for row in found.get("proofs", [])
    ]
    return rows(["card", "width", "type", "outputs", "gradients", "gradients, plain path", "within limits"], body)


AIMED_AT = {"ms a pair": 4, "times as fast as the MONAI-like composition": 5, "GB a pair": 1.5}
"""On an H200, crops of 128^3, bf16."""


def gpu_aims() -> str:
    """What was aimed at on a card, and the fastest step there."""
    body = []
    for found in gpu_cards():
        there = [row for row in found["steps"] if (row["side"], row["type"]) == (128, "bf16") and "problem" not in row]
        both = {name: {row["batch"]: row for row in there if row["variant"] == name} for name in ("fast", "MONAI-like")}
        if not (batches := both["fast"].keys() & both["MONAI-like"].keys()):
            continue  # only some parts were measured on this card
        ours = min((both["fast"][batch] for batch in batches), key=lambda row: row["ms_a_sample"])
        theirs = both["MONAI-like"][ours["batch"]]
        reached = (
            f"{ours['ms_a_sample']:.1f}",
            f"{theirs['ms_a_sample'] / ours['ms_a_sample']:.1f}",
            f"{ours['peak_gb_a_sample']:.2f}",
        )
        for (name, aim), value in zip(AIMED_AT.items(), reached, strict=True):
            holds = float(value) >= aim if name.startswith("times") else float(value) <= aim
            body.append([found["card"], name, str(aim), value, "yes" if holds else "**no**"])
    return rows(["card", "128^3, bf16", "aim (H200)", "measured", "reached"], body)


def gpu_clocks() -> str:
    """How far the two ways to time a step lie apart."""
    pairs = [
        (row["ms_a_sample"], row["wall_ms_a_sample"])
        for found in gpu_cards()
        for row in found["steps"]
        if "problem" not in row
    ]
    most = max(abs(first - second) / max(first, second) for first, second in pairs)
    return (
        '"By events" and "by the clock" are two passes over the same step, and differ by up to '
        f"{most:.0%} of the longer where the host sets the pace."
    )


def gpu_steps() -> str:
    """Whole steps on a card."""
    body, notes = [], []
    for found in gpu_cards():
        bases = {
            (row["side"], row["batch"], row["type"]): row
            for row in found["steps"]
            if row["variant"] == "MONAI-like" and "problem" not in row
        }
        for row in found["steps"]:
            places = [found["card"], str(row["side"]), str(row["batch"]), row["type"], row["variant"]]
            if "problem" in row:
                body.append([*places, row["problem"], *[""] * 5])
                continue
            base = bases.get((row["side"], row["batch"], row["type"]))
            names = ("ms_a_sample", "wall_ms_a_sample", "peak_gb_a_sample")
            gains = [number(base[name] / row[name], 1) if base else "" for name in names]
            body.append([*places, *(number(row[name], 1) for name in names[:2]), number(row[names[2]]), *gains])
        most = found["ceilings"]
        notes.append(
            f"{found['card']}: torch {found['torch']}, Triton {found['triton']}, {found['date']}; bf16 products at "
            f"{most['matmul_tflops']:.0f} TFLOP/s and copies at {most['copy_tbs']:.1f} TB/s there."
        )
    header = ["card", "crop", "pairs", "type", "variant", "ms a pair by events", "by the clock", "GB a pair"]
    return rows([*header, "MONAI-like / this: by events", "by the clock", "memory"], body) + "\n\n" + " ".join(notes)


def gpu_kernels() -> str:
    """Each piece of a block beside what the card needs for its products and bytes alone."""
    body = [
        [
            found["card"],
            str(row["width"]),
            f"{2 * (128 * 24 // row['width']) ** 3:,}",
            row["piece"],
            number(row["forward_ms"]),
            number(row["both_ms"]),
            f"{row['forward_share']:.1%}",
            f"{row['both_share']:.1%}",
        ]
        for found in gpu_cards()
        for row in found.get("kernels", [])
    ]
    header = [
        "card",
        "width",
        "tokens",
        "piece",
        "forward ms",
        "with backward ms",
        "share of the card",
        "with backward",
    ]
    return rows(header, body)
