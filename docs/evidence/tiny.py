"""Where `dagman-tiny` differs from the paper's recipe, and what speaks for each value: `docs/learning-factors.md`."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import factors
from common import rows

from dagman import config, recipes


class Reason(NamedTuple):
    """What speaks for a value, and which runs were made with one like the paper's."""

    said: str = ""
    today: str = ""
    """A factor of today's recipe, 300 steps."""
    older: str = ""
    """A factor of the older recipe, 150 steps."""


SIZE = Reason("size: half an hour on one core")
WEIGHTS = Reason("chosen early, and not borne out: .1 does no worse at 1,000 steps", "paper-weights", "paper-weights")
NOISE = Reason("chosen early, both at once", older="paper-noise")
COLDER = Reason(today="warmer-teacher", older="warmer-teacher")
WHY = {
    "data.crop": SIZE,
    "data.window_hu": Reason(
        "lungs can be told from air; errors in other windows do not compare", older="soft-tissue-window"
    ),
    "data.overlap_ratio": Reason("chosen early", older="overlap-half"),
    "data.pairs_per_volume": Reason("chosen early", "one-pair-a-volume", "one-pair-a-volume"),
    "encoder.embed_dim": SIZE,
    "encoder.depths": SIZE,
    "encoder.num_heads": Reason("heads as wide as the paper's"),
    "encoder.hidden_token": Reason(
        "the paper's text (the learned token is its authors' code); the older runs are of 0 in place of learned",
        "learned-token",
        "zero-hidden-token",
    ),
    "encoder.attention.stage": Reason("cells of 8 voxels: a crop of 32 has 64 of them, not 8", older="cells-of-16"),
    "encoder.attention.position": Reason(
        "early, in the residual, patch targets told the place", "residual-position", "position-in-residual"
    ),
    "encoder.attention.query_gain": Reason("chosen early", older="query-gain-1"),
    "encoder.plain_cell_stage": Reason("as `encoder.attention.stage`, for methods without semantic attention"),
    "method.losses.ampd": WEIGHTS,
    "method.losses.aitd": WEIGHTS,
    "method.losses.gitd": WEIGHTS,
    "method.hidden.probability": NOISE,
    "method.dropped_ratio": NOISE,
    "method.guide": Reason(
        "what is hidden is else what the noise had dropped less often than chance", "noisy-guide", "noisy-guide"
    ),
    "method.heads.num_prototypes": Reason("size", "prototypes-1024", "prototypes-1024"),
    "method.heads.hidden_width": Reason("size"),
    "method.heads.bottleneck_width": Reason("size"),
    "method.class_temperature": COLDER,
    "method.patch_temperature": COLDER,
    "method.patch_centers": Reason("balancing takes a shared center away", "one-patch-center", "one-patch-center"),
    "method.balance": Reason("", "centering", "centering"),
    "optimisation.steps": SIZE,
    "optimisation.epochs": Reason("a length in steps is the same for few scans and many"),
    "optimisation.batch_size": Reason("chosen early", older="batch-4"),
    "optimisation.learning_rate": Reason("chosen early", "rate-1e-3", "rate-1e-3"),
    "optimisation.momentum": Reason("", "momentum-.996", "momentum-.996"),
    "optimisation.precision": Reason("bfloat16 is slower where the processor has no instructions for it"),
}


def tiny_settings() -> str:
    """Every setting in which the two recipes differ; one without a reason here is an error."""
    paper, tiny = (dict(_flat(config.to_dict(recipes.get(name)))) for name in ("dagman-swin", "dagman-tiny"))
    differing = [name for name in tiny if name != "recipe" and paper.get(name) != tiny[name]]
    if set(differing) != set(WHY):
        raise ValueError(f"reasons and differences do not match: {sorted(set(differing) ^ set(WHY))}")
    body = [[f"`{name}`", _said(paper.get(name)), _said(tiny[name]), *_told(WHY[name])] for name in differing]
    header = ["setting", "`dagman-swin`", "`dagman-tiny`", "what speaks for it"]
    header += ["under 300 steps: organ, above `as-it-is`", "older recipe, 150 steps: set apart from it by"]
    return rows(header, body)


def _told(reason: Reason) -> tuple[str, str, str]:
    under = f"`{reason.today}`: {factors.paired(reason.today)}" if reason.today else ""
    early = f"`{reason.older}`: {', '.join(factors.set_apart(reason.older)) or 'not set apart'}" if reason.older else ""
    return reason.said, under, early


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _said(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_said, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
