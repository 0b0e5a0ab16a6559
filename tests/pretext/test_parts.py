"""Every part that the compared methods differ in: what is hidden, how, which heads, and where pooling happens."""

import dataclasses

import pytest
import torch
from test_codistill import CELLS, CROP, DAGMAN, KNOBS, build, key, part_ways, run, smooth_views
from torch import nn

from dagman.errors import DagmanError
from dagman.pretext import hiding, losses
from dagman.pretext.codistill import CoDistillation
from dagman.pretext.method import HeadConfig, HidingConfig, LossWeights, MethodConfig
from dagman.pretext.network import Network

RANGE = {"lowest_ratio": 0.1, "ratio": 0.5}


def hiding_by(model: CoDistillation, seed: int, batch: int = 8) -> torch.Tensor:
    attention = torch.rand(batch, CELLS, generator=key(1))
    return model._hide(attention, batch, key(seed))


@torch.no_grad()
def test_unattended_cells_are_those_the_teacher_looks_at_least() -> None:
    method = dataclasses.replace(DAGMAN, hidden=HidingConfig(kind="unattended"), dropped_ratio=0.0)
    model = part_ways(build(method))
    _, hidden, dropped = run(model, views := smooth_views())
    assert dropped is None
    attention = model.teacher.encoder(torch.cat([views.u, views.v])).attention
    assert torch.equal(hidden, hiding.unattended(attention, ratio=0.7))
    for row, values in enumerate(attention):
        assert values[hidden[row]].max() <= values[~hidden[row]].min()


def test_blocks_draw_a_ratio_for_each_view() -> None:
    model = build(dataclasses.replace(DAGMAN, hidden=HidingConfig(kind="blocks", **RANGE)))
    counts = [int(count) for seed in range(30) for count in hiding_by(model, seed).sum(dim=1)]
    assert len(set(counts[:8])) > 2, "views of one batch differ"
    assert (min(counts), max(counts)) == (3, 15), "from .1 to .5 of 32 cells"
    assert sum(counts) / len(counts) == pytest.approx(0.3 * CELLS - 0.5, abs=0.8)


def test_attended_hiding_draws_one_ratio_a_batch() -> None:
    method = dataclasses.replace(DAGMAN, hidden=HidingConfig(hints="attmask", **RANGE))
    model = build(method)
    batches = [set(hiding_by(model, seed).sum(dim=1).tolist()) for seed in range(12)]
    assert all(len(counts) == 1 for counts in batches)
    assert len(set.union(*batches)) > 5
    most = method.hidden.most(CELLS, attended=True)
    assert max(set.union(*batches)) <= most


@pytest.mark.parametrize("kind", ["attended", "unattended", "random", "blocks"])
@pytest.mark.parametrize("attended", [True, False])
def test_no_view_hides_more_than_foretold(kind: str, attended: bool) -> None:
    config = HidingConfig(kind=kind, probability=0.5, **RANGE)
    model = build(dataclasses.replace(DAGMAN, hidden=config))
    attention = torch.rand(8, CELLS, generator=key(1)) if attended else None
    counts = [int(count) for seed in range(20) for count in model._hide(attention, 8, key(seed)).sum(dim=1)]
    assert max(counts) <= config.most(CELLS, attended=attended)
    assert 40 < counts.count(0) < 120, "half the views are left whole"


def test_before_blocks_begin_nothing_is_hidden_and_the_step_stands() -> None:
    method = dataclasses.replace(DAGMAN, hidden=HidingConfig(kind="blocks", start_step=5))
    model = build(method)
    outcome, hidden, _ = run(model, smooth_views(), KNOBS._replace(attended=False))
    assert not hidden.any()
    assert outcome.losses.ampd == 0
    assert torch.isfinite(outcome.losses.total)
    assert outcome.diagnostics["ampd_loss_ratio"].isnan()
    outcome.losses.total.backward()
    _, hidden, _ = run(model, smooth_views())
    assert (hidden.sum(dim=1) == 22).all()


@torch.no_grad()
def test_patch_distillation_counts_every_hidden_cell_of_views_that_hide_different_numbers() -> None:
    method = dataclasses.replace(DAGMAN, hidden=HidingConfig(kind="blocks", **RANGE), dropped_ratio=0.0)
    model = part_ways(build(method)).eval()
    outcome, hidden, _ = run(model, views := smooth_views())
    images = torch.cat([views.u, views.v])
    student, teacher = model.student.encoder(images, hidden), model.teacher.encoder(images)
    expected = 0.0
    for row, cells in enumerate(hidden):
        mine, theirs = (
            network.head("ampd").logits(network.head("ampd").project(tokens[row, cells]))
            for network, tokens in ((model.student, student.tokens), (model.teacher, teacher.tokens))
        )
        targets = losses.sharpen(theirs, model.center("ampd"), KNOBS.patch_temperature)
        expected += losses.cross_entropy(mine, targets, temperature=0.1).mean().item() / len(hidden)
    assert len(set(hidden.sum(dim=1).tolist())) > 1
    assert outcome.losses.ampd.item() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_patches_can_be_dropped_one_by_one() -> None:
    model = part_ways(build(dataclasses.replace(DAGMAN, dropped_by="patch"))).eval()
    outcome, _, dropped = run(model, views := smooth_views())
    assert (dropped.sum(dim=1) == hiding.floor_count(0.7, CELLS * 512)).all()
    assert "hidden_dropped_ratio" not in outcome.diagnostics, "cells are neither dropped nor not"
    x, y, z = (side // 2 for side in CROP)
    embedded = model.teacher.encoder.embed(torch.cat([views.u, views.v]), None, dropped)
    assert torch.equal((embedded == 0).all(dim=-1), dropped.view(-1, x, y, z))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "prototypes"), [("linear", 16), ("none", None)])
def test_heads_of_one_layer_or_none(kind: str, prototypes: int | None) -> None:
    heads = HeadConfig(kind=kind, num_prototypes=16)
    model = part_ways(build(dataclasses.replace(DAGMAN, heads=heads))).eval()
    outcome, hidden, dropped = run(model, views := smooth_views())
    images = torch.cat([views.u, views.v])
    student, teacher = model.student.encoder(images, hidden), model.teacher.encoder(images, None, dropped)

    def logits(network: Network, name: str, features: torch.Tensor) -> torch.Tensor:
        return features if kind == "none" else nn.functional.linear(features, network.head(name).prototypes)

    for name, seen, said in (
        ("aitd", student.cls, teacher.cls.roll(2, 0)),
        ("gitd", student.pooled, teacher.pooled.roll(2, 0)),
    ):
        mine, theirs = logits(model.student, name, seen), logits(model.teacher, name, said)
        assert model.center(name).shape == (prototypes or mine.shape[1],)
        targets = ((theirs - model.center(name)) / KNOBS.class_temperature).softmax(dim=1)
        expected = -(targets * (mine / 0.1).log_softmax(dim=1)).sum(dim=1).mean()
        assert getattr(outcome.losses, name).item() == pytest.approx(expected.item(), rel=1e-4), name


def test_a_shared_head_is_one_head_with_two_centers() -> None:
    separate, shared = (
        build(dataclasses.replace(DAGMAN, heads=dataclasses.replace(DAGMAN.heads, shared=joined)))
        for joined in (False, True)
    )
    assert shared.student.head("aitd") is shared.student.head("ampd") is not shared.teacher.head("ampd")
    one_head = sum(parameter.numel() for parameter in separate.student.head("ampd").parameters())
    sizes = [sum(p.numel() for p in model.student.parameters()) for model in (separate, shared)]
    assert sizes[0] - sizes[1] == one_head
    shared.move_centers(
        {name: torch.full((16,), value) for name, value in (("aitd", 1.0), ("ampd", 2.0), ("gitd", 3.0))}
    )
    assert shared.center("aitd").tolist() == pytest.approx([0.1] * 16)
    assert shared.center("ampd").tolist() == pytest.approx([0.2] * 16)


@torch.no_grad()
def test_pooling_stage_three_takes_the_tokens_that_enter_stage_four() -> None:
    method = MethodConfig(
        heads=DAGMAN.heads,
        losses=LossWeights(aitd=0.0),
        hidden=HidingConfig(kind="random"),
        dropped_ratio=0.0,
        pooled_stage=3,
    )
    model = part_ways(build(method, attention=None)).eval()
    outcome, hidden, _ = run(model, views := smooth_views())
    images = torch.cat([views.u, views.v])
    pooled = [
        network.encoder(images, cells).tokens.mean(dim=1)
        for network, cells in ((model.student, hidden), (model.teacher, None))
    ]
    assert pooled[0].shape == (4, 96)
    mine, theirs = (
        network.head("gitd").logits(network.head("gitd").project(one))
        for network, one in zip((model.student, model.teacher), pooled, strict=True)
    )
    targets = losses.sharpen(theirs.roll(2, 0), model.center("gitd"), KNOBS.class_temperature)
    expected = losses.cross_entropy(mine, targets, temperature=0.1).mean().item()
    assert outcome.losses.gitd.item() == pytest.approx(expected, abs=1e-5)


def test_cells_of_a_plain_swin_may_be_those_of_an_earlier_stage() -> None:
    method = MethodConfig(
        heads=DAGMAN.heads, losses=LossWeights(aitd=0.0), hidden=HidingConfig(kind="random"), dropped_ratio=0.0
    )
    model = build(method, attention=None, plain_cell_stage=2)
    _, hidden, _ = run(model)
    assert hidden.shape == (4, 8 * CELLS)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: HidingConfig(lowest_ratio=0.8), "hidden.lowest_ratio"),
        (lambda: HidingConfig(lowest_ratio=0.05), "hidden.hint_ratio"),
        (lambda: build(dataclasses.replace(DAGMAN, hidden=HidingConfig(kind="unattended")), attention=None), "aitd"),
        (
            lambda: build(
                MethodConfig(
                    heads=HeadConfig(shared=True), losses=LossWeights(aitd=0.0), hidden=HidingConfig(kind="random")
                )
            ),
            "heads.shared",
        ),
        (lambda: build(dataclasses.replace(DAGMAN, losses=LossWeights(amip=0.0), pooled_stage=3)), "pooled_stage"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, named: str) -> None:
    with pytest.raises(DagmanError, match=named):
        make()  # type: ignore[operator]
