"""What all tables are made with."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

RESULTS = ROOT / "benchmarks" / "results"

NOT_YET = "No run has finished yet."


def load(name: str) -> dict[str, Any]:
    """One result file."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def measured(name: str) -> dict[str, Any] | None:
    """A result file that may not be there yet."""
    return load(name) if (RESULTS / f"{name}.json").exists() else None


def rows(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def interval(estimate: dict[str, Any] | None) -> str:
    """A score with its 95 % interval."""
    if not estimate or estimate["value"] is None:
        return ""
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or nothing where the run has none."""
    return "" if value is None else f"{value:.{digits}f}"


def machine(result: dict[str, Any]) -> str:
    """Date and machine, as a sentence under a table."""
    where = result["machine"]
    if where.get("gpus"):
        return f"{result['date']}, {where['gpus'][0]}"
    threads = (
        f"{where['cores']} cores" if "cores" in where else f"{where['threads']} thread{'s'[: where['threads'] - 1]}"
    )
    return f"{result['date']}, {where.get('cpu') or where['processor']}, {threads}"
