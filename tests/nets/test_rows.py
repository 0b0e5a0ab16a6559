"""The compiled residual sum, LayerNorm and GELU against the same written out in float64."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.profiler import profile

from dagman.nets import kernel, rows
from dagman.nets.rows import LayerNorm

needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="the kernels were not compiled here")


def gap(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-9)).item()


def norm(width: int) -> LayerNorm:
    module = LayerNorm(width)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    return module


def exactly(module: LayerNorm, x: Tensor, probe: Tensor) -> list[Tensor]:
    """What comes out and all gradients, in float64."""
    given_ = [value.detach().double().requires_grad_() for value in (x, module.weight, module.bias)]
    out = functional.layer_norm(given_[0], module.normalized_shape, *given_[1:], module.eps)
    return [out, *torch.autograd.grad((out * probe.double()).sum(), given_)]


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_kernel), False])
def test_gradients_of_bfloat16_are_summed_in_float32(compiled, monkeypatch):
    """Over a million tokens' worth of rounding, a sum in bfloat16 stands still."""
    if not compiled:
        monkeypatch.setattr(kernel, "library", lambda: None)
    torch.manual_seed(0)
    module, x = norm(48), torch.randn(30_000, 48).bfloat16().requires_grad_()
    probe = torch.randn(30_000, 48).bfloat16() + 0.5
    found = torch.autograd.grad((module(x) * probe).float().sum(), [x, module.weight, module.bias])
    for ours, exact in zip(found, exactly(module, x, probe)[1:], strict=True):
        assert gap(ours, exact) < 5e-3


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    count=st.one_of(st.integers(1, 200), st.just(3000)),
    width=st.one_of(st.integers(6, 70), st.sampled_from([96, 192, 768, 1536])),
    offset=st.sampled_from([0.0, 5.0]),
    seed=st.integers(0, 2**16),
)
def test_layer_norm_and_all_its_gradients_equal_float64(count, width, offset, seed):
    torch.manual_seed(seed)
    module, x = norm(width), (torch.randn(count, width) + offset).requires_grad_()
    probe, out = torch.randn(count, width), module(x)
    found = [out, *torch.autograd.grad((out * probe).sum(), [x, module.weight, module.bias])]
    for ours, exact in zip(found, exactly(module, x, probe), strict=True):
        assert gap(ours, exact) < 1e-5


@needs_kernel
@pytest.mark.parametrize("width", [24, 48, 100])
def test_bfloat16_is_rounded_only_at_the_door(width):
    torch.manual_seed(0)
    module, x = norm(width), torch.randn(500, width).bfloat16().requires_grad_()
    probe, out = torch.randn(500, width).bfloat16(), module(x)
    found = [out, *torch.autograd.grad((out * probe).sum(), [x, module.weight, module.bias])]
    assert [value.dtype for value in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    exact = exactly(module, x, probe)
    assert max(gap(ours, wanted) for ours, wanted in zip(found[:2], exact[:2], strict=True)) < 2**-8
    assert max(gap(ours, wanted) for ours, wanted in zip(found[2:], exact[2:], strict=True)) < 1e-5


def linear(width: int, outputs: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(width, outputs)
    torch.nn.init.normal_(layer.bias)
    return layer


@needs_kernel
@settings(deadline=None, max_examples=40)
@given(
    count=st.one_of(st.integers(1, 200), st.just(3000)),
    outputs=st.one_of(st.integers(1, 70), st.sampled_from([96, 768])),
    seed=st.integers(0, 2**16),
)
def test_gelu_of_a_layer_and_all_its_gradients_equal_float64(count, outputs, seed):
    torch.manual_seed(seed)
    layer, x, probe = linear(8, outputs), (torch.randn(count, 8) * 4).requires_grad_(), torch.randn(count, outputs)
    exact = [value.detach().double().requires_grad_() for value in (x, layer.weight, layer.bias)]
    out, wanted = rows.linear_gelu(x, layer), functional.gelu(functional.linear(*exact))
    found = torch.autograd.grad((out * probe).sum(), [x, layer.weight, layer.bias])
    gradients = torch.autograd.grad((wanted * probe).sum(), exact)
    assert (out - wanted).abs().max() < 1e-5
    for ours, gradient in zip(found, gradients, strict=True):
        assert (ours - gradient).abs().max() < 1e-5 * gradient.abs().max().clamp_min(1.0)


@needs_kernel
@pytest.mark.parametrize("count", [1, 15, 16, 17, 4099])
def test_gelu_alone_equals_float64(count):
    torch.manual_seed(count)
    x, bias, probe = torch.randn(3, count) * 4, torch.zeros(count), torch.randn(3, count)
    for dtype, within in ((torch.float32, 2e-6), (torch.bfloat16, None)):
        given_, exact = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
        out, wanted = rows.BiasGelu.apply(given_, bias), functional.gelu(exact)
        (slope,) = torch.autograd.grad((out * probe.to(dtype)).sum(), given_)
        (steep,) = torch.autograd.grad((wanted * probe.to(dtype).double()).sum(), exact)
        assert out.dtype == slope.dtype == dtype
        for ours, right in ((out, wanted), (slope, steep)):
            assert gap(ours, right) < 2**-8 if within is None else (ours - right).abs().max() < within


@needs_kernel
def test_gelu_far_out_is_the_identity_or_nothing():
    x = torch.tensor([-1e30, -40.0, -13.0, 0.0, 13.0, 40.0, 1e30]).requires_grad_()
    out = rows.BiasGelu.apply(x, torch.zeros(7))
    (slope,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, torch.tensor([0.0, 0.0, 0.0, 0.0, 13.0, 40.0, 1e30]))
    assert torch.allclose(slope, torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0]), atol=1e-6)


@needs_kernel
def test_no_number_stays_no_number():
    x = torch.full((4, 24), torch.nan, requires_grad=True)
    out = norm(24)(x)
    assert out.isnan().all()
    out = rows.BiasGelu.apply(x, torch.zeros(24))
    assert out.isnan().all()
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert slope.isnan().all()


@needs_kernel
def test_threads_change_no_bit():
    torch.manual_seed(0)
    module, layer, x = norm(24), linear(24, 40), torch.randn(5000, 24, requires_grad=True)
    layer.weight.data = torch.eye(24).repeat(2, 1)[:40]  # a product that no processor rounds
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = rows.linear_gelu(module(x), layer)
            results.append([out, *torch.autograd.grad(out.square().sum(), [x, module.weight, module.bias, layer.bias])])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_the_kernel_runs_where_it_can_and_pytorch_elsewhere():
    for x, ran in ((torch.randn(9, 24), kernel.library() is not None), (torch.randn(9, 24).double(), False)):
        module = norm(24).to(x.dtype)
        with profile() as record:
            rows.linear_gelu(module(x), linear(24, 5).to(x.dtype)).sum().backward()
        names = {event.key for event in record.key_averages()}
        assert {"Residual", "BiasGelu"} <= names if ran else not {"Residual", "BiasGelu"} & names


def test_it_computes_the_same_with_and_without(monkeypatch):
    torch.manual_seed(0)
    module, layer, x = norm(48), linear(48, 20), torch.randn(2, 3, 4, 48).transpose(0, 1).requires_grad_()
    results = []
    for _ in range(2):
        out = rows.linear_gelu(module(x), layer)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, module.weight, module.bias, layer.bias])])
        monkeypatch.setattr(kernel, "library", lambda: None)
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        assert gap(one, other) < 1e-5


class Joined:
    """A stream, a branch that joins it, and what is expected of it, in float64."""

    def __init__(self, items: int, tokens: int, width: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        stream, branch = dtypes
        self.x = (torch.randn(items, tokens, width) + 2).to(stream).requires_grad_()
        self.mixed = torch.randn(items, tokens, 8).to(branch).requires_grad_()
        self.layer, self.next = linear(8, width), norm(width)
        self.factors = torch.rand(items)
        self.probes = torch.randn(items, tokens, width).to(stream), torch.randn(items, tokens, width).to(branch)
        self.autocast = torch.autocast("cpu", enabled=branch == HALF)
        self.trained = [self.x, self.mixed, *self.layer.parameters(), *self.next.parameters()]

    def found(self, *, dropping: bool, norm: bool) -> list[Tensor]:
        """What comes out and all gradients."""
        factors = self.factors if dropping else None
        with self.autocast:
            if norm:
                out = rows.join_and_branch_off(self.x, self.mixed, self.layer, factors, self.next)
            else:
                out = (rows.join(self.x, self.mixed, self.layer, factors),)
        total = sum((each * probe).sum() for each, probe in zip(out, self.probes, strict=False))
        return [*out, *torch.autograd.grad(total, self.trained[: 6 if norm else 4])]

    def wanted(self, *, dropping: bool, norm: bool) -> list[Tensor]:
        """The same in float64."""
        x, mixed, weight, bias, *of_norm = exact = [each.detach().double().requires_grad_() for each in self.trained]
        branch = functional.linear(mixed, weight, bias)
        out = [x + (branch * self.factors.double()[:, None, None] if dropping else branch)]
        if norm:
            out.append(functional.layer_norm(out[0], out[0].shape[-1:], *of_norm, self.next.eps))
        total = sum((each * probe.double()).sum() for each, probe in zip(out, self.probes, strict=False))
        return [*out, *torch.autograd.grad(total, exact[: 6 if norm else 4])]


SINGLE, HALF = torch.float32, torch.bfloat16


@needs_kernel
@settings(deadline=None, max_examples=60)
@given(
    items=st.integers(1, 9),
    tokens=st.one_of(st.integers(1, 60), st.just(700)),
    width=st.one_of(st.integers(6, 70), st.sampled_from([96, 192, 768])),
    dropping=st.booleans(),
    norm=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_joined_branches_and_all_their_gradients_equal_float64(items, tokens, width, dropping, norm, seed):
    torch.manual_seed(seed)
    joined = Joined(items, tokens, width, (SINGLE, SINGLE))
    found, wanted = joined.found(dropping=dropping, norm=norm), joined.wanted(dropping=dropping, norm=norm)
    assert len(found) == len(wanted)
    assert max(gap(ours, exact) for ours, exact in zip(found, wanted, strict=True)) < 1e-5


@needs_kernel
@pytest.mark.parametrize("dtypes", [(HALF, HALF), (SINGLE, HALF)])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width", [24, 100])
def test_joined_branches_in_bfloat16(dtypes, dropping, norm, width):
    torch.manual_seed(0)
    joined = Joined(3, 50, width, dtypes)
    found, wanted = joined.found(dropping=dropping, norm=norm), joined.wanted(dropping=dropping, norm=norm)
    kinds = [dtypes[0], *([HALF] if norm else []), *dtypes, *[SINGLE] * (4 if norm else 2)]
    assert [each.dtype for each in found] == kinds
    assert max(gap(ours, exact) for ours, exact in zip(found, wanted, strict=True)) < 2**-7  # products round too


@needs_kernel
@pytest.mark.parametrize("norm", [False, True])
def test_a_branch_joins_with_and_without_the_kernel_alike(monkeypatch, norm):
    torch.manual_seed(0)
    joined, results = Joined(4, 30, 24, (SINGLE, SINGLE)), []
    for _ in range(2):
        results.append(joined.found(dropping=True, norm=norm))
        monkeypatch.setattr(kernel, "library", lambda: None)
    assert max(gap(one, other) for one, other in zip(*results, strict=True)) < 1e-5


@needs_kernel
def test_a_stream_branches_off_with_the_sum_of_both_gradients():
    torch.manual_seed(0)
    module, x, probes = norm(24), torch.randn(5, 7, 24, requires_grad=True), torch.randn(2, 5, 7, 24)
    for used in ((0, 1), (0,), (1,)):
        out, exact = rows.branch_off(x, module), x.detach().double().requires_grad_()
        layer = functional.layer_norm(exact, (24,), module.weight.double(), module.bias.double(), module.eps)
        assert torch.equal(out[0], x)
        (found,) = torch.autograd.grad(sum((out[i] * probes[i]).sum() for i in used), x)
        (wanted,) = torch.autograd.grad(sum(((exact, layer)[i] * probes[i].double()).sum() for i in used), exact)
        assert gap(found, wanted) < 1e-5


@needs_kernel
@pytest.mark.parametrize("dtypes", [(SINGLE, SINGLE), (HALF, HALF), (SINGLE, HALF)])
def test_threads_change_no_bit_of_a_joined_branch(dtypes):
    torch.manual_seed(0)
    joined, before, results = Joined(4, 900, 24, dtypes), torch.get_num_threads(), []
    branch = torch.randn(4, 900, 24).to(dtypes[1]).requires_grad_()
    wanted = [joined.x, branch, joined.layer.bias, *joined.next.parameters()]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = rows.Residual.apply(*wanted[:3], joined.factors, *joined.next.parameters(), 1e-5, True)
            total = sum((each * probe).sum() for each, probe in zip(out, joined.probes, strict=True))
            results.append([*out, *torch.autograd.grad(total, wanted)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_float64_joins_in_pytorch():
    joined = Joined(2, 9, 24, (torch.float64, torch.float64))
    joined.layer.double()
    with profile() as record:
        out = rows.join(joined.x, joined.mixed, joined.layer, joined.factors.double())
    assert out.dtype == torch.float64
    assert "Residual" not in {event.key for event in record.key_averages()}


@pytest.mark.parametrize(
    ("shape", "outputs", "factors"), [((4, 7), 16, 4), ((2, 7), 24, 4), ((4, 7), 24, 3), ((4, 7), 24, 40)]
)
def test_what_does_not_fit_is_refused_and_never_read(shape, outputs, factors):
    x, mixed = torch.randn(4, 7, 24), torch.randn(*shape, 8)
    unchecked = inspect.unwrap(rows.join)  # as in use; tests check the annotations of shapes
    with pytest.raises(RuntimeError):
        unchecked(x, mixed, linear(8, outputs), torch.rand(factors))


def test_a_branch_of_one_item_joins_every_item_as_in_pytorch():
    x, mixed, layer = torch.randn(4, 7, 24), torch.randn(1, 7, 8), linear(8, 24)
    torch.testing.assert_close(inspect.unwrap(rows.join)(x, mixed, layer, None), x + layer(mixed))


def test_no_item_joins_nothing():
    out = rows.join_and_branch_off(torch.randn(0, 7, 24), torch.randn(0, 7, 8), linear(8, 24), torch.rand(0), norm(24))
    assert [tuple(each.shape) for each in out] == [(0, 7, 24)] * 2


@needs_kernel
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_nothing(default):
    torch.manual_seed(0)
    joined = Joined(3, 50, 24, (SINGLE, SINGLE))
    plain = joined.found(dropping=True, norm=True)
    torch.set_default_dtype(default)
    try:
        again = joined.found(dropping=True, norm=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_layers_that_somebody_waits_for_are_called():
    joined, called = Joined(2, 9, 24, (SINGLE, SINGLE)), []
    for module in (joined.layer, joined.next):
        module.register_forward_pre_hook(lambda module, _: called.append(module))
    rows.join_and_branch_off(joined.x, joined.mixed, joined.layer, None, joined.next)
    rows.branch_off(joined.x, joined.next)
    rows.linear_gelu(joined.mixed, joined.layer)
    assert called == [joined.layer, joined.next, joined.next, joined.layer]


@pytest.mark.parametrize("used", [0, 1])
def test_a_norm_that_nobody_uses_has_no_gradient(used):
    joined = Joined(2, 9, 24, (SINGLE, SINGLE))
    rows.join_and_branch_off(joined.x, joined.mixed, joined.layer, None, joined.next)[used].sum().backward()
    assert [parameter.grad is None for parameter in joined.next.parameters()] == [used == 0] * 2
    assert joined.layer.bias.grad is not None
