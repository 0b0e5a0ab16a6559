"""The MLP half of a block, and what the backward passes of both halves end with."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dagman.nets.gpu import tiles
from dagman.nets.gpu.tiles import matrix, normalised, product, vector


@triton.jit
@no_type_check
def _block(x, first, last, C, M, CP):
    """M rows of a matrix of C columns in float32, with their numbers and which places are real."""
    row, column = tl.arange(0, M), tl.arange(0, CP)
    real = (first + row < last)[:, None] & (column < C)[None, :]
    at = tl.cast(first, tl.int64) * C + (row[:, None] * C + column[None, :])
    return tl.load(x + at, mask=real, other=0.0).to(tl.float32), at, real


@triton.jit
@no_type_check
def _density(x):
    """Of the normal distribution."""
    return 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
@no_type_check
def _share(x):
    """Of the normal distribution that lies below x: GELU(x) is x times this."""
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
@no_type_check
def _forward(
    x, gamma, beta, weight1, bias1, weight2, bias2, kept, out, rows, each,
    C: tl.constexpr, HIDDEN: tl.constexpr, CP: tl.constexpr, HP: tl.constexpr, M: tl.constexpr,
    DROPS: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Norm, both linear layers and the residual of a block of rows."""
    first, column = tl.program_id(0) * M, tl.arange(0, CP)
    value, at, real = _block(x, first, rows, C, M, CP)
    unit, _ = normalised(value, (column < C)[None, :], C, EPS)
    kind = weight1.dtype.element_ty
    scaled = (unit * vector(gamma, 0, C, CP)[None, :] + vector(beta, 0, C, CP)[None, :]).to(kind)
    mixed = tl.zeros([M, CP], dtype=tl.float32) + vector(bias2, 0, C, CP)[None, :]
    for start in range(0, HIDDEN, HP):
        inner = matrix(weight1, start, HIDDEN, 0, C, HP, CP, C)
        before = product(scaled, tl.trans(inner), PRECISION)
        before = (before + vector(bias1, start, HIDDEN - start, HP)[None, :]).to(kind).to(tl.float32)
        after = (before * _share(before)).to(kind)
        outer = matrix(weight2, 0, C, start, HIDDEN, CP, HP, HIDDEN)
        mixed += product(after, tl.trans(outer), PRECISION)
    if DROPS:
        row = first + tl.arange(0, M)
        mixed *= tl.load(kept + row // each, mask=row < rows, other=0.0)[:, None]
    tl.store(out + at, (value + mixed).to(out.dtype.element_ty), mask=real)


@triton.jit
@no_type_check
def _hidden_backward(
    x, gamma, beta, weight1, bias1, weight2, kept, of_out, of_hidden, of_weight1, of_bias1, of_weight2, rows, each,
    C: tl.constexpr, HIDDEN: tl.constexpr, CP: tl.constexpr, HP: tl.constexpr, M: tl.constexpr,
    DROPS: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """HP hidden units of some blocks of rows: the gradient of each unit, and of the weights summed over the rows."""
    PARTS: tl.constexpr = (HIDDEN + HP - 1) // HP
    start, column, unit_of = tl.program_id(0) % PARTS * HP, tl.arange(0, CP), tl.arange(0, HP)
    known = (column < C)[None, :]
    scale, offset = vector(gamma, 0, C, CP)[None, :], vector(beta, 0, C, CP)[None, :]
    inner = matrix(weight1, start, HIDDEN, 0, C, HP, CP, C)
    outer = matrix(weight2, 0, C, start, HIDDEN, CP, HP, HIDDEN)
    bias = vector(bias1, start, HIDDEN - start, HP)[None, :]
    kind = weight1.dtype.element_ty
    sum1, sum2 = tl.zeros([HP, CP], dtype=tl.float32), tl.zeros([CP, HP], dtype=tl.float32)
    sum_bias = tl.zeros([HP], dtype=tl.float32)
    for block in range(tl.program_id(0) // PARTS, tl.cdiv(rows, M), tl.num_programs(0) // PARTS):
        row = block * M + tl.arange(0, M)
        value, _, _ = _block(x, block * M, rows, C, M, CP)
        gradient, _, _ = _block(of_out, block * M, rows, C, M, CP)
        if DROPS:
            gradient *= tl.load(kept + row // each, mask=row < rows, other=0.0)[:, None]
        mixed = gradient.to(kind)
        unit, _ = normalised(value, known, C, EPS)
        scaled = (unit * scale + offset).to(kind)
        before = (product(scaled, tl.trans(inner), PRECISION) + bias).to(kind).to(tl.float32)
        share = _share(before)
        of_after = product(mixed, outer, PRECISION)
        of_before = of_after * (share + before * _density(before))
        rounded = of_before.to(kind)
        sum1 += product(tl.trans(rounded), scaled, PRECISION)
        sum2 += product(tl.trans(mixed), (before * share).to(kind), PRECISION)
        sum_bias += tl.sum(of_before, axis=0)
        at = row.to(tl.int64)[:, None] * HIDDEN + start + unit_of[None, :]
        tl.store(of_hidden + at, rounded, mask=(row < rows)[:, None] & (start + unit_of < HIDDEN)[None, :])
    real = start + unit_of < HIDDEN
    part = tl.program_id(0) // PARTS
    at = part * HIDDEN * C + (start + unit_of)[:, None] * C + column[None, :]
    tl.store(of_weight1 + at, sum1, mask=real[:, None] & known)
    at = part * HIDDEN * C + column[:, None] * HIDDEN + start + unit_of[None, :]
    tl.store(of_weight2 + at, sum2, mask=(column < C)[:, None] & real[None, :])
    tl.store(of_bias1 + part * HIDDEN + start + unit_of, sum_bias, mask=real)


@triton.jit
@no_type_check
def _norm_backward(
    x, gamma, weight, of_linear, kept, of_out, of_x, of_gamma, of_beta, of_bias, rows, each,
    C: tl.constexpr, K: tl.constexpr, CP: tl.constexpr, KP: tl.constexpr, M: tl.constexpr,
    DROPS: tl.constexpr, EPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of the first linear layer's output, through the layer and the norm, to that of the input."""
    column = tl.arange(0, CP)
    known, scale = (column < C)[None, :], vector(gamma, 0, C, CP)[None, :]
    sum_gamma, sum_beta = tl.zeros([CP], dtype=tl.float32), tl.zeros([CP], dtype=tl.float32)
    sum_bias = tl.zeros([CP], dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, M), tl.num_programs(0)):
        row = block * M + tl.arange(0, M)
        value, at, real = _block(x, block * M, rows, C, M, CP)
        gradient, _, _ = _block(of_out, block * M, rows, C, M, CP)
        of_scaled = tl.zeros([M, CP], dtype=tl.float32)
        for start in range(0, K, KP):
            k = start + tl.arange(0, KP)
            there = row.to(tl.int64)[:, None] * K + k[None, :]
            part = tl.load(of_linear + there, mask=(row < rows)[:, None] & (k < K)[None, :], other=0.0)
            of_scaled += product(part, matrix(weight, start, K, 0, C, KP, CP, C), PRECISION)
        unit, inverse = normalised(value, known, C, EPS)
        of_unit = of_scaled * scale
        along = tl.sum(of_unit * unit, axis=1) / C
        of_value = inverse[:, None] * (of_unit - (tl.sum(of_unit, axis=1) / C)[:, None] - unit * along[:, None])
        tl.store(of_x + at, (gradient + of_value).to(of_x.dtype.element_ty), mask=real)
        sum_gamma += tl.sum(of_scaled * unit, axis=0)
        sum_beta += tl.sum(of_scaled, axis=0)
        if DROPS:
            gradient *= tl.load(kept + row // each, mask=row < rows, other=0.0)[:, None]
        sum_bias += tl.sum(gradient, axis=0)
    at = tl.program_id(0) * C + column
    tl.store(of_gamma + at, sum_gamma, mask=column < C)
    tl.store(of_beta + at, sum_beta, mask=column < C)
    tl.store(of_bias + at, sum_bias, mask=column < C)


def norm_backward(
    x: Tensor, gamma: Tensor, weight: Tensor, of_linear: Tensor, kept: Tensor | None, of_out: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the norm's weight and bias, and of the bias of the half's last linear layer.

    Args:
        x: Input of the half, (batch, x, y, z, width).
        gamma: Weight of its norm.
        weight: Of the linear layer after the norm, (units, width).
        of_linear: Gradient of that layer's output.
        kept: What the half's result was multiplied by before it was added, for each map.
        of_out: Gradient of the half's output.
        eps: Of the norm.
    """
    width, rows = x.shape[-1], x.shape[:-1].numel()
    shared = tiles.programs(triton.cdiv(rows, tiles.ROWS), x.device, beside=1)
    of_x = torch.empty_like(x)
    sums = torch.empty(3, shared, width, dtype=torch.float32, device=x.device)
    tiles.launch(
        _norm_backward,
        shared,
        x.device,
        *(x, gamma, weight, of_linear, x if kept is None else kept, of_out, of_x, *sums, rows, rows // len(x)),
        C=width,
        K=len(weight),
        CP=tiles.tile(width),
        KP=64,
        M=tiles.ROWS,
        DROPS=kept is not None,
        EPS=eps,
        PRECISION=tiles.precision(weight),
        warps=tiles.warps(width),
    )
    of_gamma, of_beta, of_bias = sums.sum(dim=1)
    return of_x, of_gamma, of_beta, of_bias


class _MLPHalf(torch.autograd.Function):
    """x + kept * MLP(norm(x)); backward computes the hidden units anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor,
        bias2: Tensor, kept: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, gamma, beta, weight1, bias1, weight2, kept)
        ctx.eps, rows = eps, x.shape[:-1].numel()
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight1.dtype))
        tiles.launch(
            _forward,
            triton.cdiv(rows, tiles.ROWS),
            x.device,
            *(x, gamma, beta, weight1, bias1, weight2, bias2, x if kept is None else kept, out, rows, rows // len(x)),
            **_sizes(weight1, kept, eps),
            warps=tiles.warps(x.shape[-1]),
        )
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight1, bias1, weight2, kept = ctx.saved_tensors
        of_out, rows, sizes = gradient[0].contiguous(), x.shape[:-1].numel(), _sizes(weight1, kept, ctx.eps)
        hidden, width = weight1.shape
        parts = triton.cdiv(hidden, sizes["HP"])
        shared = tiles.programs(triton.cdiv(rows, tiles.ROWS), x.device, beside=parts)
        of_hidden = weight1.new_empty(rows, hidden)
        of_weight1, of_weight2 = gamma.new_empty(2, shared, hidden * width)
        of_bias1 = gamma.new_empty(shared, hidden)
        tiles.launch(
            _hidden_backward,
            parts * shared,
            x.device,
            *(x, gamma, beta, weight1, bias1, weight2, x if kept is None else kept, of_out),
            *(of_hidden, of_weight1, of_bias1, of_weight2, rows, rows // len(x)),
            **sizes,
            warps=8,
        )
        of_x, of_gamma, of_beta, of_bias2 = norm_backward(x, gamma, weight1, of_hidden, kept, of_out, ctx.eps)
        of_weight1 = of_weight1.sum(dim=0).view(hidden, width).to(weight1.dtype)
        of_weight2 = of_weight2.sum(dim=0).view(width, hidden).to(weight2.dtype)
        of_bias1 = of_bias1.sum(dim=0).to(bias1.dtype)
        return of_x, of_gamma, of_beta, of_weight1, of_bias1, of_weight2, of_bias2.to(bias1.dtype), None, None


def _sizes(weight1: Tensor, kept: Tensor | None, eps: float) -> dict[str, Any]:
    """What both kernels need to know about the MLP."""
    hidden, width = weight1.shape
    return {
        "C": width,
        "HIDDEN": hidden,
        "CP": tiles.tile(width),
        "HP": min(64, tiles.tile(hidden)),
        "M": tiles.ROWS,
        "DROPS": kept is not None,
        "EPS": eps,
        "PRECISION": tiles.precision(weight1),
    }


def mlp_half(
    x: Tensor, norm: tuple[Tensor, Tensor], linear1: tuple[Tensor, Tensor], linear2: tuple[Tensor, Tensor],
    kept: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """The half as one operation of autograd; norm and linear layers are (weight, bias)."""
    half: Tensor = _MLPHalf.apply(x, *norm, *linear1, *linear2, kept, eps)  # type: ignore[no-untyped-call]
    return half
