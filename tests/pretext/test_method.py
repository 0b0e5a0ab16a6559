"""Settings of the pretext task: what is refused, and by which name."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from dagman import config, recipes
from dagman.errors import DagmanError
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.nets.vit import ViTConfig
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.pretext.method import HeadConfig, HidingConfig, LossWeights, MethodConfig, check_fit, without_effect
from dagman.types import Views

IMAGE_ALONE = LossWeights(ampd=0.0, aitd=0.0, gitd=0.0)


def test_the_defaults_are_the_papers() -> None:
    method = MethodConfig()
    assert method.losses == LossWeights(amip=1.0, ampd=0.1, aitd=0.1, gitd=0.1)
    assert (method.hidden.kind, method.hidden.ratio, method.hidden.hint_ratio, method.hidden.hints) == (
        "attended",
        0.7,
        0.1,
        "top",
    )
    assert (method.dropped_ratio, method.guide) == (0.7, "noisy")
    assert method.hidden.most(512, attended=True) == 307
    assert method.hidden.most(512, attended=False) == 359
    check_fit(SwinConfig(), method)


def test_settings_travel_through_yaml() -> None:
    method = MethodConfig(hidden=HidingConfig(kind="random", ratio=0.5), guide="clean")
    assert config.from_dict(MethodConfig, config.to_dict(method)) == method
    assert config.override(method, {"hidden.hints": "attmask", "losses.ampd": "0"}) == dataclasses.replace(
        method, hidden=dataclasses.replace(method.hidden, hints="attmask"), losses=LossWeights(ampd=0.0)
    )


@pytest.mark.parametrize(
    ("refused", "field"),
    [
        (lambda: LossWeights(amip=-1.0), "losses.amip"),
        (lambda: LossWeights(amip=0.0, ampd=0.0, aitd=0.0, gitd=0.0), "losses"),
        (lambda: HidingConfig(ratio=1.1), "hidden.ratio"),
        (lambda: HidingConfig(ratio=0.1, hint_ratio=0.2), "hidden.hint_ratio"),
        (lambda: HidingConfig(ratio=0.95, hints="shift"), "hidden.hint_ratio"),
        (lambda: HidingConfig(probability=2.0), "hidden.probability"),
        (lambda: HidingConfig(start_step=-1), "hidden.start_step"),
        (lambda: LossWeights(ampd=math.nan), "losses.ampd"),
        (lambda: HeadConfig(num_prototypes=1), "heads"),
        (lambda: MethodConfig(dropped_ratio=1.0), "dropped_ratio"),
        (lambda: MethodConfig(student_temperature=0.0), "temperatures"),
        (lambda: MethodConfig(center_momentum=1.0), "center_momentum"),
    ],
)
def test_impossible_settings_are_refused_by_name(refused: Any, field: str) -> None:
    with pytest.raises(DagmanError, match="E-CONFIG") as error:
        refused()
    assert error.value.subject == f"method.{field}"


@pytest.mark.parametrize(
    ("encoder", "method", "field"),
    [
        (SwinConfig(attention=None), MethodConfig(), "losses.aitd"),
        (SwinConfig(attention=None), MethodConfig(losses=LossWeights(aitd=0.0)), "hidden.kind"),
        (SwinConfig(), MethodConfig(losses=LossWeights(amip=0.0, gitd=0.0)), "losses.amip and losses.gitd"),
        (
            SwinConfig(attention=AttentionConfig(placement="branch")),
            MethodConfig(losses=IMAGE_ALONE),
            "losses.ampd and losses.aitd",
        ),
    ],
)
def test_an_encoder_that_lacks_what_the_method_needs_is_refused(
    encoder: SwinConfig, method: MethodConfig, field: str
) -> None:
    with pytest.raises(DagmanError, match="E-CONFIG") as error:
        check_fit(encoder, method)
    assert error.value.subject == f"method.{field}"


def test_a_vit_is_trained_by_every_loss() -> None:
    for weights in (IMAGE_ALONE, LossWeights(amip=0.0, gitd=0.0), LossWeights(amip=0.0, ampd=0.0, gitd=0.0)):
        check_fit(ViTConfig(), MethodConfig(losses=weights))


INERT = [
    ("smit-swin-tiny", {"method.hidden.hints": "attmask"}),
    ("smit-swin-tiny", {"method.hidden.hint_ratio": 0.3}),
    ("smit-swin-tiny", {"method.hidden.start_step": 9}),
    ("smit-swin-tiny", {"method.guide": "noisy"}),
    ("sa-only-tiny", {"method.guide": "noisy"}),
    ("sa-only-tiny", {"method.dropped_by": "patch"}),
    ("nt-only-tiny", {"method.guide": "noisy"}),
    ("dagman-vit-tiny", {"method.dropped_by": "patch"}),
    ("mst-swin-tiny", {"method.patch_centers": "shared"}),
    ("mst-swin-tiny", {"method.patch_temperature": (0.2, 0.2)}),
    ("mst-swin-tiny", {"method.pooled_stage": 3}),
    ("dagman-tiny", {"encoder.plain_cell_stage": 3}),
]


@pytest.mark.parametrize(("name", "changed"), INERT, ids=str)
def test_a_setting_said_to_change_nothing_changes_no_loss(name: str, changed: dict[str, Any]) -> None:
    recipe = recipes.get(name)
    other = config.override(recipe, changed)
    for one in (recipe, other):
        assert changed.keys() <= without_effect(one.encoder, one.method).keys()
    images = torch.rand(2, 4, 1, *recipe.data.crop, generator=torch.Generator().manual_seed(2))
    views, found = Views(images[0], images[1], torch.arange(4), torch.zeros(4)), []
    for one in (recipe, other):
        torch.manual_seed(0)
        module = CoDistillation(one.encoder, one.method, mean_intensity=0.5, crop=one.data.crop)
        knobs = Knobs(0.04, one.method.patch_temperature[0], attended=one.method.hidden.start_step <= 1)
        found.append(module(views, knobs, torch.Generator().manual_seed(1)).losses.total)
    assert found[0] == found[1]


def test_what_a_method_uses_is_not_said_to_change_nothing() -> None:
    dagman = recipes.get("dagman-swin")
    told = without_effect(dagman.encoder, dagman.method)
    assert set(told) == {"encoder.plain_cell_stage"}
    bare = config.override(dagman, {"method.heads.kind": "none", "method.hidden.hints": "none"})
    told = without_effect(bare.encoder, bare.method)
    assert {"method.heads.num_prototypes", "method.heads.hidden_width", "method.hidden.hint_ratio"} <= told.keys()
    assert "optimisation.freeze_last_layer_ratio" in told
    painted = config.override(dagman, {f"method.losses.{name}": 0 for name in ("ampd", "aitd", "gitd")})
    told = without_effect(painted.encoder, painted.method)
    assert {"method.heads.num_prototypes", "method.balance", "method.student_temperature"} <= told.keys()
    balanced = {"method.balance": "sinkhorn", "method.patch_centers": "position"}
    for changes, cancels in (
        ({"method.losses.ampd": 0}, True),
        ({}, False),
        ({"method.patch_centers": "shared"}, True),
    ):
        chosen = config.override(dagman, balanced | changes)
        assert ("method.center_momentum" in without_effect(chosen.encoder, chosen.method)) == cancels
