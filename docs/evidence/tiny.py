"""Where `dagman-tiny` differs from the paper's recipe, and what speaks for each value: `docs/learning.md`."""

from collections.abc import Iterator, Mapping
from typing import Any

from common import rows

from dagman import config, recipes

SIZE = "size: three quarters of an hour on one core"
WHY = {
    "data.crop": SIZE,
    "data.window_hu": "lungs can be told from air; other windows have other targets, so that errors do not compare",
    "data.overlap_ratio": "a lead: with the paper's .5 all terms stayed at ln K (`overlap-half`, one seed, 150 steps)",
    "data.pairs_per_volume": "no difference seen (`one-pair-a-volume`, three seeds, 300 steps)",
    "encoder.embed_dim": SIZE,
    "encoder.depths": SIZE,
    "encoder.num_heads": "heads as wide as the paper's",
    "encoder.hidden_token": "the paper's text (the learned token is its authors' code): losses come down faster in all "
    "seeds (`zero-hidden-token`, 150 steps); where longer runs end, it does not decide (both tables of longer runs)",
    "encoder.attention.stage": "cells of 8 voxels: a crop of 32 has 64 of them, not 8",
    "encoder.attention.position": "a lead: in the residual, patch targets told the place (`position-in-residual`, one "
    "seed, 150 steps); no difference seen at 300 (`residual-position`, three seeds)",
    "encoder.attention.query_gain": "a lead: at 1 attention stayed even (.994, `query-gain-1`, one seed, 150 steps)",
    "encoder.plain_cell_stage": "as `encoder.attention.stage`, for methods without semantic attention",
    "method.losses.ampd": "chosen early, and not borne out: .1 does no worse in the table of 1,000 steps",
    "method.losses.aitd": "the same runs",
    "method.losses.gitd": "the same runs",
    "method.hidden.probability": "a lead: with the next at the paper's values attention stayed even (.993, "
    "`paper-noise`, one seed, 150 steps)",
    "method.dropped_ratio": "the same run",
    "method.guide": "what is hidden is else what the noise had dropped less often than chance (`noisy-guide`, three "
    "seeds, 300 steps); organs show no difference",
    "method.heads.num_prototypes": "size; no difference seen (`prototypes-1024`, three seeds, 300 steps)",
    "method.heads.hidden_width": "size",
    "method.heads.bottleneck_width": "size",
    "method.class_temperature": "decides: warmer, organs end below an untrained encoder (`warmer-teacher`, two of "
    "three seeds apart, 300 steps)",
    "method.patch_temperature": "the same run",
    "method.patch_centers": "no difference seen to none at all (`one-patch-center`, three seeds, 300 steps: balancing "
    "takes a shared center away)",
    "method.balance": "decides at these temperatures: with centering organs end below an untrained encoder "
    "(`centering`, three seeds of three), and pooled features collapse in one of them",
    "optimisation.steps": SIZE,
    "optimisation.epochs": "a length in steps is the same for few scans and many",
    "optimisation.batch_size": "a lead: four pairs a step told little, four times four did (`batch-4`, one seed)",
    "optimisation.learning_rate": "1e-3 points down (`rate-1e-3`, three seeds, 300 steps); 2e-4 no difference seen",
    "optimisation.momentum": "decides: at .996 organs end below an untrained encoder (`momentum-.996`, two of three)",
    "optimisation.precision": "bfloat16 is slower where the processor has no instructions for it",
}


def tiny_settings() -> str:
    """Every setting in which the two recipes differ; one without a reason here is an error."""
    paper, tiny = (dict(_flat(config.to_dict(recipes.get(name)))) for name in ("dagman-swin", "dagman-tiny"))
    differing = [name for name in tiny if name != "recipe" and paper.get(name) != tiny[name]]
    if set(differing) != set(WHY):
        raise ValueError(f"reasons and differences do not match: {sorted(set(differing) ^ set(WHY))}")
    body = [[f"`{name}`", _said(paper.get(name)), _said(tiny[name]), WHY[name]] for name in differing]
    return rows(["setting", "`dagman-swin`", "`dagman-tiny`", "what speaks for it"], body)


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
