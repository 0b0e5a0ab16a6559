"""The whole pretext task on a small encoder, against the method written out in plain loops."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.pretext import diagnostics, hiding
from dagman.pretext.codistill import CoDistillation, Knobs, Outcome
from dagman.pretext.method import HeadConfig, HidingConfig, LossWeights, MethodConfig
from dagman.pretext.network import Network
from dagman.types import Views

CROP = (32, 64, 64)
CELLS = 32
KNOBS = Knobs(class_temperature=0.04, patch_temperature=0.06, attended=True)
SMALL = HeadConfig(num_prototypes=16, hidden_width=24, bottleneck_width=8)
DAGMAN = MethodConfig(heads=SMALL)
SMIT = MethodConfig(
    heads=SMALL, losses=LossWeights(ampd=0.0, aitd=0.0), hidden=HidingConfig(kind="random"), dropped_ratio=0.0
)


def encoder_config(**changes: Any) -> SwinConfig:
    small = SwinConfig(
        embed_dim=12, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4), attention=AttentionConfig(num_heads=4)
    )
    return dataclasses.replace(small, **changes)


def build(method: MethodConfig = DAGMAN, seed: int = 0, **encoder: Any) -> CoDistillation:
    torch.manual_seed(seed)
    return CoDistillation(encoder_config(**encoder), method, mean_intensity=0.4, crop=CROP)


def smooth_views(batch: int = 2, seed: int = 0) -> Views:
    """Blobs as coarse as cells, with a little noise: an image that its surroundings tell something about."""
    keyed = torch.Generator().manual_seed(seed)
    sides = tuple(side // 16 for side in CROP)

    def view() -> Tensor:
        coarse = torch.rand(batch, 1, *sides, generator=keyed)
        fine = nn.functional.interpolate(coarse, size=CROP, mode="trilinear")
        return (fine + 0.02 * torch.randn(fine.shape, generator=keyed)).clamp(0, 1)

    return Views(view(), view(), torch.arange(batch), torch.full((batch,), 0.125))


def key(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def part_ways(model: CoDistillation) -> CoDistillation:
    """Give student, teacher and centers values of their own, as after some training."""
    keyed = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            scale = 0.1 if "center" in name else 0.02
            value.add_(scale * torch.randn(value.shape, generator=keyed, dtype=value.dtype))
    return model


def record(network: Network) -> list[tuple[Any, ...]]:
    """What its encoder is called with, filled in as it is called."""
    calls: list[tuple[Any, ...]] = []
    network.encoder.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    return calls


def run(model: CoDistillation, views: Views | None = None, knobs: Knobs = KNOBS) -> tuple[Outcome, Tensor, Any]:
    """The outcome, what was hidden from the student and what was dropped from the teacher."""
    student, teacher = record(model.student), record(model.teacher)
    outcome = model(views or smooth_views(), knobs, key())
    return outcome, student[0][1], teacher[0][2] if len(teacher[0]) > 2 else None


def plain_logits(head: nn.Module, features: Tensor) -> Tensor:
    """iBOT's head, step by step."""
    x = features
    for layer in head.layers:
        x = nn.functional.gelu(x) if isinstance(layer, nn.GELU) else x @ layer.weight.T + layer.bias
    x = x / x.norm(dim=-1, keepdim=True)
    prototypes = head.prototypes / head.prototypes.norm(dim=1, keepdim=True)
    return x @ prototypes.T


def plain_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, center: Tensor, temperature: float) -> float:
    """-sum P_t log P_s of one token."""
    student = torch.exp(student_logits / 0.1)
    teacher = torch.exp((teacher_logits - center) / temperature)
    return -(teacher / teacher.sum() * torch.log(student / student.sum())).sum().item()


def plain_losses(model: CoDistillation, views: Views, hidden: Tensor, dropped: Tensor) -> dict[str, float]:
    """Equations 2 to 5 for each pair, view by view and cell by cell."""
    batch = len(views.u)
    found = {"amip": 0.0, "ampd": 0.0, "aitd": 0.0, "gitd": 0.0}
    images = {"u": views.u, "v": views.v}
    hidden_from = {"u": hidden[:batch], "v": hidden[batch:]}
    dropped_from = {"u": dropped[:batch], "v": dropped[batch:]}
    student = {view: model.student.encoder(images[view], hidden_from[view]) for view in "uv"}
    teacher = {view: model.teacher.encoder(images[view], None, dropped_from[view]) for view in "uv"}

    def compare(name: str, mine: Tensor, other: Tensor, temperature: float) -> float:
        logits = plain_logits(model.student.heads[name], mine), plain_logits(model.teacher.heads[name], other)
        return plain_cross_entropy(*logits, getattr(model, f"center_{name}"), temperature)

    for view, other in ("uv", "vu"):
        error, voxels = 0.0, 0
        prediction = model.student.voxel_head(student[view].pyramid[-1])
        for pair in range(batch):
            mine, theirs = student[view], teacher[other]
            found["aitd"] += compare("aitd", mine.cls[pair], theirs.cls[pair], 0.04) / batch / 2
            found["gitd"] += compare("gitd", mine.pooled[pair], theirs.pooled[pair], 0.04) / batch / 2
            cells = hidden_from[view][pair].nonzero()[:, 0].tolist()
            for cell in cells:
                same = teacher[view].tokens[pair, cell]
                found["ampd"] += compare("ampd", mine.tokens[pair, cell], same, 0.06) / len(cells) / batch / 2
                x, y, z = (16 * i for i in (cell // 16, cell // 4 % 4, cell % 4))
                box = (pair, 0, slice(x, x + 16), slice(y, y + 16), slice(z, z + 16))
                error += (prediction[box] - images[view][box]).abs().sum().item()
                voxels += 16**3
        found["amip"] += error / (voxels + 1e-5) / 2
    return found


@torch.no_grad()
def test_losses_are_the_equations_of_the_paper() -> None:
    model, views = part_ways(build()).eval(), smooth_views()
    outcome, hidden, dropped = run(model, views)
    expected = plain_losses(model, views, hidden, dropped)
    for name, value in expected.items():
        assert getattr(outcome.losses, name).item() == pytest.approx(value, abs=1e-5), name
    total = expected["amip"] + 0.1 * (expected["ampd"] + expected["aitd"] + expected["gitd"])
    assert outcome.losses.total.item() == pytest.approx(total, abs=1e-5)


def test_bfloat16_autocast_gives_the_losses_of_single_precision() -> None:
    model = part_ways(build()).eval()
    model.method = dataclasses.replace(DAGMAN, hidden=HidingConfig(kind="random"))  # ranks may flip between precisions
    exact = model(smooth_views(), KNOBS, key()).losses
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(smooth_views(), KNOBS, key()).losses
    for name, one, other in zip(exact._fields, exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert other.item() == pytest.approx(one.item(), rel=0.02), name


def test_logits_are_single_precision_under_autocast() -> None:
    network = build().student
    bottleneck = nn.functional.normalize(torch.randn(50, 8), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network.logits("ampd", bottleneck)
    assert torch.equal(logits, network.logits("ampd", bottleneck))


@pytest.mark.parametrize("guide", ["noisy", "clean"])
def test_hiding_follows_the_teachers_attention_to_the_same_view(guide: str) -> None:
    method = dataclasses.replace(DAGMAN, guide=guide)
    model = part_ways(build(method))
    outcome, hidden, dropped = run(model, views := smooth_views())
    unseen = dropped if guide == "noisy" else torch.zeros_like(dropped)
    images = torch.cat([views.u, views.v]).split(1)
    rows = [
        model.teacher.encoder(image, None, one).attention for image, one in zip(images, unseen.split(1), strict=True)
    ]
    attention = torch.cat(rows)
    assert torch.equal(hidden, hiding.attended(attention, ratio=0.7, hint_ratio=0.1))
    assert (hidden.sum(dim=1) == 22 - 3).all()
    assert (dropped.sum(dim=1) == 22).all()
    assert len({tuple(row.tolist()) for row in dropped}) == 4, "each view draws its own"
    for row, values in enumerate(attention):
        assert not hidden[row, values.topk(3).indices].any(), "the most attended are hints"
    assert outcome.diagnostics["attention_peak"].item() == pytest.approx(attention.amax(1).mean().item() * 32, rel=1e-4)


def test_hiding_is_random_before_attention_counts_and_for_a_random_recipe() -> None:
    early = run(build(), knobs=KNOBS._replace(attended=False))
    smit = run(build(SMIT))
    for _, hidden, _ in (early, smit):
        assert (hidden.sum(dim=1) == math.ceil(0.7 * CELLS)).all()
        assert len({tuple(row.tolist()) for row in hidden}) == 4
    assert smit[2] is None, "a clean teacher sees all"


@pytest.mark.parametrize("hints", ["top", "attmask", "shift", "none"])
def test_the_number_hidden_is_the_number_foretold(hints: hiding.Hints) -> None:
    settings = HidingConfig(hints=hints, ratio=0.5, hint_ratio=0.2)
    _, hidden, _ = run(build(dataclasses.replace(DAGMAN, hidden=settings)))
    assert (hidden.sum(dim=1) == settings.most(CELLS, attended=True)).all()


@torch.no_grad()
def test_a_view_left_whole_counts_as_zero() -> None:
    model = part_ways(build(dataclasses.replace(DAGMAN, hidden=HidingConfig(probability=0.5)))).eval()
    outcome, hidden, dropped = run(model, views := smooth_views(batch=4))
    assert set(hidden.sum(dim=1).tolist()) == {0, 19}
    images = torch.cat([views.u, views.v])
    student, teacher = model.student.encoder(images, hidden), model.teacher.encoder(images, None, dropped)
    expected = 0.0
    for row in range(len(images)):
        for cell in (cells := hidden[row].nonzero()[:, 0].tolist()):
            mine = plain_logits(model.student.heads["ampd"], student.tokens[row, cell])
            theirs = plain_logits(model.teacher.heads["ampd"], teacher.tokens[row, cell])
            expected += plain_cross_entropy(mine, theirs, model.center_ampd, 0.06) / len(cells) / len(images)
    assert outcome.losses.ampd.item() == pytest.approx(expected, rel=1e-4)


def test_encoder_and_loss_hide_the_same_voxels() -> None:
    model = build()
    hidden = hiding.random(1, CELLS, count=9, generator=key())
    patches = hiding.repeat(hidden, model.grid, model.cell_side // 2)
    embedded = model.student.encoder.embed(torch.rand(1, 1, *CROP), hidden)
    assert torch.equal((embedded == model.student.encoder.hidden_token).all(dim=-1), patches)


def test_the_image_term_has_no_gradient_outside_hidden_voxels_and_no_row_without_one() -> None:
    model = build(dataclasses.replace(DAGMAN, hidden=HidingConfig(kind="random", ratio=0.1)))
    made: list[Tensor] = []
    model.student.voxel_head.linear.register_forward_hook(lambda _, __, output: made.append(output))
    outcome, hidden, _ = run(model)
    (gradient,) = torch.autograd.grad(outcome.losses.amip, made)
    of_token = hiding.cut(hidden.view(-1, 1, *model.grid).float(), 2).flatten(0, 3) > 0
    asked = of_token.flatten(1).any(dim=1)
    assert 0 < len(gradient) < len(asked)
    voxels = hiding.repeat(of_token[asked].flatten(1), (2, 2, 2), model.cell_side)
    assert torch.equal(gradient.view(voxels.shape) != 0, voxels)


def test_the_image_term_asks_a_device_once_what_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device meta, like a GPU that is busy, has no numbers to count."""
    model, known = build(SMIT).to("meta"), torch.rand(2, *build(SMIT).grid) < 0.5
    images, final = torch.empty(2, 1, *CROP), torch.empty(2, 192, *(side // 32 for side in CROP))
    asked: list[Tensor] = []
    monkeypatch.setattr(Tensor, "cpu", lambda mask: (asked.append(mask), known)[1])
    loss, ratio = model._predict(final.to("meta"), images.to("meta"), known.flatten(1).to("meta"))
    assert loss.shape == ratio.shape == ()
    assert len(asked) == 1


@pytest.mark.parametrize(
    "settings",
    [HidingConfig(ratio=0.1, hint_ratio=0.1), HidingConfig(probability=0.0), HidingConfig(kind="random", ratio=0.0)],
    ids=["all hints", "probability 0", "ratio 0"],
)
def test_nothing_hidden_is_no_loss_and_tells_nothing_of_hidden_cells(settings: HidingConfig) -> None:
    model = build(dataclasses.replace(DAGMAN, hidden=settings))
    outcome, hidden, _ = run(model)
    outcome.losses.total.backward()
    assert not hidden.any()
    assert outcome.losses.amip.item() == outcome.losses.ampd.item() == 0
    assert outcome.losses.aitd.item() > 0
    for name, parameter in model.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert {name for name, value in outcome.diagnostics.items() if not value.isfinite()} == {
        *("image_error_ratio", "ampd_loss_ratio", "hidden_dropped_ratio", "hidden_dropped_excess"),
        *(f"ampd_{side}_{what}" for side in ("teacher", "student") for what in ("entropy", "variety")),
    }


RECIPES = {
    "dagman": (DAGMAN, {}),
    "branch": (DAGMAN, {"attention": AttentionConfig(num_heads=4, placement="branch")}),
    "stage 2": (DAGMAN, {"attention": AttentionConfig(num_heads=4, stage=2)}),
    "zero token": (DAGMAN, {"hidden_token": "zero"}),
    "image term alone": (MethodConfig(heads=SMALL, losses=LossWeights(ampd=0.0, aitd=0.0, gitd=0.0)), {}),
    "no image term": (MethodConfig(heads=SMALL, losses=LossWeights(amip=0.0)), {}),
    "no patch term": (MethodConfig(heads=SMALL, losses=LossWeights(ampd=0.0)), {}),
    "smit": (SMIT, {"attention": None}),
    "smit with attention": (SMIT, {}),
    "a center for each place": (dataclasses.replace(DAGMAN, patch_centers="position"), {}),
    "sinkhorn": (dataclasses.replace(DAGMAN, balance="sinkhorn"), {}),
    "position in attention": (DAGMAN, {"attention": AttentionConfig(num_heads=4, position="attention")}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_parameter_that_wants_a_gradient_gets_one(recipe: str) -> None:
    method, encoder = RECIPES[recipe]
    model = build(method, **encoder)
    outcome, _, _ = run(model)
    outcome.losses.total.backward()
    silent = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not silent
    assert all(value.grad is None and not value.requires_grad for value in model.teacher.parameters())
    counted = {name for name in ("ampd", "aitd", "gitd") if getattr(method.losses, name)}
    assert set(model.student.heads) == set(model.teacher.heads) == set(outcome.means) == counted
    assert (model.student.voxel_head is not None) == bool(method.losses.amip)
    for name in ("amip", "ampd", "aitd", "gitd"):
        assert (getattr(outcome.losses, name).item() != 0) == bool(getattr(method.losses, name))


def test_the_teacher_starts_as_the_student_and_stays_in_eval_mode() -> None:
    model = build()
    student = model.student.state_dict()
    for name, value in model.teacher.state_dict().items():
        assert torch.equal(value, student[name]), name
        assert value.data_ptr() != student[name].data_ptr(), name
    assert {name for name in student if name not in model.teacher.state_dict()} == {
        "voxel_head.linear.weight",
        "voxel_head.linear.bias",
    }
    model.train()
    assert model.student.training
    assert not any(part.training for part in model.teacher.modules())


@pytest.mark.parametrize("momentum", [1.0, 0.996, 0.5, 0.0])
def test_the_teacher_moves_towards_the_student(momentum: float) -> None:
    model = part_ways(build())
    student = {name: value.detach().clone() for name, value in model.student.named_parameters()}
    before = {name: value.clone() for name, value in model.teacher.named_parameters()}
    model.update_teacher(momentum)
    for name, value in model.teacher.named_parameters():
        mine, old = student[name], before[name]
        assert (value >= torch.minimum(mine, old) - 1e-7).all(), name
        assert (value <= torch.maximum(mine, old) + 1e-7).all(), name
        torch.testing.assert_close(value, momentum * old + (1 - momentum) * mine, rtol=1e-5, atol=1e-7)
        if momentum in (0, 1):
            assert torch.equal(value, old if momentum else mine), name
        assert torch.equal(model.student.get_parameter(name), mine)


@torch.no_grad()
def test_means_are_the_mean_logits_over_all_tokens() -> None:
    model, views = part_ways(build()), smooth_views()
    outcome, _, dropped = run(model, views)
    features = model.teacher.encoder(torch.cat([views.u, views.v]), None, dropped)
    inputs = {"aitd": features.cls, "ampd": features.tokens, "gitd": features.pooled}
    for name, value in inputs.items():
        logits = plain_logits(model.teacher.heads[name], value).flatten(0, -2)
        torch.testing.assert_close(outcome.means[name], logits.mean(dim=0), rtol=1e-5, atol=1e-6)


def test_centers_converge_to_the_mean_of_the_micro_batches() -> None:
    model = build()
    before = {name: value.clone() for name, value in model.named_buffers()}
    parts = [model(smooth_views(seed=seed), KNOBS, key()).means for seed in (1, 2)]
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers()), "forward changes nothing"
    model.move_centers(*parts)
    for name in parts[0]:
        mean = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(model.center(name), 0.1 * mean)
    for _ in range(200):
        model.move_centers(*parts)
    for name in parts[0]:
        torch.testing.assert_close(model.center(name), (parts[0][name] + parts[1][name]) / 2)


def test_the_same_key_gives_the_same_outcome_bit_for_bit() -> None:
    model, views = build(), smooth_views()
    outcomes = []
    for seed in (7, 7, 8):
        torch.manual_seed(0)  # drop-path
        outcomes.append(model(views, KNOBS, key(seed)))
    assert torch.equal(outcomes[0].losses.total, outcomes[1].losses.total)
    assert not torch.equal(outcomes[0].losses.total, outcomes[2].losses.total)


def test_last_layers_can_be_frozen() -> None:
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {name: value.detach().clone() for name, value in model.student.named_parameters()}
    run(model)[0].losses.total.backward()
    model.freeze_last_layers()
    optimizer.step()
    unmoved = {name for name, value in model.student.named_parameters() if torch.equal(value, before[name])}
    assert unmoved == {f"heads.{name}.prototypes" for name in ("aitd", "ampd", "gitd")}


def test_diagnostics_are_those_documented_and_cost_no_graph() -> None:
    outcome, hidden, dropped = run(build())
    found = outcome.diagnostics
    assert set(found) == set(diagnostics.MEANINGS)
    assert all(value.shape == () and not value.requires_grad and value.isfinite() for value in found.values())
    assert found["hidden_ratio"].item() == pytest.approx(19 / 32)
    assert found["padding_ratio"].item() == 0.125
    assert found["hidden_dropped_ratio"].item() == pytest.approx(((hidden & dropped).sum() / hidden.sum()).item())
    shares = [value.item() for name, value in found.items() if name.endswith("entropy")]
    assert len(shares) == 7
    assert all(0 <= share <= 1 + 1e-6 for share in shares)
    for recipe in (SMIT, MethodConfig(heads=SMALL, losses=LossWeights(amip=0.0))):
        assert set(run(build(recipe))[0].diagnostics) < set(diagnostics.MEANINGS)


def test_at_first_the_image_term_is_that_of_the_mean_intensity() -> None:
    model, views = build().eval(), smooth_views()
    with torch.no_grad():
        model.student.voxel_head.linear.weight.zero_()
    outcome, hidden, _ = run(model, views)
    voxels = hiding.repeat(hidden, model.grid, 16)[:, None]
    images = torch.cat([views.u, views.v])
    assert outcome.losses.amip.item() == pytest.approx((images - 0.4).abs()[voxels].mean().item(), rel=1e-5)
    means = [image[~seen].mean() for image, seen in zip(images, voxels, strict=True)]
    errors = [(image - mean).abs()[seen].mean() for image, mean, seen in zip(images, means, voxels, strict=True)]
    ratio = outcome.losses.amip / torch.stack(errors).mean()
    assert outcome.diagnostics["image_error_ratio"].item() == pytest.approx(ratio.item(), rel=1e-5)


def test_a_few_steps_lower_the_image_term_of_a_fixed_batch() -> None:
    model, views = build(), smooth_views()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    history = []
    for step in range(10):
        torch.manual_seed(step)
        outcome = model(views, KNOBS, key())
        optimizer.zero_grad()
        outcome.losses.total.backward()
        optimizer.step()
        model.update_teacher(0.99)
        model.move_centers(outcome.means)
        history.append(outcome)
    first, last = history[0], history[-1]
    assert last.losses.amip < 0.8 * first.losses.amip
    assert last.diagnostics["image_error_ratio"] < 1 < first.diagnostics["image_error_ratio"]
    assert last.diagnostics["pooled_spread"] > 0.01, "not all views alike"


def test_a_center_for_each_place_takes_the_place_out_of_the_targets() -> None:
    model = part_ways(build(dataclasses.replace(DAGMAN, patch_centers="position")))
    assert model.center("ampd").shape == (CELLS, 16)
    assert model.center("aitd").shape == (16,)
    outcome, _, dropped = run(model)
    assert outcome.means["ampd"].shape == (CELLS, 16)
    views = smooth_views()
    features = model.teacher.encoder(torch.cat([views.u, views.v]), None, dropped)
    logits = plain_logits(model.teacher.heads["ampd"], features.tokens)
    torch.testing.assert_close(outcome.means["ampd"], logits.mean(dim=0), rtol=1e-5, atol=1e-6)
    for _ in range(300):
        model.move_centers(outcome.means)
    centred = model.teacher.logits("ampd", model.teacher.head("ampd").project(features.tokens)) - model.center("ampd")
    assert centred.mean(dim=0).abs().max() < 1e-5


def test_each_hidden_cell_meets_the_center_of_its_own_place() -> None:
    model = part_ways(build(dataclasses.replace(DAGMAN, patch_centers="position"))).eval()
    views = smooth_views()
    outcome, hidden, dropped = run(model, views)
    images = torch.cat([views.u, views.v])
    teacher, student = model.teacher.encoder(images, None, dropped), model.student.encoder(images, hidden)
    said = (plain_logits(model.teacher.heads["ampd"], teacher.tokens) - model.center("ampd")) / KNOBS.patch_temperature
    guess = plain_logits(model.student.heads["ampd"], student.tokens) / 0.1
    rows = -(said.softmax(-1) * guess.log_softmax(-1)).sum(-1)
    expected = torch.stack([row[seen].mean() for row, seen in zip(rows, hidden, strict=True)]).mean()
    torch.testing.assert_close(outcome.losses.ampd, expected, rtol=1e-5, atol=1e-6)
