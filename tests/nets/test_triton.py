"""The Triton kernels against float64 on the CPU: by Triton's interpreter, or on a GPU where there is one."""

import copy
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dagman.nets import gpu
from dagman.nets.stage import WindowBlock
from dagman.nets.swin import AttentionConfig, SwinConfig, SwinEncoder
from dagman.nets.window import WindowAttention
from dagman.nets.windows import effective_window

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# older interpreters cannot count in a loop with numpy 2.4
pytest.importorskip("triton", None if DEVICE.type == "cuda" else "3.9", reason="Triton 3.9 is not installed")
FEW = settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHAPES = st.tuples(st.tuples(*[st.integers(1, 6)] * 3), st.integers(2, 4)).filter(
    lambda shape: math.prod(math.ceil(side / shape[1]) for side in shape[0]) <= 4  # windows: the interpreter is slow
)


@pytest.fixture(autouse=True)
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that ran, in order; with the arguments they have (no interpreter asks)."""
    from dagman.nets.gpu import tiles

    ran, launch = [], tiles.launch

    def watched(kernel, number, device, *args, **options):
        inspect.signature(kernel.fn).bind(
            *args, **{name: value for name, value in options.items() if name not in ("warps", "stages")}
        )
        ran.append(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")
        launch(kernel, number, device, *args, **options)

    monkeypatch.setattr(tiles, "launch", watched)
    return ran


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.detach().double().cpu() - exact).norm() / exact.norm()).item()


def randomised(module: nn.Module) -> nn.Module:
    """With weights that matter everywhere: norms that are not the identity, logits far from even."""
    for name, parameter in module.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter)
    return module.to(DEVICE)


def attention(width: int, heads: int, window: int, shift: int) -> nn.Module:
    """With the projection that a block applies where the branch joins."""
    module = WindowAttention(width, num_heads=heads, window=window, shift=shift)
    return randomised(nn.Sequential(module, module.proj))


def check(module: nn.Module, x: Tensor, *, out: float = 1e-6, gradient: float = 1e-5) -> None:
    """Output and all gradients of the Triton path against the plain path in float64."""
    probe = torch.randn(x.shape, dtype=torch.float64)
    exact, y = copy.deepcopy(module).cpu().double(), x.double().requires_grad_()
    with gpu.forced("plain"):
        expected = exact(y)
    wanted = torch.autograd.grad((expected * probe).sum(), [y, *exact.parameters()])
    x = x.to(DEVICE).requires_grad_()
    with gpu.forced("triton"):
        found = module(x)
    gradients = torch.autograd.grad((found * probe.to(DEVICE)).sum(), [x, *module.parameters()])
    assert error(found, expected) <= out
    names = ["x", *(name for name, _ in module.named_parameters())]
    errors = {name: error(ours, plain) for name, ours, plain in zip(names, gradients, wanted, strict=True)}
    assert max(errors.values()) <= gradient, errors


@FEW
@given(shape=SHAPES, shifted=st.booleans(), heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_window_attention_of_any_shape_equals_float64(shape, shifted, heads, seed):
    torch.manual_seed(seed)
    grid, window = shape
    shift = window // 2 if shifted else 0
    check(attention(12 * heads, heads, window, shift), torch.randn(2, *grid, 12 * heads))


@pytest.mark.parametrize(
    ("grid", "window", "shift", "width", "heads"),
    [
        ((8, 4, 4), 4, 2, 48, 1),  # head width 48, padded to 64
        ((6, 4, 5), 4, 2, 24, 1),  # padded map
        ((2, 3, 4), 4, 2, 24, 2),  # smaller than a window
        ((5, 5, 3), 3, 1, 24, 2),  # 27 tokens in a tile of 32
    ],
)
def test_window_attention_in_corner_cases(grid, window, shift, width, heads, launched):
    torch.manual_seed(0)
    check(attention(width, heads, window, shift), torch.randn(1, *grid, width))
    assert launched == ["attention._forward", "attention._backward"]


@FEW
@given(shape=SHAPES, shifted=st.booleans(), heads=st.integers(1, 2), seed=st.integers(0, 99))
def test_half_blocks_of_any_shape_equal_float64(shape, shifted, heads, seed):
    torch.manual_seed(seed)
    grid, window = shape
    block = WindowBlock(
        12 * heads,
        num_heads=heads,
        window=window,
        shift=window // 2 if shifted else 0,
        mlp_ratio=2.0,
        drop_path=0.0,
    )
    check(randomised(block), torch.randn(2, *grid, 12 * heads))


@pytest.mark.parametrize(("width", "heads"), [(48, 4), (96, 4)])
def test_half_blocks_of_the_paper_s_widths(width, heads, launched):
    torch.manual_seed(0)
    block = WindowBlock(width, num_heads=heads, window=4, shift=2, mlp_ratio=4.0, drop_path=0.0)
    check(randomised(block), torch.randn(1, 5, 4, 2, width))
    backward = ["rows._hidden_backward", "rows._norm_backward", "half._backward", "rows._norm_backward"]
    alone = ["attention._forward", "attention._backward"]  # float32's tiles are too large for a GPU's half-blocks
    assert launched == (alone if DEVICE.type == "cuda" else ["half._forward", "rows._forward", *backward])


def test_a_wide_block_takes_the_attention_kernel_alone(launched):
    torch.manual_seed(0)
    block = WindowBlock(192, num_heads=8, window=4, shift=2, mlp_ratio=1.0, drop_path=0.0)
    check(randomised(block), torch.randn(1, 2, 4, 4, 192))
    assert launched == ["attention._forward", "attention._backward"]


def test_drop_path_leaves_the_same_maps_out(launched):
    block = WindowBlock(12, num_heads=1, window=2, shift=1, mlp_ratio=2.0, drop_path=0.7).to(DEVICE)
    x = torch.randn(6, 2, 2, 1, 12).to(DEVICE)
    out, gradients = [], []
    for path in ("plain", "triton"):
        torch.manual_seed(1)
        y = x.clone().requires_grad_()
        with gpu.forced(path):
            out.append(block(y))
        gradients.append(torch.autograd.grad(out[-1].square().sum(), [y, *block.parameters()]))
    untouched = (out[1] == x).flatten(1).all(dim=1)
    assert 0 < untouched.sum() < 6
    assert launched
    torch.testing.assert_close(out[1], out[0], rtol=1e-5, atol=1e-5)
    for ours, plain in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_is_no_further_from_float64_than_the_plain_path(fused, monkeypatch, launched):
    """Within 1 % at the output and 2 % at every gradient.

    And within 1.5 times the plain path's own distance; 4 times in the interpreter, which cuts digits off where a GPU
    rounds.
    """
    slack = 1.5 if DEVICE.type == "cuda" else 4
    torch.manual_seed(0)
    if not fused:
        monkeypatch.setattr(gpu, "MOST_FUSED_WIDTH", 0)
    block = randomised(WindowBlock(24, num_heads=2, window=4, shift=2, mlp_ratio=2.0, drop_path=0.0))
    x, probe = torch.randn(1, 4, 6, 4, 24).bfloat16().float(), torch.randn(1, 4, 6, 4, 24)
    exact, y = copy.deepcopy(block).cpu().double(), x.double().requires_grad_()
    expected = exact(y)
    wanted = [expected, *torch.autograd.grad((expected * probe).sum(), [y, *exact.parameters()])]
    errors = {}
    for path in ("plain", "triton"):
        y = x.to(DEVICE).bfloat16().requires_grad_()
        with gpu.forced(path), torch.autocast(DEVICE.type, torch.bfloat16):
            found = block(y)
        assert found.dtype == torch.bfloat16
        gradients = torch.autograd.grad((found * probe.to(DEVICE)).sum(), [y, *block.parameters()])
        errors[path] = [error(*pair) for pair in zip([found, *gradients], wanted, strict=True)]
    assert launched[0] == ("half._forward" if fused else "attention._forward")
    assert errors["triton"][0] < 0.01
    assert max(errors["triton"]) < 0.02
    for ours, plain in zip(errors["triton"], errors["plain"], strict=True):
        assert ours <= slack * plain + 1e-3


def test_programs_do_not_matter(monkeypatch):
    """Sums over windows are the same however many programs share them."""
    from dagman.nets.gpu import tiles

    torch.manual_seed(0)
    block = randomised(WindowBlock(12, num_heads=1, window=2, shift=1, mlp_ratio=2.0, drop_path=0.0))
    x = torch.randn(1, 6, 2, 2, 12)
    for number in (1, 2, 50):
        monkeypatch.setattr(tiles, "programs", lambda work, *_, number=number, **__: min(work, number))
        check(block, x)


def test_an_encoder_takes_them_and_gives_the_same_features(launched):
    torch.manual_seed(0)
    sizes = SwinConfig(
        embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 2), attention=AttentionConfig(stage=2, num_heads=4)
    )
    encoder = SwinEncoder(sizes).eval().to(DEVICE)
    images, hidden = torch.rand(1, 1, 32, 32, 32), torch.rand(1, 64) < 0.5
    exact = copy.deepcopy(encoder).cpu().double()(images.double(), hidden)
    with torch.no_grad(), gpu.forced("triton"):
        found = encoder(images.to(DEVICE), hidden.to(DEVICE))
    each = ["attention._forward"] if DEVICE.type == "cuda" else ["half._forward", "rows._forward"]
    assert launched == each * 4
    for ours, plain in zip([*found[:4], *found.pyramid], [*exact[:4], *exact.pyramid], strict=True):
        assert error(ours, plain.detach()) < 2e-6


def test_the_path_is_chosen_by_device_type_and_size():
    single, tokens = torch.zeros(1), 64  # on the CPU
    assert gpu.why_not(torch.device("cpu")) == "cpu is no CUDA device"
    assert gpu.chosen(single, tokens, 12) == "plain"
    assert gpu.chosen(torch.zeros(1, device="meta"), tokens, 12) == "plain"
    with gpu.forced("triton"):
        assert gpu.chosen(single, tokens, 12) == "triton"
        assert gpu.chosen(single, 125, 12) == "plain"  # a window of 5 is more than a tile
        assert gpu.chosen(single.double(), tokens, 12) == "plain"
        assert gpu.chosen(single, tokens, 64) == "triton"
        assert gpu.chosen(single, tokens, 65) == "plain"  # its tiles are wider than some cards have memory for
        with gpu.forced("plain"):
            assert gpu.chosen(single, tokens, 12) == "plain"
    assert gpu.fuses(torch.zeros(1, 96), 384)
    assert not gpu.fuses(torch.zeros(1, 192), 384)
    assert not gpu.fuses(torch.zeros(1, 96), 768)
    assert effective_window((2, 9, 4), 4, 2) == ((2, 4, 4), (0, 2, 0))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_compiler_takes_every_kernel_for_a_card_that_is_not_here(tmp_path):
    """One of those that share the least memory between the warps of a block, where other stages are launched."""
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root / "src")}
    command = [sys.executable, str(root / "benchmarks" / "gpu_compile.py"), "--arch", "89", "--widths", "96"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 16
