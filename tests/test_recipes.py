"""Every recipe at every size: what it is made of, what it returns, and that one step moves all of it."""

import math

import pytest
import torch

from dagman import config, recipes
from dagman.errors import DagmanError
from dagman.nets import heads
from dagman.nets.encoder import build
from dagman.nets.vit import ViTConfig
from dagman.pretext import hiding
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.types import Views

FULL = [name for name in recipes.RECIPES if not name.endswith("-tiny")]
TINY = [name for name in recipes.RECIPES if name.endswith("-tiny")]
OF_TINY = {name: "dagman-swin" if name == "dagman-tiny" else name.removesuffix("-tiny") for name in TINY}
SEED = 2
"""Of draws that hide something of a view where a recipe leaves half of them whole."""
POINTS = {
    # Hidden by, ratios, probability, dropped, (AMIP, AMPD, AITD, GITD)
    "dagman-swin": ("attended", None, 0.7, 1.0, 0.7, (1.0, 0.1, 0.1, 0.1)),
    "dagman-vit": ("attended", None, 0.7, 1.0, 0.7, (1.0, 0.1, 0.1, 0.1)),
    "sa-only": ("attended", None, 0.7, 1.0, 0.0, (1.0, 0.1, 0.1, 0.1)),
    "nt-only": ("random", None, 0.7, 1.0, 0.7, (1.0, 0.1, 0.1, 0.1)),
    "smit-swin": ("random", None, 0.7, 1.0, 0.0, (1.0, 0.1, 0.0, 0.1)),
    "smit-vit": ("random", None, 0.7, 1.0, 0.0, (1.0, 0.1, 0.0, 0.1)),
    "ibot-swin": ("blocks", 0.1, 0.5, 0.5, 0.0, (0.0, 1.0, 1.0, 0.1)),
    "ibot-vit": ("blocks", 0.1, 0.5, 0.5, 0.0, (0.0, 1.0, 1.0, 0.0)),
    "attmask-swin": ("attended", 0.1, 0.5, 0.5, 0.0, (0.0, 1.0, 1.0, 0.1)),
    "attmask-vit": ("attended", 0.1, 0.5, 0.5, 0.0, (0.0, 1.0, 1.0, 0.0)),
    "mst-swin": ("unattended", None, 0.7, 1.0, 0.0, (1.0, 0.0, 1.0, 0.0)),
    "mst-vit": ("unattended", None, 0.7, 1.0, 0.0, (1.0, 0.0, 1.0, 0.0)),
}


def test_the_methods_are_the_points_of_the_table() -> None:
    assert set(POINTS) == set(FULL)
    for name, expected in POINTS.items():
        method = recipes.get(name).method
        hidden, weights = method.hidden, method.losses
        assert expected == (
            hidden.kind,
            hidden.lowest_ratio,
            hidden.ratio,
            hidden.probability,
            method.dropped_ratio,
            (weights.amip, weights.ampd, weights.aitd, weights.gitd),
        ), name
        assert hidden.hints == ("attmask" if name.startswith("attmask") else "top")
        assert method.pooled_stage == (3 if name == "smit-swin" else 4)
        tiny = recipes.get(f"{name}-tiny").method
        assert (tiny.hidden.kind, tiny.hidden.ratio, tiny.hidden.hints) == (hidden.kind, hidden.ratio, hidden.hints)
        assert bool(tiny.dropped_ratio) == bool(method.dropped_ratio)
        for loss, weight in vars(weights).items():
            assert bool(getattr(tiny.losses, loss)) == bool(weight), (name, loss)


def test_a_name_with_its_size_is_a_recipe() -> None:
    assert recipes.get("dagman-swin-tiny") is recipes.get("dagman-tiny")
    with pytest.raises(DagmanError, match=r"E-RECIPE.*did you mean smit-vit"):
        recipes.get("smit-vitt")


@pytest.mark.parametrize("name", FULL)
def test_the_papers_size_has_the_papers_shapes(name: str) -> None:
    recipe = recipes.get(name)
    with torch.device("meta"):
        module = CoDistillation(recipe.encoder, recipe.method, mean_intensity=0.4, crop=recipe.data.crop)
        features = build(recipe.encoder)(torch.empty(2, 1, 128, 128, 128))
    width = {"swin": 384, "vit": 768}[recipe.encoder.kind]
    assert features.tokens.shape == (2, 512, width)
    assert features.pooled.shape == (2, 768)
    plain = name == "smit-swin"
    assert (features.cls is None) == (features.attention is None) == plain
    if not plain:
        assert features.cls.shape == (2, width)
        assert features.attention.shape == (2, 512)
    for loss in module.student.heads:
        assert module.center(loss).shape == (8192,)
    assert (module.student.voxel_head is None) == (not recipe.method.losses.amip)


@pytest.mark.parametrize("name", TINY)
def test_the_tiny_size_has_the_papers_parts(name: str) -> None:
    tiny, full = recipes.get(name), recipes.get(OF_TINY[name])
    with torch.device("meta"):
        module = CoDistillation(tiny.encoder, tiny.method, mean_intensity=0.4, crop=tiny.data.crop)
        features = build(tiny.encoder)(torch.empty(2, 1, *tiny.data.crop))
    assert features.tokens.shape == (2, 64, {"swin": 96, "vit": 192}[tiny.encoder.kind])
    assert features.pooled.shape == (2, {"swin": 384, "vit": 192}[tiny.encoder.kind])
    assert tiny.encoder.has_cls == full.encoder.has_cls == (features.cls is not None)
    for loss in module.student.heads:
        assert module.center(loss).shape in {(128,), (64, 128)}
    assert (module.student.voxel_head is None) == (not full.method.losses.amip)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_one_step_moves_every_parameter_of_the_student_and_none_of_the_teacher(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the recipe is, but for a crop of 64^3 at the paper's size; and bfloat16 gives the losses of float32."""
    monkeypatch.setattr(heads, "FEW_ROWS", 1)  # as on a GPU: heads of few rows in bfloat16 too
    recipe, crop, pairs = recipes.get(name), *(((32,) * 3, 4) if name in TINY else ((64,) * 3, 1))
    torch.manual_seed(0)
    # Without drop paths, which may leave out the last block: its parameters then have no gradient but zero.
    module = CoDistillation(recipe.encoder, recipe.method, mean_intensity=0.4, crop=crop).eval()
    keyed = torch.Generator().manual_seed(1)
    u, v = (torch.rand(pairs, 1, *crop, generator=keyed) for _ in "uv")
    views = Views(u, v, torch.arange(pairs), torch.zeros(pairs))
    knobs = Knobs(recipe.method.class_temperature[0], recipe.method.patch_temperature[0], attended=True)
    seen = dtypes_of_heads(module)
    outcome = module(views, knobs, torch.Generator().manual_seed(SEED))
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(views, knobs, torch.Generator().manual_seed(SEED))
    assert set(seen) == {torch.bfloat16}
    for loss, exact, other in zip(outcome.losses._fields, outcome.losses, rounded.losses, strict=True):
        assert other.dtype == torch.float32
        assert other.item() == pytest.approx(exact.item(), rel=0.02), loss
    outcome.losses.total.backward()
    weights = recipe.method.losses
    for loss in ("amip", "ampd", "aitd", "gitd"):
        value = getattr(outcome.losses, loss).item()
        assert math.isfinite(value)
        assert (value > 0) == bool(getattr(weights, loss)), loss
    trained = {key: value for key, value in module.student.named_parameters() if value.requires_grad}
    without = [key for key, value in trained.items() if value.grad is None or not value.grad.any()]
    assert not without, "a parameter without gradient stops distributed training, or learns nothing"
    assert all(parameter.grad is None for parameter in module.teacher.parameters())
    before = {key: value.clone() for key, value in module.teacher.state_dict().items()}
    held = {key: value.detach().clone() for key, value in trained.items()}
    torch.optim.SGD(module.student.parameters(), lr=0.1).step()
    assert not [key for key, value in trained.items() if torch.equal(value, held[key])]
    assert all(torch.equal(value, before[key]) for key, value in module.teacher.state_dict().items())
    module.update_teacher(0.5)
    assert not [key for key, value in module.teacher.named_parameters() if torch.equal(value, before[key])]


def dtypes_of_heads(module: CoDistillation) -> list[torch.dtype]:
    """Filled by each forward pass with what the heads' layers give."""
    seen: list[torch.dtype] = []
    layers = [head.layers for head in module.student.heads.values()]
    if module.student.voxel_head is not None:
        layers.append(module.student.voxel_head.linear)
    for each in layers:
        each.register_forward_hook(lambda layer, given, made: seen.append(made.dtype))
    return seen


def test_blocks_fit_the_tiny_grid() -> None:
    hidden = [hiding.blocks((4, 4, 4), ratio=0.5, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(int(one.sum()) == 32 for one in hidden)


def test_the_encoder_says_which_crops_it_takes() -> None:
    flags: dict[str, object] = {"data.crop": "48,48,48"}
    with pytest.raises(DagmanError, match="sides must be multiples of 32 voxels; choose 64x64x64"):
        config.override(recipes.get("dagman-tiny"), flags)
    vit = recipes.get("dagman-vit-tiny")
    assert isinstance(vit.encoder, ViTConfig)
    assert 48 % vit.encoder.patch_side == 0
    assert config.override(vit, flags).data.crop == (48, 48, 48)
