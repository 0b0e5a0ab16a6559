import math

import pytest
import torch

from dagman.errors import DagmanError
from dagman.nets.heads import ProjectionHead, VoxelHead, WeightNorm
from dagman.pretext import hiding


@pytest.fixture
def head() -> ProjectionHead:
    torch.manual_seed(0)
    return ProjectionHead(48, num_prototypes=32, hidden_width=64, bottleneck_width=16)


def test_logits_are_cosines_between_unit_vectors(head):
    features = torch.randn(3, 5, 48) * 10
    bottleneck = head.project(features)
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(3, 5))
    cosines = torch.nn.functional.cosine_similarity(bottleneck[..., None, :], head.prototypes, dim=-1)
    torch.testing.assert_close(head.logits(bottleneck), cosines)
    assert torch.equal(head(features), head.logits(bottleneck))


def test_the_mean_bottleneck_gives_the_mean_logits(head):
    bottleneck = head.project(torch.randn(100, 48))
    torch.testing.assert_close(head.logits(bottleneck.mean(0)), head.logits(bottleneck).mean(0))


@pytest.mark.parametrize("shape", [(4,), (0, 4), (5, 4), (2, 3, 4)])
def test_the_gradient_of_the_logits_is_exact(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(WeightNorm.apply, (x, weight))
    expected = torch.nn.functional.linear(x, weight) / weight.norm(dim=-1)
    torch.testing.assert_close(WeightNorm.apply(x, weight), expected)


def test_a_prototype_of_zeros_gives_no_nan():
    weight = torch.zeros(3, 4, requires_grad=True)
    WeightNorm.apply(torch.randn(5, 4), weight).sum().backward()
    assert weight.grad.isfinite().all()


def test_the_gain_of_the_prototypes_is_fixed(head):
    features = torch.randn(4, 48)
    logits = head(features)
    logits.square().sum().backward()
    # no step can change a length that has no gradient
    along = (head.prototypes.grad * head.prototypes).sum(-1)
    assert along.abs().max() < 1e-5 * head.prototypes.grad.norm()
    with torch.no_grad():
        head.prototypes.mul_(7)
    torch.testing.assert_close(head(features), logits)


def test_sizes_and_start_are_the_papers():
    head = ProjectionHead(384, num_prototypes=8192)
    weights = [p for n, p in head.named_parameters() if n.endswith(("weight", "prototypes"))]
    assert [tuple(w.shape) for w in weights] == [(8192, 256), (2048, 384), (2048, 2048), (256, 2048)]
    for weight in weights:
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert all((p == 0).all() for n, p in head.named_parameters() if n.endswith("bias"))
    with pytest.raises(DagmanError, match="num_prototypes"):
        ProjectionHead(8, num_prototypes=1)


def test_bottleneck_is_float32_under_autocast(head):
    with torch.autocast("cpu", torch.bfloat16):
        bottleneck = head.project(torch.randn(3, 48))
    assert bottleneck.dtype == torch.float32
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(3))


def test_voxels_stand_where_their_token_stands():
    """A head that writes the token's number and the voxel's own place must give the crop's coordinates."""
    side, grid = 4, (2, 3, 1)
    head = VoxelHead(3, cell_side=side, mean_intensity=0.0)
    x, y, z = torch.meshgrid(*[torch.arange(float(side))] * 3, indexing="ij")
    coordinates = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in grid], indexing="ij"))[None]
    for axis, inside in enumerate((x, y, z)):
        with torch.no_grad():
            head.linear.weight.zero_()
            head.linear.weight[:, axis] = side
            head.linear.bias.copy_(inside.flatten())
        crop = head(coordinates)
        shape = [1] * 5
        shape[2 + axis] = side * grid[axis]
        assert crop.shape == (1, 1, 8, 12, 4)
        assert torch.equal(crop, torch.arange(float(side * grid[axis])).view(shape).expand_as(crop))


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_cells_alone_are_those_of_the_whole_crop(times, share):
    torch.manual_seed(0)
    side, grid, batch = 4, (2, 1, 3), 2
    head = VoxelHead(5, cell_side=side, mean_intensity=0.2)
    final = torch.randn(batch, 5, *grid, dtype=torch.float64, requires_grad=True)
    head.double()
    wanted = torch.rand(batch, *(times * n for n in grid)) < share
    alone = head.predict_cells(final, wanted)
    whole = hiding.cut(head(final), side // times)[wanted]
    torch.testing.assert_close(alone, whole, rtol=1e-14, atol=0)  # a product of other rows may round otherwise
    weights = torch.randn_like(whole)
    parts = [final, *head.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((x * weights).sum(), parts) for x in (alone, whole)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_voxel_head_starts_at_the_mean_intensity():
    torch.manual_seed(0)
    head = VoxelHead(768, mean_intensity=0.31)
    assert sum(p.numel() for p in head.parameters()) == 769 * 32**3
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.01)
    crop = head(torch.nn.functional.layer_norm(torch.randn(1, 2, 1, 1, 768), [768]).movedim(-1, 1))
    assert crop.shape == (1, 1, 64, 32, 32)
    assert crop.mean().item() == pytest.approx(0.31, abs=0.01)
    assert crop.std().item() == pytest.approx(0.01 * math.sqrt(768), rel=0.05)
