"""The ViT keeps the contract of `Features` and computes what others compute with the same weights."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dagman import config, recipes
from dagman.ct.store import AIR_HU
from dagman.errors import DagmanError, ExitCode
from dagman.nets.encoder import build
from dagman.nets.swin import SwinConfig
from dagman.nets.vit import ViTConfig, ViTEncoder
from dagman.nets.weights import export_monai, load_encoder, save_encoder
from dagman.pretext.codistill import CoDistillation, Knobs
from dagman.pretext.examination import MEANINGS, examine
from dagman.pretext.method import HeadConfig, LossWeights, MethodConfig
from dagman.tasks.attention import attention_map
from dagman.tasks.embed import encode, untrained
from dagman.train.settings import PretrainConfig
from dagman.types import Preparation, Views, Volume

SMALL = ViTConfig(width=48, depth=4, num_heads=4)
CROP = (32, 64, 48)
GRID = (2, 4, 3)
CELLS = 24


@pytest.fixture
def encoder() -> ViTEncoder:
    torch.manual_seed(0)
    encoder = ViTEncoder(SMALL).eval()
    with torch.no_grad():  # norms and biases start at constants that would hide mistakes
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 1, *CROP, generator=torch.Generator().manual_seed(1))


def only(*cells: int) -> torch.Tensor:
    chosen = torch.zeros(2, CELLS, dtype=torch.bool)
    chosen[:, list(cells)] = True
    return chosen


def position(grid: tuple[int, int, int], width: int) -> torch.Tensor:
    """The fixed code cell by cell: for each axis a sixth of the width in sines, then a sixth in cosines."""
    frequencies = [10000 ** (-k / (width // 6)) for k in range(width // 6)]
    rows = [
        [f(place * frequency) for place in cell for f in (np.sin, np.cos) for frequency in frequencies]
        for cell in np.ndindex(*grid)
    ]
    return torch.tensor(rows, dtype=torch.float32)


def patches(images: torch.Tensor, side: int = 16) -> torch.Tensor:
    """Patches cut out one by one, cells in C order."""
    grid = [length // side for length in images.shape[2:]]
    cut = [
        images[:, 0, x * side : (x + 1) * side, y * side : (y + 1) * side, z * side : (z + 1) * side].flatten(1)
        for x, y, z in np.ndindex(*grid)
    ]
    return torch.stack(cut, dim=1)


def layer(block: nn.Module, width: int, heads: int) -> nn.TransformerEncoderLayer:
    """PyTorch's own layer with the weights of a block."""
    other = nn.TransformerEncoderLayer(
        width, heads, block.mlp.linear1.out_features, 0.0, "gelu", batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_weight": block.qkv.weight,
        "self_attn.in_proj_bias": block.qkv.bias,
        "self_attn.out_proj.weight": block.proj.weight,
        "self_attn.out_proj.bias": block.proj.bias,
    }
    for theirs, ours in (("norm1", block.norm1), ("norm2", block.norm2)):
        pairs |= {f"{theirs}.weight": ours.weight, f"{theirs}.bias": ours.bias}
    for theirs, ours in (("linear1", block.mlp.linear1), ("linear2", block.mlp.linear2)):
        pairs |= {f"{theirs}.weight": ours.weight, f"{theirs}.bias": ours.bias}
    other.load_state_dict(pairs)
    return other.to(block.qkv.weight.dtype)


def test_the_paper_has_eighty_eight_million_parameters_and_512_cells() -> None:
    with torch.device("meta"):
        encoder = ViTEncoder(ViTConfig())
    embedding = 16**3 * 768 + 768
    attention = 768 * 3 * 768 + 3 * 768 + 768 * 768 + 768
    mlp = 768 * 3072 + 3072 + 3072 * 768 + 768
    tokens, norm = 2 * 768, 2 * 768
    expected = embedding + 12 * (attention + mlp + 2 * norm) + norm + tokens
    assert expected == 88_204_032
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected
    sizes = encoder.config
    assert sizes.grid((128, 128, 128)) == (8, 8, 8)
    assert (sizes.cell_side, sizes.final_side) == (16, 16)
    assert (sizes.cell_width, sizes.final_width) == (768, 768)
    assert (sizes.has_cls, sizes.levels) == (True, (3, 6, 9, 12))
    with torch.device("meta"):
        assert encoder(torch.rand(1, 1, 128, 128, 128)).attention.shape == (1, 512)


@pytest.mark.parametrize(
    ("sizes", "crop", "grid", "levels"),
    [
        (SMALL, CROP, GRID, 4),
        (SMALL, (32, 32, 32), (2, 2, 2), 4),
        (replace(SMALL, depth=6, patch_side=8), (16, 32, 16), (2, 4, 2), 4),
        (replace(SMALL, depth=1), (48, 48, 48), (3, 3, 3), 1),
        (replace(SMALL, depth=2), (32, 32, 64), (2, 2, 4), 2),
    ],
)
def test_features_of_every_crop(sizes, crop, grid, levels):
    features = ViTEncoder(sizes)(torch.rand(2, 1, *crop))
    number = int(np.prod(grid))
    assert sizes.grid(crop) == grid
    assert features.tokens.shape == (2, number, 48)
    assert features.cls.shape == features.pooled.shape == (2, 48)
    assert features.attention.shape == (2, number)
    assert features.attention.dtype == torch.float32
    assert not features.attention.requires_grad
    torch.testing.assert_close(features.attention.sum(1), torch.ones(2))
    assert [level.shape for level in features.pyramid] == [(2, 48, *grid)] * levels
    assert torch.equal(features.pyramid[-1].flatten(2).transpose(1, 2), features.tokens)
    assert torch.equal(features.pooled, features.tokens.mean(dim=1))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_pytorchs_transformer(encoder, images, dtype, tolerance):
    encoder, images = encoder.to(dtype), images.to(dtype)
    features = encoder(images)
    embedded = patches(images) @ encoder.patch_embed.proj.weight.T + encoder.patch_embed.proj.bias
    x = torch.cat([encoder.cls_token.expand(2, 1, 48), embedded + position(GRID, 48)], dim=1)
    levels = []
    for block in encoder.blocks:
        other, before = layer(block, 48, 4), x
        x = other(x)
        levels.append(nn.functional.layer_norm(x[:, 1:], (48,)))
    normalised = encoder.norm(x)
    matrix = other.self_attn(*[other.norm1(before)] * 3)[1]  # mean over heads
    row = matrix[:, 0, 1:] / matrix[:, 0, 1:].sum(1, keepdim=True)
    wanted = {"tokens": normalised[:, 1:], "cls": normalised[:, 0], "pooled": normalised[:, 1:].mean(1)}
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(features, name), value, rtol=0, atol=tolerance)
    for level, value in zip(features.pyramid[:-1], levels[:-1], strict=True):
        torch.testing.assert_close(level.flatten(2).transpose(1, 2), value, rtol=0, atol=tolerance)
    torch.testing.assert_close(features.attention, row.float(), rtol=1e-4, atol=1e-6)
    assert features.attention.max() > 1.5 / CELLS  # far from uniform, so that the comparison means something


@torch.no_grad()
def test_equals_monais_vit(encoder, images):
    """MONAI 1.6.1's `ViT` with [CLS]; its own position code has x and y changed over, so it is given ours."""
    from monai.networks.nets.vit import ViT

    sizes = {"hidden_size": 48, "mlp_dim": 192, "num_layers": 4, "num_heads": 4}
    theirs = ViT(
        1, CROP, 16, **sizes, proj_type="perceptron", pos_embed_type="none", classification=True, qkv_bias=True
    ).eval()
    named = {
        "cls_token": encoder.cls_token.view(1, 1, -1),
        "patch_embedding.position_embeddings": position(GRID, 48)[None],
        "patch_embedding.patch_embeddings.1.weight": encoder.patch_embed.proj.weight,
        "patch_embedding.patch_embeddings.1.bias": encoder.patch_embed.proj.bias,
    }
    for name, value in encoder.state_dict().items():
        if name.startswith(("blocks.", "norm.")):
            named[name.replace(".qkv.", ".attn.qkv.").replace(".proj.", ".attn.out_proj.")] = value
    missing, unexpected = theirs.load_state_dict(named, strict=False)
    assert unexpected == []
    assert {name.split(".")[0] if "cross_attn" not in name else "" for name in missing} <= {"classification_head", ""}
    said, levels = theirs(images)
    features = encoder(images)
    torch.testing.assert_close(theirs.classification_head(features.cls), said, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.tokens, encoder.norm(levels[-1])[:, 1:], rtol=0, atol=1e-5)


def test_tokens_are_in_c_order_of_the_cells(encoder, images):
    with torch.no_grad():  # no attention: what changes in a cell stays in its token
        for block in encoder.blocks:
            block.proj.weight.zero_()
    whole = encoder(images)
    other = images.clone()
    other[:, :, 16:32, 32:48, 16:32] = other[:, :, 16:32, 32:48, 16:32].flip(2)  # cell (1, 2, 1) of 2 x 4 x 3
    changed = encoder(other)
    differs = (whole.tokens != changed.tokens).any(dim=2)
    assert torch.equal(differs, only(1 * 12 + 2 * 3 + 1))
    assert (whole.pyramid[-1] != changed.pyramid[-1]).any(dim=1).nonzero().tolist() == [[0, 1, 2, 1], [1, 1, 2, 1]]


def test_batch_items_do_not_see_each_other(encoder, images):
    alone = encoder(images[:1])
    together = encoder(torch.cat([images[:1], torch.rand(2, 1, *CROP) * 100]))
    for one, many in zip([*alone[:4], *alone.pyramid], [*together[:4], *together.pyramid], strict=True):
        torch.testing.assert_close(one, many[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["hidden", "dropped"])
def test_a_cell_that_is_not_seen_has_no_influence(encoder, images, how):
    unseen = {how: only(7, 16)}
    other = images.clone()
    other[:, :, :16, 32:48, 16:32] = torch.rand(2, 1, 16, 16, 16)  # cell 7
    other[:, :, 16:32, 16:32, 16:32] = 5.0  # cell 16
    one, two = encoder(images, **unseen), encoder(other, **unseen)
    for a, b in zip([*one[:4], *one.pyramid], [*two[:4], *two.pyramid], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(encoder(images).pooled, encoder(other).pooled)
    assert not torch.equal(one.pooled, encoder(images).pooled)
    images.requires_grad_()
    encoder(images, **unseen).pooled.sum().backward()
    assert torch.equal(patches(images.grad).abs().sum(dim=2) > 0, ~only(7, 16))


def test_hidden_patches_become_the_token_before_their_position_is_added(encoder, images):
    entered = []
    encoder.blocks[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    encoder(images, only(7), only(16))
    code = position(GRID, 48)
    torch.testing.assert_close(entered[0][:, 0], encoder.cls_token.expand(2, -1), rtol=0, atol=0)
    torch.testing.assert_close(entered[0][:, 1 + 7], (encoder.hidden_token + code[7]).expand(2, -1))
    torch.testing.assert_close(entered[0][:, 1 + 16], code[16].expand(2, -1))
    zero = ViTEncoder(replace(SMALL, hidden_token="zero")).eval()
    assert "hidden_token" not in zero.state_dict()
    assert torch.equal(zero(images, only(7)).tokens, zero(images, None, only(7)).tokens)


def test_every_loss_trains_every_parameter():
    torch.manual_seed(0)
    encoder = ViTEncoder(SMALL)
    for name in ("tokens", "cls", "pooled"):
        encoder.zero_grad()
        getattr(encoder(torch.rand(2, 1, *CROP), only(1, 5)), name).pow(3).sum().backward()
        assert [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_drop_path_is_linear_in_depth_and_off_in_eval_mode(images):
    encoder = ViTEncoder(replace(SMALL, drop_path=0.6))
    np.testing.assert_allclose([block.drop_path.chance for block in encoder.blocks], [0, 0.2, 0.4, 0.6])
    assert not torch.equal(encoder(images).pooled, encoder(images).pooled)
    encoder.eval()
    assert torch.equal(encoder(images).pooled, encoder(images).pooled)


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast_stays_close(encoder, images, training):
    with torch.set_grad_enabled(training):
        exact = encoder(images, only(3))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(images, only(3))
    assert rounded.attention.dtype == torch.float32
    for a, b in zip(exact[:4], rounded[:4], strict=True):
        assert (a - b).norm() < 0.03 * a.norm()


def test_the_earlier_levels_can_be_left_out(encoder, images):
    all_of_them, last = encoder(images), encoder(images, final_only=True)
    assert [len(features.pyramid) for features in (all_of_them, last)] == [4, 1]
    for one, other in zip([*all_of_them[:4], all_of_them.pyramid[-1]], [*last[:4], last.pyramid[-1]], strict=True):
        assert torch.equal(one, other)


def test_deepcopy_state_dict_and_training_after_inference_mode(encoder, images):
    with torch.inference_mode():
        expected = encoder(images).tokens.clone()
    assert torch.equal(copy.deepcopy(encoder)(images).tokens, expected)
    other = build(SMALL).eval()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(images).tokens, expected)
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}
    encoder.train()(images).tokens.sum().backward()


@pytest.mark.parametrize(
    ("crop", "word"),
    [((32, 40, 64), "choose 32x48x64"), ((0, 32, 32), "multiples of 16"), ((16, 16, 112), "has 7 cells of 16 voxels")],
)
def test_crops_that_cannot_be_divided_are_refused(crop, word):
    with pytest.raises(DagmanError, match=word) as error:
        SMALL.grid(crop)
    assert error.value.code == "CROP"


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("width", 100, "choose for example 102"),
        ("width", 0, "choose for example 6"),
        ("num_heads", 5, "does not divide the width 48"),
        ("depth", 0, "at least 1"),
        ("patch_side", 0, "give voxels"),
        ("drop_path", 1.0, "0 <= drop_path < 1"),
        ("mlp_ratio", 0.01, "0.01 leaves no hidden unit"),
        ("hidden_token", "noise", "give one of learned, zero"),
        ("attention", "none", "is not known"),
        ("kind", "swin", "give one of vit"),
    ],
)
def test_impossible_sizes_are_refused(field, value, word):
    with pytest.raises(DagmanError, match=word) as error:
        config.override(SMALL, {field: value})
    assert error.value.code == "CONFIG"


def test_settings_of_a_run_hold_either_encoder(tmp_path: Path):
    path = tmp_path / "config.yaml"
    vit = config.override(
        recipes.get("dagman-tiny"), {"encoder.kind": "vit", "encoder.width": "192", "encoder.mlp-ratio": "2"}
    )
    assert vit.encoder == ViTConfig(width=192, mlp_ratio=2.0)
    assert config.override(vit, {"encoder.depth": "6"}).encoder == ViTConfig(width=192, depth=6, mlp_ratio=2.0)
    assert config.override(vit, {"encoder.kind": "swin", "encoder.attention.stage": "2"}).encoder.cell_stage == 2
    for recipe in (vit, recipes.get("dagman-tiny")):
        path.write_text(config.to_yaml(recipe))
        assert config.from_dict(PretrainConfig, config.read_yaml(path)) == recipe
    values = config.to_dict(recipes.get("dagman-tiny"))
    del values["encoder"]["kind"]  # as files were before there was a ViT
    assert config.from_dict(PretrainConfig, values) == recipes.get("dagman-tiny")
    for flags in ({"encoder.kind": "resnet"}, {"encoder": {"kind": "resnet"}}):
        with pytest.raises(DagmanError, match=r"E-CONFIG encoder.kind: cannot be 'resnet'; give one of swin, vit"):
            config.override(recipes.get("dagman-tiny"), flags)


@pytest.fixture
def saved(encoder, tmp_path) -> Path:
    encoder.preparation = Preparation(window_hu=(-1000.0, 400.0), crop=CROP)
    path = tmp_path / "run" / "weights" / "model.safetensors"
    save_encoder(encoder, path, {"recipe": "dagman-vit", "role": "teacher"})
    return path


def test_saved_weights_come_back(encoder, images, saved):
    loaded = load_encoder(saved.parent.parent)
    assert isinstance(loaded, ViTEncoder)
    assert (loaded.config, loaded.preparation, loaded.training) == (SMALL, encoder.preparation, False)
    assert "54 tensors loaded (100.0% of the ViT), 0 missing" in str(loaded.report)
    assert torch.equal(loaded(images).attention, encoder(images).attention)
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_monai_has_no_place_for_it(encoder, saved, tmp_path):
    for source in (encoder, saved):
        with pytest.raises(DagmanError, match="is a ViT, which MONAI's SwinUNETR has no place for") as error:
            export_monai(source, tmp_path / "monai.safetensors")
        assert error.value.code == "WEIGHTS"
        assert error.value.exit_code == ExitCode.REFUSED
    assert not (tmp_path / "monai.safetensors").exists()


def test_weights_of_an_encoder_from_the_future_are_refused(encoder, saved):
    encoder.config = replace(SMALL)
    object.__setattr__(encoder.config, "kind", "resnet")
    save_encoder(encoder, saved, {})
    with pytest.raises(DagmanError, match=r"E-CONFIG network.kind: cannot be 'resnet'; give one of swin, vit"):
        load_encoder(saved)


def test_features_and_attention_maps_of_whole_cts(encoder, images):
    encoder.preparation = Preparation(spacing_mm=2.0, crop=CROP)
    found = encode(encoder, images, device="cpu", precision="float32")
    torch.testing.assert_close(found.tokens.mean(dim=1), found.pooled)
    other = untrained(encoder)
    assert isinstance(other, ViTEncoder)
    assert other.preparation == encoder.preparation
    hu = np.full((40, 70, 60), AIR_HU, np.int16)
    hu[8:32, 10:60, 10:50] = np.random.default_rng(0).integers(-100, 200, (24, 50, 40))
    seen = attention_map(encoder, Volume(hu=hu, affine=np.diag([2.0, 2.0, 2.0, 1.0])))
    assert seen.shape == hu.shape
    assert seen[seen > 0].mean() == pytest.approx(1, abs=0.3)


HEADS = HeadConfig(num_prototypes=16, hidden_width=24, bottleneck_width=8)


def pairs() -> Views:
    draws = torch.Generator().manual_seed(4)
    u, v = torch.rand(2, 3, 1, *CROP, generator=draws)
    return Views(u, v, torch.arange(3), torch.zeros(3))


@pytest.mark.parametrize(
    "losses",
    [
        LossWeights(),
        LossWeights(ampd=0.0, aitd=0.0),
        LossWeights(amip=0.0, aitd=0.0, gitd=0.0),
        LossWeights(amip=0.0, ampd=0.0, gitd=0.0),
    ],
)
def test_codistillation_trains_all_of_the_student_and_nothing_of_the_teacher(losses):
    torch.manual_seed(0)
    module = CoDistillation(SMALL, MethodConfig(losses=losses, heads=HEADS), mean_intensity=0.4, crop=CROP).train()
    optimizer = torch.optim.SGD(module.student.parameters(), lr=0.1)
    teacher = copy.deepcopy(module.teacher.state_dict())
    for step in range(2):
        optimizer.zero_grad()
        outcome = module(pairs(), Knobs(0.04, 0.06, attended=True), torch.Generator().manual_seed(step))
        outcome.losses.total.backward()
        grads = {name: parameter.grad for name, parameter in module.student.named_parameters()}
        assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []
        assert [name for name, grad in grads.items() if not grad.any()] == []
        assert all(parameter.grad is None for parameter in module.teacher.parameters())
        optimizer.step()
        module.move_centers(outcome.means)
    assert all(torch.equal(value, teacher[name]) for name, value in module.teacher.state_dict().items())
    module.update_teacher(0.5)
    assert not torch.equal(module.teacher.encoder.cls_token, teacher["encoder.cls_token"])


def test_the_image_term_compares_a_cell_with_the_voxels_it_stands_for():
    """A head that knows the answer leaves no error, whatever is hidden."""
    torch.manual_seed(0)
    method = MethodConfig(losses=LossWeights(ampd=0.0, aitd=0.0, gitd=0.0), heads=HEADS)
    module = CoDistillation(SMALL, method, mean_intensity=0.4, crop=CROP).eval()
    assert module.student.voxel_head.linear.out_features == 16**3
    views = pairs()
    pattern = torch.rand(16, 16, 16)
    same = pattern.repeat(GRID)[None, None].expand(3, 1, *CROP)
    with torch.no_grad():
        module.student.voxel_head.linear.weight.zero_()
        module.student.voxel_head.linear.bias.copy_(pattern.flatten())
    outcome = module(views._replace(u=same, v=same), Knobs(0.04, 0.06, attended=True), torch.Generator().manual_seed(0))
    assert outcome.losses.amip.item() == pytest.approx(0, abs=1e-6)
    found = examine(module, [views.u], Knobs(0.04, 0.06, attended=True))
    assert found.keys() <= MEANINGS.keys()
    assert "level3_effective_rank" in found


def test_the_swins_part_of_the_contract():
    assert (SwinConfig().final_side, SwinConfig().has_cls, SwinConfig(attention=None).has_cls) == (32, True, False)
