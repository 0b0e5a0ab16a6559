"""Settings of the pretext task: what is refused, and by which name."""

import dataclasses
from typing import Any

import pytest

from dagman import config
from dagman.errors import DagmanError
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.nets.vit import ViTConfig
from dagman.pretext.method import HeadConfig, HidingConfig, LossWeights, MethodConfig, check_fit

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
        (lambda: LossWeights(amip=-1.0), "losses"),
        (lambda: LossWeights(amip=0.0, ampd=0.0, aitd=0.0, gitd=0.0), "losses"),
        (lambda: HidingConfig(ratio=1.1), "hidden.ratio"),
        (lambda: HidingConfig(ratio=0.1, hint_ratio=0.2), "hidden.hint_ratio"),
        (lambda: HidingConfig(ratio=0.95, hints="shift"), "hidden.hint_ratio"),
        (lambda: HidingConfig(probability=2.0), "hidden.probability"),
        (lambda: HidingConfig(start_step=-1), "hidden.start_step"),
        (lambda: HeadConfig(num_prototypes=1), "heads"),
        (lambda: MethodConfig(dropped_ratio=1.0), "dropped_ratio"),
        (lambda: MethodConfig(student_temperature=0.0), "temperatures"),
        (lambda: MethodConfig(center_momentum=1.0), "center_momentum"),
    ],
)
def test_impossible_settings_are_refused_by_name(refused: Any, field: str) -> None:
    with pytest.raises(DagmanError, match="E-CONFIG") as error:
        refused()
    assert error.value.subject == field


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
    assert error.value.subject == field


def test_a_vit_is_trained_by_every_loss() -> None:
    for weights in (IMAGE_ALONE, LossWeights(amip=0.0, gitd=0.0), LossWeights(amip=0.0, ampd=0.0, gitd=0.0)):
        check_fit(ViTConfig(), MethodConfig(losses=weights))
