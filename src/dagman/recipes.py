"""The paper's runs as frozen values. An ablation is a recipe with one field replaced."""

from dataclasses import replace

from dagman.config import unknown
from dagman.ct.datasets import DataConfig
from dagman.nets.swin import SwinConfig
from dagman.pretext.method import HeadConfig, MethodConfig
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
    data=DataConfig(crop=(64, 64, 64)),
    encoder=SwinConfig(embed_dim=24, depths=(2, 2, 4, 2)),
    method=MethodConfig(
        heads=HeadConfig(num_prototypes=512, hidden_width=512, bottleneck_width=128),
        class_temperature=(0.04, 0.04),
        patch_temperature=(0.04, 0.04),
    ),
    optimisation=OptimisationConfig(steps=1000, batch_size=2, learning_rate=3e-4, momentum=0.99, precision="float32"),
)
"""The same method small enough for two CPU cores; bf16 pays only on processors with AMX."""

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
