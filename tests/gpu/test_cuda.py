"""What only a real device can show. The kernels' numbers there are proven by tests/nets/test_triton.py as well."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dagman.nets import gpu, launches
from dagman.nets.swin import SwinConfig, SwinEncoder
from dagman.nets.window import WindowAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
CUDA = torch.device("cuda")
needs_triton = pytest.mark.skipif(
    torch.cuda.is_available() and gpu.why_not(CUDA) is not None, reason="Triton does not run on this device"
)


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.detach().double().cpu() - exact.cpu()).norm() / exact.norm().cpu()).item()


def encoder() -> SwinEncoder:
    torch.manual_seed(0)
    return SwinEncoder(SwinConfig(depths=(2, 2, 2, 2)))


def masks() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 1, 64, 64, 96, device=CUDA), torch.rand(2, 4 * 4 * 6, device=CUDA) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_width", [12, 24, 48])
def test_no_teacher_pass_falls_to_the_math_path(head_width, dtype):
    module = WindowAttention(4 * head_width, num_heads=4, window=4, shift=2).to(CUDA)
    x = torch.randn(2, 8, 8, 12, 4 * head_width, device=CUDA)
    fused = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with (
        torch.no_grad(),
        gpu.forced("plain"),
        sdpa_kernel(fused),  # raises where none of these can
        torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        found = module(x)
    exact = copy.deepcopy(module).cpu().double()(x.cpu().double()).detach()
    assert error(found, exact) < (1e-6 if dtype == torch.float32 else 1e-2)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_trains_on_triton_by_itself(dtype):
    images, hidden = masks()
    exact, ours = encoder().eval().double(), encoder().eval().to(CUDA)
    features = exact(images.cpu().double(), hidden.cpu())
    (features.pooled.square().sum() + features.tokens.square().sum()).backward()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = ours(images, hidden)
    (found.pooled.square().sum() + found.tokens.square().sum()).backward()
    single = dtype == torch.float32
    assert error(found.pooled, features.pooled.detach()) < (1e-5 if single else 3e-2)
    pairs = zip(ours.named_parameters(), exact.parameters(), strict=True)
    errors = {name: error(mine.grad, plain.grad) for (name, mine), plain in pairs if plain.grad is not None}
    assert max(errors.values()) < (1e-4 if single else 0.2), errors


@needs_triton
def test_more_windows_than_a_grid_has_rows():
    """65,536 windows: the second axis of a launch ends at 65,535."""
    module = WindowAttention(12, num_heads=1, window=2, shift=1).to(CUDA)
    x = torch.randn(2, 64, 64, 64, 12, device=CUDA)
    with torch.no_grad():
        found = module(x)
        with gpu.forced("plain"):
            plain = module(x)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@needs_triton
def test_a_recorded_encoder_gives_the_same_features_and_gradients():
    images, hidden = masks()
    plain, recorded = encoder().eval().to(CUDA), encoder().eval().to(CUDA)
    end = launches.record(recorded, torch.rand_like(images), hidden=torch.zeros_like(hidden), final_only=True)
    results = []
    for network in (plain, recorded):
        features = network(images, hidden, final_only=True)
        (features.pooled.square().sum() + features.tokens.square().sum()).backward()
        results.append((features, [parameter.grad for parameter in network.parameters()]))
    (a, ours), (b, theirs) = results
    torch.testing.assert_close(a.pooled, b.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a.attention, b.attention, rtol=1e-4, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert recorded(images[:1]).pooled.shape == (1, 768)  # another shape runs as before
    end()
    assert "forward" not in vars(recorded)


@needs_triton
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_encoder_gives_the_same_features():
    images, hidden = masks()
    network = encoder().eval().to(CUDA)
    with torch.no_grad():
        before = network(images, hidden)
        assert launches.compile_rest(network)
        after = network(images, hidden)
    torch.testing.assert_close(after.pooled, before.pooled, rtol=1e-3, atol=1e-4)
