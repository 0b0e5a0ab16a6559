"""Distances and entropies of attention heads, on attention whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch

from dagman.errors import DagmanError
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.vit import ViTConfig, ViTEncoder
from dagman.nets.weights import load_encoder
from dagman.tasks import diversity
from dagman.types import Preparation

SIZES = SwinConfig(embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), attention=AttentionConfig(num_heads=4))


def mean_distance(sides: tuple[int, int, int]) -> float:
    places = np.array(list(itertools.product(*map(range, sides))))
    return float(np.linalg.norm(places[:, None] - places[None], axis=-1).mean())


@pytest.fixture
def uniform() -> SwinEncoder:
    encoder = SwinEncoder(SIZES).eval()
    encoder.preparation = Preparation(spacing_mm=2.0, crop=(64, 64, 64))
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if "qkv" in name or "table" in name:
                value.zero_()
    return encoder


def test_uniform_attention_reaches_the_mean_distance_and_the_largest_entropy(uniform: SwinEncoder) -> None:
    found = {one.place: one for one in diversity.heads(uniform, torch.rand(1, 1, 64, 64, 64))}
    assert list(found) == ["stage 1", "stage 2", "stage 3", "semantic attention", "stage 4"]
    assert [len(one.distance_mm) for one in found.values()] == [4, 4, 8, 8, 8]
    window = mean_distance((4, 4, 4))
    for number in (1, 2, 3):
        step_mm = 2.0 * 2**number
        one = found[f"stage {number}"]
        assert one.distance_mm[: len(one.distance_mm) // 2] == pytest.approx(step_mm * window, rel=1e-5)
        assert (one.distance_mm[len(one.distance_mm) // 2 :] < step_mm * window).all(), "shifted windows see less far"
        assert one.row_entropy == pytest.approx(1, abs=1e-5)
    assert found["semantic attention"].distance_mm == pytest.approx(32 * window, rel=1e-5)
    assert found["semantic attention"].row_entropy == pytest.approx(1, abs=1e-5)
    assert found["stage 4"].distance_entropy == pytest.approx(math.log(8), abs=1e-6)


def test_in_shifted_windows_a_row_counts_only_the_pairs_that_may_attend(uniform: SwinEncoder) -> None:
    """8 tokens a side, windows of 4 shifted by 2: along an axis 2-5 attend to each other, and so do 6-7 and 0-1."""
    groups = np.array([0, 0, 1, 1, 1, 1, 2, 2])
    places = np.array(list(itertools.product(range(8), repeat=3)))
    allowed = (groups[places][:, None] == groups[places][None]).all(axis=-1)
    far = np.linalg.norm(places[:, None] - places[None], axis=-1)
    wanted = ((far * allowed).sum(axis=1) / allowed.sum(axis=1)).mean()
    one = next(one for one in diversity.heads(uniform, torch.rand(1, 1, 64, 64, 64)) if one.place == "stage 3")
    assert one.distance_mm[4:] == pytest.approx(2.0 * 8 * wanted, rel=1e-5), "the second block is the shifted one"
    assert one.head_entropy[4:] == pytest.approx(1, abs=1e-5), "uniform over what is allowed is the largest entropy"


def test_what_pads_a_map_counts_neither_as_row_nor_as_key(uniform: SwinEncoder) -> None:
    """Of 6 tokens a side a window of 4 covers 4, the next one 2 and two that do not exist."""
    uniform.preparation = Preparation(spacing_mm=2.0, crop=(96, 96, 96))
    one = next(one for one in diversity.heads(uniform, torch.rand(1, 1, 96, 96, 96)) if one.place == "stage 4")
    places = np.array(list(itertools.product(range(6), repeat=3)))
    together = (places[:, None] // 4 == places[None] // 4).all(axis=-1)
    far = np.linalg.norm(places[:, None] - places[None], axis=-1)
    wanted = ((far * together).sum(axis=1) / together.sum(axis=1)).mean()
    assert one.distance_mm[:4] == pytest.approx(2.0 * 16 * wanted, rel=1e-5)
    assert one.row_entropy == pytest.approx(1, abs=1e-5)


def test_entropies_of_distances_on_hand_made_heads() -> None:
    def of(*distances: float) -> diversity.Heads:
        far = np.array(distances, np.float32)
        return diversity.Heads("stage 1", far, np.ones_like(far))

    assert of(3, 3, 3, 3).distance_entropy == pytest.approx(math.log(4))
    assert of(1, 3).distance_entropy == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert of(0, 5).distance_entropy == 0
    assert math.isnan(of(0, 0).distance_entropy), "nobody looks away: no entropy, and none is made up"
    assert math.isnan(diversity.READINGS["distance_entropy_ratio"](of(4))), "one head has nothing to differ from"


def test_a_vit_is_told_block_by_block() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(ViTConfig(width=24, depth=3, num_heads=4)).eval()
    encoder.preparation = Preparation(spacing_mm=2.0, crop=(64, 64, 32))
    with torch.no_grad():
        encoder.blocks[1].qkv.weight.zero_()
    first, uniform, last = diversity.heads(encoder, torch.rand(2, 1, 64, 64, 32))
    assert [one.place for one in (first, uniform, last)] == ["block 1", "block 2", "block 3"]
    assert [len(one.distance_mm) for one in (first, uniform, last)] == [4, 4, 4]
    assert uniform.distance_mm == pytest.approx(2.0 * 16 * mean_distance((4, 4, 2)), rel=1e-5)
    assert uniform.row_entropy == pytest.approx(1, abs=1e-5)
    assert first.row_entropy < 1
    assert last.row_entropy < 1


def test_a_head_that_looks_at_its_own_token_reaches_nowhere(uniform: SwinEncoder) -> None:
    attention = uniform.stages[0].blocks[0].attn
    with torch.no_grad():
        middle = attention.relative_position_bias_table.shape[0] // 2
        attention.relative_position_bias_table[middle, 0] = 100.0
    one = diversity.heads(uniform, torch.rand(1, 1, 32, 32, 64))[0]
    assert one.distance_mm[0] == pytest.approx(0, abs=1e-6)
    assert one.distance_mm[1] > 5
    assert one.row_entropy == pytest.approx(0.75, abs=1e-4), "one of four heads has no entropy"
    assert one.head_entropy == pytest.approx([0, 1, 1, 1], abs=1e-4)


def test_the_heads_are_those_of_training_too() -> None:
    torch.manual_seed(0)
    encoder = SwinEncoder(SIZES).eval()
    found = diversity.heads(encoder, torch.rand(2, 1, 32, 32, 64))
    assert all(0 < one.row_entropy < 1 for one in found)
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_crops_are_keyed_by_the_seed_and_every_case_has_its_turn(organ_store, two_runs) -> None:
    first, second = (load_encoder(run) for run in two_runs)
    looks = diversity.head_diversity(first, organ_store, num_crops=6, seed=1)
    assert {look.case_id for look in looks[:5]} == {f"case{case}" for case in range(5)}
    again = diversity.head_diversity(first, organ_store, num_crops=3, seed=1)
    for one, other in zip(looks, again, strict=False):
        np.testing.assert_array_equal(one.heads[0].distance_mm, other.heads[0].distance_mm)
    elsewhere = diversity.head_diversity(first, organ_store, num_crops=6, seed=2)
    assert any(
        (one.heads[0].distance_mm != other.heads[0].distance_mm).any()
        for one, other in zip(looks, elsewhere, strict=True)
    )
    others = diversity.head_diversity(second, organ_store, num_crops=6, seed=1)
    assert [look.case_id for look in others] == [look.case_id for look in looks]


def test_a_stage_is_the_mean_over_its_crops_and_runs_are_compared_crop_by_crop(organ_store, two_runs) -> None:
    runs = {run.name: diversity.head_diversity(load_encoder(run), organ_store, num_crops=5, seed=0) for run in two_runs}
    rows = diversity.summary(runs)
    assert [row["place"] for row in rows[:5]] == ["stage 1", "stage 2", "semantic attention", "stage 3", "stage 4"]
    of_first, of_second = ([look.heads[1].distance_mm.mean() for look in looks] for looks in runs.values())
    assert rows[1]["distance_mm"]["value"] == pytest.approx(np.mean(of_first), rel=1e-6)
    assert rows[1]["distance_mm"]["low"] < rows[1]["distance_mm"]["value"] < rows[1]["distance_mm"]["high"]
    above = rows[6]["distance_mm_above_first"]
    assert above["value"] == pytest.approx(np.mean(of_second) - np.mean(of_first), abs=1e-4)
    assert above["low"] <= above["value"] <= above["high"]


def test_one_patient_or_unknown_patients_give_no_interval() -> None:
    heads = (diversity.Heads("stage 1", np.array([1.0, 2.0]), np.array([0.5, 0.6])),)
    for patients, why in ((("p", "p"), "1 patient"), ((None, "p"), "patients unknown")):
        looks = [diversity.Look(case_id="c", patient=patient, heads=heads) for patient in patients]
        (row,) = diversity.summary({"run": looks})
        assert row["distance_mm"]["value"] == 1.5
        assert row["distance_mm"]["low"] is None
        assert why in row["distance_mm"]["why"]


def test_cases_are_drawn_where_that_is_said() -> None:
    heads = (diversity.Heads("stage 1", np.array([1.0, 2.0]), np.array([0.5, 0.6])),)
    other = (diversity.Heads("stage 1", np.array([2.0, 2.0]), np.array([0.5, 0.6])),)
    looks = [diversity.Look(case_id=f"c{n}", patient=None, heads=(heads, other)[n % 2]) for n in range(6)]
    (row,) = diversity.summary({"run": looks}, group_by="case")
    assert row["distance_mm"]["low"] < row["distance_mm"]["value"] < row["distance_mm"]["high"]


def test_grey_cubes_are_seen_through_the_window_that_gives_them_back(organ_store, two_runs, monkeypatch) -> None:
    encoder = load_encoder(two_runs[0])
    before = diversity.head_diversity(encoder, organ_store, num_crops=1)[0].heads[0]
    monkeypatch.setattr(organ_store, "rows", [{**row, "window_hu": (-160.0, 240.0)} for row in organ_store.rows])
    after = diversity.head_diversity(encoder, organ_store, num_crops=1)[0].heads[0]
    assert (before.head_entropy != after.head_entropy).any()


@pytest.mark.parametrize("num_crops", [0, -1])
def test_no_crops_are_refused(organ_store, two_runs, num_crops: int) -> None:
    with pytest.raises(DagmanError, match="E-CONFIG"):
        diversity.head_diversity(load_encoder(two_runs[0]), organ_store, num_crops=num_crops)


def test_an_encoder_in_training_is_refused(uniform: SwinEncoder) -> None:
    with pytest.raises(ValueError, match="eval mode"):
        diversity.heads(uniform.train(), torch.rand(1, 1, 64, 64, 64))
