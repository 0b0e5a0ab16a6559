import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from dagman import config
from dagman.errors import DagmanError
from dagman.nets import gpu
from dagman.nets import stage as stages
from dagman.nets.encoder import build, checkpoint_blocks
from dagman.nets.swin import AttentionConfig, PatchEmbedding, SwinConfig, SwinEncoder
from dagman.nets.transformer import DropPath, GlobalBlock, sine_cosine_position
from dagman.nets.vit import ViTConfig

SMALL = SwinConfig(
    embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), attention=AttentionConfig(stage=2, num_heads=4)
)
CROP = (32, 64, 32)
CELLS = 4 * 8 * 4


@pytest.fixture
def encoder() -> SwinEncoder:
    torch.manual_seed(0)
    return SwinEncoder(SMALL).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 1, *CROP, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("attention", "crop", "cells", "width"),
    [
        (AttentionConfig(stage=1, num_heads=2), (32, 32, 32), (8, 8, 8), 24),
        (AttentionConfig(stage=2, num_heads=4), (32, 32, 96), (4, 4, 12), 48),
        (AttentionConfig(stage=3), (64, 32, 32), (4, 2, 2), 96),
        (AttentionConfig(stage=4), (64, 64, 64), (2, 2, 2), 192),
        (None, (32, 32, 32), (2, 2, 2), 96),
    ],
)
def test_features_of_every_stage_and_crop(attention, crop, cells, width):
    sizes = replace(SMALL, attention=attention)
    features = SwinEncoder(sizes)(torch.rand(2, 1, *crop))
    number = int(np.prod(cells))
    assert sizes.grid(crop) == cells
    assert sizes.cell_width == width
    assert features.tokens.shape == (2, number, width)
    assert features.pooled.shape == (2, sizes.final_width)
    assert [level.shape[1] for level in features.pyramid] == [12, 24, 48, 96, 192]
    for number_of_halvings, level in enumerate(features.pyramid, 1):
        assert level.shape[2:] == tuple(side >> number_of_halvings for side in crop)
    torch.testing.assert_close(features.pooled, features.pyramid[-1].mean((2, 3, 4)))
    if attention:
        assert features.cls.shape == (2, width)
        assert features.attention.shape == (2, number)
    else:
        assert features.cls is features.attention is None
        assert torch.equal(features.tokens, features.pyramid[3].flatten(2).transpose(1, 2))


def test_the_paper_has_ten_million_parameters_and_512_cells():
    with torch.device("meta"):
        encoder = SwinEncoder(SwinConfig())
    swin = sum(p.numel() for n, p in encoder.named_parameters() if n.startswith(("patch_embed", "stages")))
    assert round(swin / 1e6, 2) == 10.57
    assert encoder.config.grid((128, 128, 128)) == (8, 8, 8)
    assert (encoder.config.cell_side, encoder.config.cell_width, encoder.config.final_width) == (16, 384, 768)


def equation_1(encoder: SwinEncoder, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Semantic attention written out with full matrices: normalised cells, [CLS], and the attention of equation 1."""
    module, width = encoder.semantic_attention, encoder.config.cell_width
    level = encoder.trunk(images)[0][encoder.config.cell_stage]
    cells = level.flatten(1, 3) + sine_cosine_position(level.shape[1:4], width, level.device)
    x = torch.cat([module.cls_token.expand(len(images), 1, width), cells], dim=1)
    for block in module.blocks:
        normalised = block.norm1(x)
        rows, mixed = [], []
        for head in range(block.num_heads):
            part = slice(head * width // block.num_heads, (head + 1) * width // block.num_heads)
            query, key, value = (
                normalised @ block.qkv.weight[k * width : (k + 1) * width][part].T
                + block.qkv.bias[k * width : (k + 1) * width][part]
                for k in range(3)
            )
            matrix = (query @ key.transpose(1, 2) / (width // block.num_heads) ** 0.5).exp()
            matrix = matrix / matrix.sum(-1, keepdim=True)
            rows.append(matrix[:, 0])
            mixed.append(matrix @ value)
        x = x + block.proj(torch.cat(mixed, dim=-1))
        x = x + block.mlp.linear2(torch.nn.functional.gelu(block.mlp.linear1(block.norm2(x))))
    row = torch.stack(rows).mean(0)[:, 1:]
    normalised = module.norm(x)
    return normalised[:, 1:], normalised[:, 0], row / row.sum(1, keepdim=True)


def test_semantic_attention_is_equation_1(encoder, images):
    with torch.no_grad():
        for parameter in encoder.semantic_attention.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    features = encoder(images)
    tokens, cls, attention = equation_1(encoder, images)
    torch.testing.assert_close(features.tokens, tokens, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(features.cls, cls, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(features.attention, attention, rtol=1e-5, atol=1e-7)
    assert (features.attention >= 0).all()
    assert features.attention.max() > 2 / CELLS  # far from uniform, so that the comparison means something
    torch.testing.assert_close(features.attention.sum(1), torch.ones(2))
    assert not features.attention.requires_grad
    assert features.attention.dtype == torch.float32


def test_batch_items_do_not_see_each_other(encoder, images):
    alone = encoder(images[:1])
    together = encoder(torch.cat([images[:1], torch.rand(2, 1, *CROP) * 100]))
    for one, many in zip([*alone[:4], *alone.pyramid], [*together[:4], *together.pyramid], strict=True):
        torch.testing.assert_close(one, many[:1], rtol=1e-4, atol=1e-5)


def test_the_patch_embedding_is_a_convolution_and_its_gradients_are_float64s_over_many_patches():
    """A sum over 262,144 patches, in float32 within 1e-5 of the largest."""
    images = torch.rand(1, 1, 128, 128, 128, generator=torch.Generator().manual_seed(0))
    embedding = PatchEmbedding(24, norm=False)
    exact = copy.deepcopy(embedding.proj).double()
    found, wanted = embedding(images), exact(images.double()).movedim(1, -1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)
    along = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found.backward(along.float())
    wanted.backward(along.float().double())
    for name, parameter in exact.named_parameters():
        largest = parameter.grad.abs().max()
        difference = embedding.proj.get_parameter(name).grad.double() - parameter.grad
        assert difference.abs().max() < 1e-5 * largest, name


def test_only_hidden_and_dropped_patches_change_at_the_embedding(encoder, images):
    hidden, dropped = torch.zeros(2, 2, CELLS, dtype=torch.bool)
    hidden[0, 37], dropped[1, 5] = True, True  # cells (1, 1, 1) and (0, 1, 1) of 4 x 8 x 4
    whole = encoder.embed(images)
    changed = encoder.embed(images, hidden, dropped)
    expected = whole.clone()
    expected[0, 4:8, 4:8, 4:8] = encoder.hidden_token
    expected[1, 0:4, 4:8, 4:8] = 0
    assert torch.equal(changed, expected)
    zero = SwinEncoder(replace(SMALL, hidden_token="zero"))
    assert not hasattr(zero, "hidden_token")
    everything = torch.ones(2, CELLS, dtype=torch.bool)
    assert zero.embed(images, everything).abs().sum() == 0


def test_a_hidden_cell_is_not_seen_through_any_output(encoder, images):
    hidden = torch.zeros(2, CELLS, dtype=torch.bool)
    hidden[:, 37] = True
    other = images.clone()
    other[:, :, 8:16, 8:16, 8:16] = torch.rand(2, 1, 8, 8, 8)
    for a, b in zip(encoder(images, hidden)[:4], encoder(other, hidden)[:4], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(encoder(images).pooled, encoder(other).pooled)


@pytest.mark.parametrize("placement", ["series", "branch"])
@pytest.mark.parametrize("stage", [2, 4])
def test_no_parameter_is_left_without_gradient(placement, stage):
    sizes = replace(SMALL, attention=AttentionConfig(stage=stage, placement=placement, num_heads=4))
    encoder = SwinEncoder(sizes)
    images = torch.rand(2, 1, 64, 64, 64)
    hidden = torch.rand(2, int(np.prod(sizes.grid((64, 64, 64))))) < 0.5
    features = encoder(images, hidden)
    (features.tokens.square().sum() + features.cls.sum() + features.pooled.square().sum()).backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_semantic_attention_changes_later_stages_only_in_series(images):
    torch.manual_seed(0)
    series = SwinEncoder(SMALL).eval()
    branch = SwinEncoder(replace(SMALL, attention=replace(SMALL.attention, placement="branch"))).eval()
    branch.load_state_dict(series.state_dict())
    plain = SwinEncoder(replace(SMALL, attention=None)).eval()
    plain.load_state_dict(series.state_dict(), strict=False)
    assert torch.equal(branch(images).pooled, plain(images).pooled)
    assert torch.equal(branch(images).attention, series(images).attention)
    assert not torch.allclose(series(images).pooled, plain(images).pooled, atol=1e-3)


def test_position_code_is_fixed_and_distinct_on_any_grid():
    code = sine_cosine_position((3, 4, 5), 24, torch.device("cpu"))
    assert code.shape == (60, 24)
    assert torch.pdist(code).min() > 0.1
    # cell (2, 1, 3): sine and cosine of 2, 1 and 3 at frequency 1 begin each half of each third
    expected = torch.tensor([f(k) for k in (2.0, 1.0, 3.0) for f in (np.sin, np.cos)], dtype=torch.float32)
    torch.testing.assert_close(code[2 * 20 + 1 * 5 + 3][::4], expected)


def test_drop_path_leaves_items_out_in_training_only():
    torch.manual_seed(0)
    drop, like = DropPath(0.25), torch.ones(1)
    kept = drop(4000, like)
    assert kept.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert kept.mean().item() == pytest.approx(1, abs=0.03)
    assert drop.eval()(4000, like) is None
    block, x = GlobalBlock(24, num_heads=2, mlp_ratio=2.0, drop_path=0.75), torch.randn(40, 5, 24)
    unchanged = [torch.equal(one, other) for one, other in zip(block(x)[0], x, strict=True)]
    assert any(unchanged)
    assert not all(unchanged)
    assert not any(torch.equal(one, other) for one, other in zip(block.eval()(x)[0], x, strict=True))
    chances = [block.drop_path.chance for stage in SwinEncoder(SMALL).stages for block in stage.blocks]
    np.testing.assert_allclose(chances, np.linspace(0, 0.1, 8))


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_autocast_stays_close(encoder, images, training):
    with torch.set_grad_enabled(training):
        exact = encoder(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(images)
    assert rounded.attention.dtype == torch.float32
    for a, b in zip(exact[:4], rounded[:4], strict=True):
        assert (a - b).norm() < 0.03 * a.norm()


def test_meta_device_deepcopy_and_state_dict(encoder, images):
    with torch.device("meta"):
        shapes = SwinEncoder(SMALL)(torch.rand(2, 1, *CROP))
    assert shapes.attention.shape == (2, CELLS)
    expected = encoder(images)
    assert torch.equal(copy.deepcopy(encoder)(images).tokens, expected.tokens)
    other = SwinEncoder(SMALL).eval()
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(images).tokens, expected.tokens)
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}


def test_training_follows_inference_mode(encoder, images):
    sine_cosine_position.cache_clear()
    with torch.inference_mode():
        encoder(images)
    encoder.train()(images).tokens.sum().backward()


@pytest.mark.parametrize(
    ("sizes", "crop", "word"),
    [
        (SMALL, (32, 48, 64), "choose 32x64x64"),
        (SMALL, (0, 32, 32), "multiples of 32"),
        (replace(SMALL, attention=AttentionConfig(stage=4)), (32, 64, 96), "has 6 cells of 32 voxels"),
    ],
)
def test_crops_that_cannot_be_divided_are_refused(sizes, crop, word):
    with pytest.raises(DagmanError, match=word) as error:
        sizes.grid(crop)
    assert error.value.code == "CROP"


@pytest.mark.parametrize(
    "fields",
    [
        {"embed_dim": 20},
        {"num_heads": (5, 4, 8, 16)},
        {"depths": (0, 2, 2, 2)},
        {"window": 1},
        {"drop_path": 1.0},
        {"mlp_ratio": 0.0},
        {"mlp_ratio": -1.0},
        {"attention": {"mlp_ratio": 0.001}},
        {"attention": {"stage": 5}},
        {"attention": {"num_blocks": 0}},
        {"attention": {"num_heads": 7}},
        {"attention": {"placement": "parallel"}},
    ],
)
def test_impossible_sizes_are_refused(fields):
    with pytest.raises(DagmanError) as error:
        config.override(SwinConfig(), fields)
    assert error.value.code == "CONFIG"


def test_configs_travel_as_plain_values():
    for sizes in (SMALL, replace(SMALL, attention=None), SwinConfig()):
        assert config.from_dict(SwinConfig, config.to_dict(sizes)) == sizes


def test_networks_need_torch_alone():
    code = "import sys, dagman.nets.encoder, dagman.nets.heads, dagman.nets.weights; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "dagman.nets.weights" in loaded
    assert not {"monai", "scipy", "sklearn", "SimpleITK", "blosc2", "matplotlib", "cyclopts"} & set(loaded)


@pytest.mark.parametrize(
    ("crop", "stage"), [((32, 32, 32), 2), ((64, 32, 64), 3), ((32, 64, 96), 2), ((64, 32, 64), 1), ((64, 64, 64), 4)]
)
@pytest.mark.parametrize("training", [True, False])
def test_windows_computed_once_give_what_every_window_gives(monkeypatch, crop, stage, training):
    config = replace(SMALL, attention=AttentionConfig(stage=stage, num_heads=2))
    cells = int(np.prod([side // config.cell_side for side in crop]))
    draws = torch.Generator().manual_seed(0)
    hidden = torch.rand(2, cells, generator=draws) < 0.7
    images = torch.rand(2, 1, *crop, generator=draws, dtype=torch.float64)
    torch.manual_seed(0)
    encoder = SwinEncoder(config).double().train(training)
    widest, found = [], []
    encoder.stages[0].blocks[0].mlp.register_forward_pre_hook(lambda _, given: widest.append(given[0].numel()))
    for dense in (False, True):
        if dense:
            monkeypatch.setattr(stages, "blank_windows", lambda *_, **__: None)
        torch.manual_seed(1)
        encoder.zero_grad()
        features = encoder(images, hidden)
        (features.pooled.pow(3).sum() + features.tokens.pow(2).sum() + features.cls.pow(3).sum()).backward()
        found.append((features, [p.grad.clone() for p in encoder.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0].pooled, found[1][0].pooled)
    for once, dense in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(once, dense, rtol=1e-5, atol=1e-6 * dense.abs().max().item())
    if config.cell_side >= 8:  # a hidden cell holds whole windows
        assert widest[0] < 0.6 * widest[1]


def test_position_in_attention_alone_is_in_queries_and_keys_alone():
    torch.manual_seed(0)
    block = GlobalBlock(24, num_heads=2, mlp_ratio=2.0, query_gain=3.0)
    x, position = torch.randn(2, 5, 24), torch.randn(5, 24)
    query, key, value = block.heads_of(x, position)
    moved, plain = (
        block.qkv(block.norm1(x) + extra).view(2, 5, 3, 2, 12).permute(2, 0, 3, 1, 4) for extra in (position, 0)
    )
    torch.testing.assert_close(torch.stack([query, key]), moved[:2])
    torch.testing.assert_close(value, plain[2])


def test_query_gain_scales_the_first_weights_of_queries_and_keys():
    blocks = []
    for gain in (1.0, 2.0):
        torch.manual_seed(0)
        blocks.append(GlobalBlock(12, num_heads=2, mlp_ratio=2.0, query_gain=gain))
    plain, scaled = (block.qkv.weight for block in blocks)
    assert torch.equal(scaled[:24], 2 * plain[:24])
    assert torch.equal(scaled[24:], plain[24:])


def test_the_finer_levels_can_be_left_out(encoder, images):
    all_of_them, last = encoder(images), encoder(images, final_only=True)
    assert [len(features.pyramid) for features in (all_of_them, last)] == [5, 1]
    for one, other in zip([*all_of_them[:4], all_of_them.pyramid[-1]], [*last[:4], last.pyramid[-1]], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("chance", [0.0, 0.5])
def test_shifted_windows_are_computed_once_too_with_and_without_drop_path(monkeypatch, chance):
    config = replace(SMALL, depths=(2, 1, 1, 1), drop_path=chance, attention=AttentionConfig(num_heads=2))
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(3, 1, 64, 32, 64, generator=draws, dtype=torch.float64)
    hidden = torch.zeros(3, 4, 2, 4, dtype=torch.bool)
    hidden[:2, :3], hidden[2, 0, 0, 0] = True, True
    torch.manual_seed(0)
    encoder = SwinEncoder(config).double().train()
    tokens, found = [], []
    encoder.stages[0].blocks[1].mlp.register_forward_pre_hook(lambda _, given: tokens.append(given[0][..., 0].numel()))
    for dense in (False, True):
        if dense:
            monkeypatch.setattr(stages, "blank_windows", lambda *_, **__: None)
        torch.manual_seed(3)
        encoder.zero_grad()
        features = encoder(images, hidden.flatten(1))
        (features.pooled.pow(3).sum() + features.tokens.pow(2).sum()).backward()
        found.append((features, [p.grad.clone() for p in encoder.parameters() if p.grad is not None]))
    assert tokens[0] < 0.8 * tokens[1]
    assert torch.equal(found[0][0].pooled, found[1][0].pooled)
    for once, each in zip(found[0][1], found[1][1], strict=True):
        assert (once - each).norm() <= 1e-5 * each.norm() + 1e-12


def test_windows_are_not_counted_where_triton_runs(monkeypatch, encoder, images):
    """Each count would wait for the GPU; in float32, as here, the kernel of attention alone runs."""
    monkeypatch.setattr(gpu, "fuses", lambda *_: False)
    monkeypatch.setattr(gpu, "window_attention", lambda qkv, *_, **__: qkv[..., : qkv.shape[-1] // 3])
    for name in ("blank_windows", "in_whole_windows", "window_layout"):
        monkeypatch.setattr(stages, name, None)
    with gpu.forced("triton"):
        encoder(images, torch.arange(2 * CELLS).view(2, CELLS) % CELLS < CELLS // 2)


@pytest.mark.parametrize("config", [SMALL, ViTConfig(width=48, depth=2, patch_side=16, num_heads=2, drop_path=0.3)])
def test_checkpointing_gives_the_same_gradients(config):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        encoder = build(config).train()
        if checkpointing:
            checkpoint_blocks(encoder)
        torch.manual_seed(1)
        images, hidden = torch.rand(2, 1, 64, 32, 64), torch.rand(2, int(np.prod(config.grid((64, 32, 64))))) < 0.6
        features = encoder(images, hidden)
        (features.pooled.square().sum() + features.tokens.square().sum()).backward()
        results.append([features.pooled, *(p.grad for p in encoder.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
