"""What the teacher knows: information in distributions whose answer is known; examining changes nothing."""

import dataclasses
import math

import pytest
import torch
from test_codistill import CELLS, CROP, DAGMAN, KNOBS, SMIT, build, key

from dagman.pretext.examination import MEANINGS, _Information, examine


def one_hot(index: torch.Tensor, prototypes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(index, prototypes).double()


def split(probabilities: torch.Tensor) -> tuple[float, float]:
    information = _Information()
    for start in range(0, len(probabilities), 8):
        information.add(probabilities[start : start + 8])
    return information.split()


def test_targets_that_name_the_place_hold_no_image() -> None:
    position, image = split(one_hot(torch.arange(16).expand(64, 16), 16))
    assert position == pytest.approx(math.log(16))
    assert image == pytest.approx(0, abs=1e-9)


def test_targets_that_name_the_crop_hold_no_place() -> None:
    position, image = split(one_hot((torch.arange(64) // 2 % 8)[:, None].expand(64, 16), 8))
    assert position == pytest.approx(0, abs=1e-9)
    assert image == pytest.approx(math.log(8))


def test_uniform_targets_hold_nothing() -> None:
    assert split(torch.full((32, 16, 8), 1 / 8)) == pytest.approx((0, 0), abs=1e-9)


def test_few_crops_do_not_pass_chance_off_as_place() -> None:
    draws = torch.Generator().manual_seed(0)
    position, image = split(one_hot(torch.randint(32, (64, 64), generator=draws), 32))
    assert position < 0.1
    assert image > 3.3


def test_an_examination_tells_what_is_documented_and_changes_nothing() -> None:
    model = build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    crops = [torch.rand(4, 1, *CROP, generator=key(seed)) for seed in (1, 2)]
    state = torch.random.get_rng_state()
    found = examine(model, crops, KNOBS, crops)
    assert set(found) == set(MEANINGS)
    assert all(math.isfinite(value) for value in found.values())
    assert found == examine(model, crops, KNOBS, crops)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert 1 <= found["clean_attention_peak"] <= CELLS
    assert set(examine(build(SMIT), crops, KNOBS)) < set(MEANINGS)
    assert DAGMAN.dropped_ratio


def test_crops_that_are_all_the_same_hold_no_image_however_cold_and_balanced_the_targets() -> None:
    method = dataclasses.replace(DAGMAN, balance="sinkhorn", patch_centers="position")
    knobs = KNOBS._replace(class_temperature=0.01, patch_temperature=0.01)
    same = torch.rand(1, 1, *CROP, generator=key()).expand(8, -1, -1, -1, -1)
    other = torch.rand(8, 1, *CROP, generator=key()) * torch.linspace(0, 1, 8).view(8, 1, 1, 1, 1)
    told = [examine(build(method), [crops], knobs) for crops in (same, other)]
    for name in ("aitd_image_nats", "gitd_image_nats", "ampd_image_nats"):
        assert told[0][name] < 1e-3 < 0.05 < told[1][name], name


def test_places_of_a_volume_are_told_apart_only_where_they_differ() -> None:
    method = dataclasses.replace(DAGMAN, balance="sinkhorn", patch_centers="position")
    knobs = KNOBS._replace(class_temperature=0.01, patch_temperature=0.01)
    shades = torch.linspace(0, 1, 8).view(8, 1, 1, 1, 1)
    apart = torch.rand(8, 1, *CROP, generator=key()) * shades
    alike = apart[:2].repeat_interleave(4, dim=0)
    model = build(method)
    for name in ("aitd_within_nats", "gitd_within_nats"):
        told = [examine(model, [apart], knobs, [crops])[name] for crops in (alike, apart)]
        assert told[0] < 1e-3 < 0.05 < told[1] <= math.log(4) + 1e-6, name
