"""The MLP's compiled kernels against the same written out in float64."""

import ctypes

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.profiler import profile

from dagman.nets import kernel
from dagman.nets.mlp import MLP, MlpKernel

HALF, SINGLE = torch.bfloat16, torch.float32
needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="the kernels were not compiled")
needs_tiles = pytest.mark.skipif(not kernel.has_tiles(), reason="no AMX here, or the kernels were not compiled")
in_both = pytest.mark.parametrize(
    "dtype", [pytest.param(SINGLE, marks=needs_kernel), pytest.param(HALF, marks=needs_tiles)]
)


def gap(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-9)).item()


class Case:
    """Rows, weights that the dtype holds exactly, and a probe of what comes out."""

    def __init__(self, dtype: torch.dtype, count: int, width: int, hidden: int) -> None:
        self.dtype = dtype
        self.x = torch.randn(count, width).to(dtype).requires_grad_()
        self.first = (torch.randn(hidden, width) * width**-0.5).to(dtype).float().requires_grad_()
        self.bias = torch.randn(hidden).requires_grad_()
        self.second = (torch.randn(width, hidden) * hidden**-0.5).to(dtype).float().requires_grad_()
        self.probe = torch.randn(count, width).to(dtype)
        self.trained = [self.x, self.first, self.bias, self.second]

    def found(self) -> list[Tensor]:
        """What comes out and all gradients."""
        out = MlpKernel.apply(*self.trained, self.dtype, True)
        return [out, *torch.autograd.grad((out * self.probe).sum(), self.trained)]

    def wanted(self) -> list[Tensor]:
        """The same in float64."""
        x, first, bias, second = exact = [each.detach().double().requires_grad_() for each in self.trained]
        out = functional.gelu(x @ first.T + bias) @ second.T
        return [out, *torch.autograd.grad((out * self.probe.double()).sum(), exact)]

    def summed_sizes(self) -> list[float]:
        """How large each of these would be if nothing that it sums up cancelled."""
        x, first, bias, second = (each.detach().double() for each in self.trained)
        probe, before = self.probe.double(), (x @ first.T + bias).requires_grad_()
        between = functional.gelu(before)
        slope = torch.autograd.grad((between @ second.T * probe).sum(), before)[0].abs()
        size = between.detach().abs()
        sums = size @ second.abs().T, slope @ first.abs(), slope.T @ x.abs(), slope.sum(dim=0), probe.abs().T @ size
        return [each.norm().item() for each in sums]


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    count=st.one_of(st.integers(1, 300), st.just(3000)),
    width=st.one_of(st.integers(1, 12).map(lambda n: 8 * n), st.just(192)),
    hidden=st.integers(1, 12).map(lambda n: 32 * n),
    seed=st.integers(0, 2**16),
)
def test_in_float32_the_kernel_and_all_its_gradients_equal_float64(count, width, hidden, seed):
    torch.manual_seed(seed)
    case = Case(SINGLE, count, width, hidden)
    found, wanted = case.found(), case.wanted()
    assert [each.shape for each in found] == [each.shape for each in wanted]
    assert gap(found[0], wanted[0]) < 1e-6
    assert all(gap(ours, exact) < 1e-5 for ours, exact in zip(found[1:], wanted[1:], strict=True))


@needs_tiles
@settings(deadline=None, max_examples=60)
@given(
    count=st.one_of(st.integers(1, 300), st.just(3000)),
    width=st.one_of(st.integers(1, 40).map(lambda n: 2 * n), st.sampled_from([96, 192])),
    hidden=st.integers(1, 12).map(lambda n: 32 * n),
    seed=st.integers(0, 2**16),
)
@example(count=1, width=2, hidden=32, seed=229)
def test_in_bfloat16_the_kernel_and_all_its_gradients_equal_float64_but_for_rounding(count, width, hidden, seed):
    torch.manual_seed(seed)
    case = Case(HALF, count, width, hidden)
    found, wanted = case.found(), case.wanted()
    assert [each.dtype for each in found] == [HALF, HALF, *[torch.float32] * 3]
    assert [each.shape for each in found] == [each.shape for each in wanted]
    for ours, exact, size in zip(found, wanted, case.summed_sizes(), strict=True):
        # What is rounded between the layers is off by up to 2^-9 of itself, and of nothing that cancels to less.
        assert gap(ours, exact) < 2**-7 or (ours - exact).norm() < 2**-8 * size
    assert gap(found[3], wanted[3]) < 1e-5  # of the bias between: it is never rounded


@in_both
@pytest.mark.parametrize("count", [1, 100, 128, 200, 4000])
def test_nothing_beyond_the_last_row_is_read_or_written(dtype, count):
    """Rows and what comes out lie in larger tensors of no numbers."""
    torch.manual_seed(0)
    case, width, hidden = Case(dtype, count, 24, 96), 24, 96
    alone = [each.detach() for each in case.found()]
    surrounded = torch.full((4, count + 256, width), torch.nan, dtype=dtype)
    x, probe, out, into = surrounded[:, 128:-128]
    x.copy_(case.x.detach())
    probe.copy_(case.probe)
    weights = case.first.detach().to(dtype), case.bias.detach(), case.second.detach().to(dtype)
    sizes = ctypes.c_int64(count), width, hidden, 2
    parts = kernel.library().mlp_parts(sizes[0])
    sums, bias_sums = torch.full((parts + 2, 2, 32, hidden), torch.nan), torch.full((parts + 2, hidden), torch.nan)
    forward, backward = (
        getattr(kernel.library(), f"mlp_{way}_{kernel.NAMES[dtype]}") for way in ("forward", "backward")
    )
    forward(*map(kernel.address, (x, *weights, out)), *sizes)
    backward(*map(kernel.address, (x, *weights, probe, into, sums[1:], bias_sums[1:])), *sizes)
    found = [out, into, sums[1:-1, 0].sum(0)[:width].T, bias_sums[1:-1].sum(0), sums[1:-1, 1].sum(0)[:width]]
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert surrounded[:, :128].isnan().all()
    assert surrounded[:, -128:].isnan().all()
    assert all(each[[0, -1]].isnan().all() for each in (sums, bias_sums))


@in_both
def test_threads_change_no_bit(dtype):
    torch.manual_seed(0)
    case, before, results = Case(dtype, 5000, 48, 192), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(case.found())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@needs_tiles
def test_products_of_pytorch_are_right_between_its_own():
    """Both set the shape of the processor's tiles."""
    torch.manual_seed(0)
    case, one, other = Case(HALF, 300, 24, 96), torch.randn(70, 130).to(HALF), torch.randn(130, 50).to(HALF)
    wanted, first = one @ other, case.found()
    for _ in range(3):
        assert torch.equal(one @ other, wanted)
        assert all(torch.equal(now, before) for now, before in zip(case.found(), first, strict=True))


@in_both
def test_no_number_stays_no_number_in_its_row_alone(dtype):
    case = Case(dtype, 40, 24, 96)
    with torch.no_grad():
        case.x[7, 3] = torch.nan
    out = MlpKernel.apply(*case.trained, dtype, True)
    assert out[7].isnan().all()
    assert torch.cat([out[:7], out[8:]]).isfinite().all()


def run(module: MLP, x: Tensor, normalised: Tensor, factors: Tensor | None) -> tuple[list[Tensor], set[str]]:
    """What comes out of a step in the precision of what goes in, with all gradients, and what ran."""
    given_ = [x.requires_grad_(), normalised.requires_grad_(), *module.parameters()]
    with profile() as record, torch.autocast("cpu", dtype=HALF, enabled=normalised.dtype == HALF):
        out = module(*given_[:2], factors)
    gradients = torch.autograd.grad(out.float().square().sum(), given_)
    return [out, *gradients], {event.key for event in record.key_averages()}


@pytest.mark.parametrize(
    ("stream", "dtype", "within"),
    [
        pytest.param(SINGLE, SINGLE, 1e-6, marks=needs_kernel),
        pytest.param(SINGLE, HALF, 2**-6, marks=needs_tiles),
        pytest.param(HALF, HALF, 2**-6, marks=needs_tiles),
    ],
)
@pytest.mark.parametrize("dropping", [False, True])
def test_a_step_is_the_same_with_and_without(monkeypatch, stream, dtype, within, dropping):
    torch.manual_seed(0)
    module, factors = MLP(48, 192), torch.tensor([1.25, 0.0, 1.25]) if dropping else None
    given_ = torch.randn(3, 6, 5, 4, 48).to(stream), torch.randn(3, 6, 5, 4, 48).to(dtype), factors
    found, ran = run(module, *given_)
    monkeypatch.setattr(MLP, "_fuses", lambda *_: False)
    wanted, others = run(module, *given_)
    assert "MlpKernel" in ran
    assert "MlpKernel" not in others
    assert [each.dtype for each in found] == [each.dtype for each in wanted]
    assert max(gap(one, other) for one, other in zip(found, wanted, strict=True)) < within


@in_both
@pytest.mark.parametrize(
    ("width", "hidden", "trains", "fused"),
    [
        (24, 96, True, "both"),
        (96, 384, True, "both"),
        (192, 768, True, "none"),  # PyTorch is faster there
        (192, 768, False, "bfloat16"),
        (384, 1536, False, "none"),
        (15, 96, True, "none"),
        (18, 96, True, "bfloat16"),
        (24, 90, True, "none"),
    ],
)
def test_it_runs_where_it_is_right_and_faster(dtype, width, hidden, trains, fused):
    x = torch.randn(2, 9, width).to(dtype)
    with profile() as record, torch.autocast("cpu", HALF, enabled=dtype == HALF), torch.set_grad_enabled(trains):
        MLP(width, hidden)(x, x, None)
    ran = "MlpKernel" in {event.key for event in record.key_averages()}
    assert ran == (fused in ("both", kernel.NAMES[dtype]))


@in_both
def test_no_rows_at_all_are_no_fault(dtype):
    case = Case(dtype, 0, 24, 96)
    out, into, *weights = case.found()
    assert out.shape == into.shape == (0, 24)
    assert not any(each.any() for each in weights)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_layers_that_somebody_waits_for_are_called(dtype):
    module, called = MLP(24, 96), []
    for layer in (module.linear1, module.linear2):
        layer.register_forward_pre_hook(lambda layer, _: called.append(layer))
    x = torch.randn(2, 9, 24).to(dtype)
    with torch.autocast("cpu", HALF, enabled=dtype == HALF):
        module(x, x, None)
    assert called == [module.linear1, module.linear2]


class Wrapped(torch.nn.Linear):
    """In place of a linear layer, without weights of its own."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.layer, self.called = layer, 0
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """What the layer does."""
        self.called += 1
        return self.layer(x)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("name", ["linear1", "linear2"])
def test_a_layer_in_place_of_another_is_called(name, dtype):
    module, x = MLP(24, 96), torch.randn(2, 9, 24).to(dtype)
    wrapped = Wrapped(getattr(module, name))
    setattr(module, name, wrapped)
    with torch.autocast("cpu", HALF, enabled=dtype == HALF):
        module(x, x, None)
    assert wrapped.called == 1


@pytest.mark.parametrize("name", ["linear1", "linear2"])
@pytest.mark.parametrize(("dtype", "of_weights"), [(HALF, SINGLE), (SINGLE, HALF), (SINGLE, torch.float64)])
def test_a_weight_of_another_precision_is_refused_where_nothing_casts_it(name, dtype, of_weights):
    module, x = MLP(24, 96), torch.randn(2, 9, 24).to(dtype)
    for each in (module.linear1, module.linear2):
        each.weight = torch.nn.Parameter(each.weight.to(dtype))
    odd = getattr(module, name)
    odd.weight = torch.nn.Parameter(odd.weight.to(of_weights))
    with pytest.raises(RuntimeError, match="dtype"):
        module(x, x, None)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("name", "sizes"), [("linear1", (48, 96)), ("linear1", (16, 96)), ("linear2", (64, 24))])
def test_layers_that_do_not_fit_together_are_refused(dtype, name, sizes):
    module, x = MLP(24, 96), torch.randn(2, 9, 24).to(dtype)
    setattr(module, name, torch.nn.Linear(*sizes))
    with torch.autocast("cpu", HALF, enabled=dtype == HALF), pytest.raises(RuntimeError, match="shapes"):
        module(x, x, None)


class Another(torch.Tensor):
    """As weights that are kept in a form of their own are."""


@in_both
@pytest.mark.parametrize("name", ["linear1", "linear2"])
def test_weights_of_a_kind_of_their_own_are_left_to_pytorch(dtype, name):
    module, x = MLP(24, 96), torch.randn(2, 9, 24).to(dtype)
    layer = getattr(module, name)
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Another))
    with profile() as record, torch.autocast("cpu", HALF, enabled=dtype == HALF):
        module(x, x, None)
    assert "MlpKernel" not in {event.key for event in record.key_averages()}


@in_both
def test_frozen_weights_and_rows_that_do_not_lie_together(dtype):
    torch.manual_seed(0)
    case = Case(dtype, 300, 24, 96)
    wanted = case.found()
    apart = torch.randn(24, 600).to(dtype).T[::2].detach().copy_(case.x.detach()).requires_grad_()
    assert not apart.is_contiguous()
    out = MlpKernel.apply(apart, case.first.detach(), case.bias.detach(), case.second.detach(), dtype, True)
    (into,) = torch.autograd.grad((out * case.probe).sum(), apart)
    assert torch.equal(out, wanted[0])
    assert torch.equal(into, wanted[1])


def test_float32_is_not_rounded():
    torch.manual_seed(0)
    module, x, normalised = MLP(24, 96), torch.randn(2, 9, 24), torch.randn(2, 9, 24)
    exact = module.double()(x.double(), normalised.double(), None)
    assert gap(module.float()(x, normalised, None), exact) < 1e-6
