"""The paper's runs as frozen values. An ablation is a recipe with one field replaced."""

from dataclasses import replace

from dagman.config import unknown
from dagman.ct.datasets import DataConfig
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.pretext.method import HeadConfig, HidingConfig, LossWeights, MethodConfig
from dagman.train.settings import OptimisationConfig, PretrainConfig

dagman_swin = PretrainConfig(
    recipe="dagman-swin",
    data=DataConfig(),
    encoder=SwinConfig(),
    method=MethodConfig(),
    optimisation=OptimisationConfig(epochs=800),
)
"""The paper's sizes exactly: crops of 128 voxels at 2 mm, embed 48, K 8192, 800 epochs. For GPUs."""

dagman_tiny = PretrainConfig(
    recipe="dagman-tiny",
    data=DataConfig(crop=(32, 32, 32), overlap_ratio=0.75, pairs_per_volume=4),
    encoder=SwinConfig(
        embed_dim=24,
        depths=(2, 2, 4, 2),
        num_heads=(2, 2, 4, 8),
        attention=AttentionConfig(stage=2, position="attention", query_gain=2.0),
    ),
    method=MethodConfig(
        losses=LossWeights(amip=1.0, ampd=0.3, aitd=1.0, gitd=1.0),
        hidden=HidingConfig(probability=0.5),
        dropped_ratio=0.3,
        guide="clean",
        heads=HeadConfig(num_prototypes=128, hidden_width=512, bottleneck_width=64),
        class_temperature=(0.01, 0.01),
        patch_temperature=(0.015, 0.015),
        patch_centers="position",
        balance="sinkhorn",
    ),
    optimisation=OptimisationConfig(steps=1000, batch_size=16, learning_rate=5e-4, momentum=0.9, precision="float32"),
)
"""The same losses and networks for two CPU cores and minutes; docs/learning.md says why each value differs.

Many small crops a step, heads as wide as the paper's, and targets that neither place nor patient can answer. bfloat16
pays a seventh of a step on processors with AMX and costs several times it on others.
"""

RECIPES = {recipe.recipe: recipe for recipe in (dagman_swin, dagman_tiny)}


def get(name: str) -> PretrainConfig:
    """A recipe by its name.

    Raises:
        DagmanError: `E-RECIPE` with the nearest name.
    """
    if name not in RECIPES:
        raise unknown("RECIPE", name, list(RECIPES))
    return RECIPES[name]


def with_length(config: PretrainConfig, steps: int | None, epochs: int | None) -> PretrainConfig:
    """The same recipe over another number of steps or epochs; its schedules scale along."""
    if steps is None and epochs is None:
        return config
    return replace(config, optimisation=replace(config.optimisation, steps=steps, epochs=epochs))
