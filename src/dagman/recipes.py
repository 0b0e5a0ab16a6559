"""The paper's runs as frozen values. An ablation is a recipe with one field replaced."""

from dataclasses import replace
from typing import Literal

from dagman.config import unknown
from dagman.ct.datasets import DataConfig
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.nets.vit import ViTConfig
from dagman.pretext.method import HeadConfig, HidingConfig, LossWeights, MethodConfig
from dagman.train.settings import OptimisationConfig, PretrainConfig

Kind = Literal["swin", "plain swin", "vit"]
FULL: dict[Kind, SwinConfig | ViTConfig] = {
    "swin": SwinConfig(),
    "plain swin": SwinConfig(attention=None),
    "vit": ViTConfig(),
}
TINY_SWIN = SwinConfig(
    embed_dim=24,
    depths=(2, 2, 4, 2),
    num_heads=(2, 2, 4, 8),
    hidden_token="zero",
    attention=AttentionConfig(stage=2, position="attention", query_gain=2.0),
    plain_cell_stage=2,
)
TINY: dict[Kind, SwinConfig | ViTConfig] = {
    "swin": TINY_SWIN,
    "plain swin": replace(TINY_SWIN, attention=None),
    "vit": ViTConfig(width=192, depth=6, patch_side=8, hidden_token="zero"),
}

DAGMAN = MethodConfig()
SA_ONLY = MethodConfig(dropped_ratio=0.0)
NT_ONLY = MethodConfig(hidden=HidingConfig(kind="random"))
SMIT = MethodConfig(losses=LossWeights(aitd=0.0), hidden=HidingConfig(kind="random"), dropped_ratio=0.0, pooled_stage=3)
IBOT = MethodConfig(
    losses=LossWeights(amip=0.0, ampd=1.0, aitd=1.0, gitd=0.0),
    hidden=HidingConfig(kind="blocks", ratio=0.5, lowest_ratio=0.1, probability=0.5),
    dropped_ratio=0.0,
    heads=HeadConfig(shared=True),
    patch_temperature_waits=False,
)
ATTMASK = replace(IBOT, hidden=replace(IBOT.hidden, kind="attended", hints="attmask"))
MST = MethodConfig(
    losses=LossWeights(amip=1.0, ampd=0.0, aitd=1.0, gitd=0.0),
    hidden=HidingConfig(kind="unattended"),
    dropped_ratio=0.0,
)


def _with_pooled(method: MethodConfig) -> MethodConfig:
    """On a Swin the last stage needs a loss of its own; on a ViT every loss trains all blocks."""
    return replace(method, losses=replace(method.losses, gitd=0.1))


METHODS: dict[str, tuple[MethodConfig, Kind]] = {
    "dagman-swin": (DAGMAN, "swin"),
    "dagman-vit": (DAGMAN, "vit"),
    "smit-swin": (SMIT, "plain swin"),
    "smit-vit": (replace(SMIT, pooled_stage=4), "vit"),
    "ibot-swin": (_with_pooled(IBOT), "swin"),
    "ibot-vit": (IBOT, "vit"),
    "attmask-swin": (_with_pooled(ATTMASK), "swin"),
    "attmask-vit": (ATTMASK, "vit"),
    "mst-swin": (MST, "swin"),
    "mst-vit": (MST, "vit"),
    "sa-only": (SA_ONLY, "swin"),
    "nt-only": (NT_ONLY, "swin"),
}
"""What the paper compares: what is hidden from whom, which losses count, on which encoder."""


def _full(name: str) -> PretrainConfig:
    """The paper's sizes: crops of 128 voxels at 2 mm, 800 epochs; embed 48 and K 8192 as in SMIT's code. For GPUs."""
    method, encoder = METHODS[name]
    return PretrainConfig(
        recipe=name,
        data=DataConfig(),
        encoder=FULL[encoder],
        method=method,
        optimisation=OptimisationConfig(epochs=800),
    )


def _tiny(name: str) -> PretrainConfig:
    """The method for a CPU and less than an hour; docs/learning-factors.md says why each value differs.

    Many small crops a step, in a window that shows lungs too; attention heads of the Swin as wide as the paper's;
    heavier distillation; targets that place alone cannot answer, balanced over the views of four volumes; hidden
    patches are 0, as dropped ones; every second view left whole, and fewer cells dropped. bfloat16 pays a seventh of a
    step on processors with AMX and costs several times it on others.
    """
    method, encoder = METHODS[name]
    losses, hidden = method.losses, method.hidden
    if losses.gitd and losses.amip:  # DAGMaN and SMIT: heavier distillation than the paper's .1.
        losses = LossWeights(amip=1.0, ampd=0.3, aitd=1.0 if losses.aitd else 0.0, gitd=1.0)
    return PretrainConfig(
        recipe="dagman-tiny" if name == "dagman-swin" else f"{name}-tiny",
        data=DataConfig(crop=(32, 32, 32), window_hu=(-1000.0, 400.0), overlap_ratio=0.75, pairs_per_volume=4),
        encoder=TINY[encoder],
        method=replace(
            method,
            losses=losses,
            hidden=replace(hidden, probability=0.5),
            dropped_ratio=0.3 if method.dropped_ratio else 0.0,
            guide="clean",
            heads=replace(method.heads, num_prototypes=128, hidden_width=512, bottleneck_width=64),
            class_temperature=(0.01, 0.01),
            patch_temperature=(0.015, 0.015),
            patch_centers="position",
            balance="sinkhorn",
        ),
        optimisation=OptimisationConfig(
            steps=1000, batch_size=16, learning_rate=5e-4, momentum=0.9, precision="float32"
        ),
    )


RECIPES = {recipe.recipe: recipe for size in (_full, _tiny) for recipe in map(size, METHODS)}


ALIAS = "dagman-swin-tiny"
"""Of `dagman-tiny`."""


def get(name: str) -> PretrainConfig:
    """A recipe by its name.

    Raises:
        DagmanError: `E-RECIPE` with the nearest name.
    """
    name = "dagman-tiny" if name == ALIAS else name
    if name not in RECIPES:
        raise unknown("RECIPE", name, list(RECIPES))
    return RECIPES[name]


def with_length(config: PretrainConfig, steps: int | None, epochs: int | None) -> PretrainConfig:
    """The same recipe over another number of steps or epochs; its schedules scale along."""
    if steps is None and epochs is None:
        return config
    return replace(config, optimisation=replace(config.optimisation, steps=steps, epochs=epochs))
