"""The attention half of a block in one kernel: norm, queries, keys and values, windows, projection, residual."""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dagman.nets.gpu import tiles
from dagman.nets.gpu.rows import norm_backward
from dagman.nets.gpu.tiles import (
    attention_gradient,
    attention_weights,
    bias_tile,
    matrix,
    normalised,
    places,
    product,
    vector,
)


@triton.jit
@no_type_check
def _unit(x, row, inside, C, CP, EPS):
    """The tokens of a window and their layer norm without affine, in float32."""
    column = tl.arange(0, CP)
    at = x + row[:, None] * C + column[None, :]
    value = tl.load(at, mask=inside[:, None] & (column < C)[None, :], other=0.0).to(tl.float32)
    unit, _ = normalised(value, (column < C)[None, :], C, EPS)
    return value, unit


@triton.jit
@no_type_check
def _linear(tokens, weight, bias, part, head, C, D, CP, DP, PRECISION):
    """Queries, keys or values (part 0, 1, 2) of a head."""
    first = part * C + head * D
    rows = matrix(weight, first, first + D, 0, C, DP, CP, C)
    made = product(tokens, tl.trans(rows), PRECISION) + vector(bias, first, D, DP)[None, :]
    return made.to(tokens.dtype)


@triton.jit
@no_type_check
def _forward(
    x, gamma, beta, qkv, qkv_bias, bias, proj, proj_bias, kept, out, X, Y, Z,
    SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr, HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CP: tl.constexpr, N: tl.constexpr,
    DROPS: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All heads of one window."""
    C: tl.constexpr = H * D
    column = tl.arange(0, CP)
    row, inside, side, item, first = places(tl.program_id(0), X, Y, Z, SX, SY, SZ, HX, HY, HZ, N)
    value, unit = _unit(x + first * C, row, inside, C, CP, EPS)
    scaled = unit * vector(gamma, 0, C, CP)[None, :] + vector(beta, 0, C, CP)[None, :]
    kind = qkv.dtype.element_ty
    tokens = tl.where(inside[:, None], scaled, 0.0).to(kind)
    added = tl.zeros([N, CP], dtype=tl.float32) + vector(proj_bias, 0, C, CP)[None, :]
    for head in range(H):
        query = _linear(tokens, qkv, qkv_bias, 0, head, C, D, CP, DP, PRECISION)
        key = _linear(tokens, qkv, qkv_bias, 1, head, C, D, CP, DP, PRECISION)
        content = _linear(tokens, qkv, qkv_bias, 2, head, C, D, CP, DP, PRECISION)
        pairs = bias_tile(bias, head, SX * SY * SZ, N)
        weights = attention_weights(query, key, pairs, side, SCALE, PRECISION)
        mixed = product(weights.to(kind), content, PRECISION).to(kind)
        onto = matrix(proj, 0, C, head * D, head * D + D, CP, DP, C)
        added += product(mixed, tl.trans(onto), PRECISION)
    if DROPS:
        added *= tl.load(kept + item)
    at = out + first * C + row[:, None] * C + column[None, :]
    tl.store(at, (value + added).to(out.dtype.element_ty), mask=inside[:, None] & (column < C)[None, :])


@triton.jit
@no_type_check
def _backward(
    x, gamma, beta, qkv, qkv_bias, bias, proj, kept, of_out,
    of_qkv, sum_qkv, sum_qkv_bias, sum_bias, sum_proj, count, X, Y, Z,
    SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr, HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CP: tl.constexpr, N: tl.constexpr,
    DROPS: tl.constexpr, EPS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of some windows: gradients of its queries, keys and values, and of its weights summed over them."""
    C: tl.constexpr = H * D
    TOKENS: tl.constexpr = SX * SY * SZ
    head, column, unit_of = tl.program_id(0) % H, tl.arange(0, CP), tl.arange(0, DP)
    token = tl.arange(0, N)
    kind = qkv.dtype.element_ty
    pairs = bias_tile(bias, head, TOKENS, N)
    onto = matrix(proj, 0, C, head * D, head * D + D, CP, DP, C)
    scale, offset = vector(gamma, 0, C, CP)[None, :], vector(beta, 0, C, CP)[None, :]
    over_query, over_key = tl.zeros([CP, DP], dtype=tl.float32), tl.zeros([CP, DP], dtype=tl.float32)
    over_content, over_proj = tl.zeros([CP, DP], dtype=tl.float32), tl.zeros([CP, DP], dtype=tl.float32)
    query_bias, key_bias = tl.zeros([DP], dtype=tl.float32), tl.zeros([DP], dtype=tl.float32)
    content_bias, over_pairs = tl.zeros([DP], dtype=tl.float32), tl.zeros([N, N], dtype=tl.float32)
    for window in range(tl.program_id(0) // H, count, tl.num_programs(0) // H):
        row, inside, side, item, first = places(window, X, Y, Z, SX, SY, SZ, HX, HY, HZ, N)
        _, unit = _unit(x + first * C, row, inside, C, CP, EPS)
        tokens = tl.where(inside[:, None], unit * scale + offset, 0.0).to(kind)
        query = _linear(tokens, qkv, qkv_bias, 0, head, C, D, CP, DP, PRECISION)
        key = _linear(tokens, qkv, qkv_bias, 1, head, C, D, CP, DP, PRECISION)
        content = _linear(tokens, qkv, qkv_bias, 2, head, C, D, CP, DP, PRECISION)
        weights = attention_weights(query, key, pairs, side, SCALE, PRECISION)
        at = of_out + first * C + row[:, None] * C + column[None, :]
        gradient = tl.load(at, mask=inside[:, None] & (column < C)[None, :], other=0.0).to(tl.float32)
        if DROPS:
            gradient *= tl.load(kept + item)
        gradient = gradient.to(kind)
        mixed = product(weights.to(kind), content, PRECISION).to(kind)
        over_proj += product(tl.trans(gradient), mixed, PRECISION)
        of_mixed = product(gradient, onto, PRECISION).to(kind)
        of_logits, of_query, of_key, of_content = attention_gradient(
            query, key, content, weights, of_mixed, SCALE, PRECISION
        )
        over_pairs += of_logits
        exists = (token < TOKENS)[:, None]
        query_bias += tl.sum(of_query, axis=0)
        key_bias += tl.sum(tl.where(exists, of_key, 0.0), axis=0)
        content_bias += tl.sum(tl.where(exists, of_content, 0.0), axis=0)
        of_query, of_key, of_content = of_query.to(kind), of_key.to(kind), of_content.to(kind)
        over_query += product(tl.trans(tokens), of_query, PRECISION)
        over_key += product(tl.trans(tokens), of_key, PRECISION)
        over_content += product(tl.trans(tokens), of_content, PRECISION)
        at = of_qkv + first * 3 * C + row[:, None] * (3 * C) + head * D + unit_of[None, :]
        real = inside[:, None] & (unit_of < D)[None, :]
        tl.store(at, of_query, mask=real)
        tl.store(at + C, of_key, mask=real)
        tl.store(at + 2 * C, of_content, mask=real)
    part, real = tl.program_id(0) // H, (column < C)[:, None] & (unit_of < D)[None, :]
    at = sum_qkv + part * 3 * C * C + (head * D + unit_of)[None, :] * C + column[:, None]
    tl.store(at, over_query, mask=real)
    tl.store(at + C * C, over_key, mask=real)
    tl.store(at + 2 * C * C, over_content, mask=real)
    tl.store(sum_proj + part * C * C + column[:, None] * C + (head * D + unit_of)[None, :], over_proj, mask=real)
    at = sum_qkv_bias + part * 3 * C + head * D + unit_of
    tl.store(at, query_bias, mask=unit_of < D)
    tl.store(at + C, key_bias, mask=unit_of < D)
    tl.store(at + 2 * C, content_bias, mask=unit_of < D)
    known = (token < TOKENS)[:, None] & (token < TOKENS)[None, :]
    at = sum_bias + tl.program_id(0) * TOKENS * TOKENS + token[:, None] * TOKENS + token[None, :]
    tl.store(at, over_pairs, mask=known)


class Shape(NamedTuple):
    """What is no tensor."""

    heads: int
    window: int
    shift: int
    eps: float


class _AttentionHalf(torch.autograd.Function):
    """x + kept * projection(window attention(norm(x))); backward computes everything between anew."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, qkv: Tensor, qkv_bias: Tensor, bias: Tensor,
        proj: Tensor, proj_bias: Tensor, kept: Tensor | None, shape: Shape,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, gamma, beta, qkv, qkv_bias, bias, proj, kept)
        ctx.shape = shape
        ctx.maps = tiles.windows(x.shape[0], (x.shape[1], x.shape[2], x.shape[3]), shape.window, shape.shift)
        out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, qkv.dtype))
        tiles.launch(
            _forward,
            ctx.maps.number,
            x.device,
            *(x, gamma, beta, qkv, qkv_bias, bias, proj, proj_bias, x if kept is None else kept, out),
            **_sizes(qkv, kept, ctx.maps, shape),
            warps=tiles.warps(x.shape[-1]),
        )
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, qkv, qkv_bias, bias, proj, kept = ctx.saved_tensors
        of_out, width, heads = gradient[0].contiguous(), x.shape[-1], ctx.shape.heads
        shared = tiles.programs(ctx.maps.number, x.device, beside=heads)
        of_qkv = qkv.new_empty(x.shape[:-1].numel(), 3 * width)
        sum_qkv, sum_qkv_bias = gamma.new_empty(shared, 3 * width, width), gamma.new_empty(shared, 3 * width)
        sum_bias, sum_proj = gamma.new_empty(shared, *bias.shape), gamma.new_empty(shared, width, width)
        tiles.launch(
            _backward,
            heads * shared,
            x.device,
            *(x, gamma, beta, qkv, qkv_bias, bias, proj, x if kept is None else kept, of_out),
            *(of_qkv, sum_qkv, sum_qkv_bias, sum_bias, sum_proj, ctx.maps.number),
            **_sizes(qkv, kept, ctx.maps, ctx.shape),
            warps=8,
        )
        of_x, of_gamma, of_beta, of_proj_bias = norm_backward(x, gamma, qkv, of_qkv, kept, of_out, ctx.shape.eps)
        return (
            of_x,
            of_gamma,
            of_beta,
            sum_qkv.sum(dim=0).to(qkv.dtype),
            sum_qkv_bias.sum(dim=0).to(qkv_bias.dtype),
            sum_bias.sum(dim=0),
            sum_proj.sum(dim=0).to(proj.dtype),
            of_proj_bias.to(qkv_bias.dtype),
            None,
            None,
        )


def _sizes(qkv: Tensor, kept: Tensor | None, maps: tiles.Windows, shape: Shape) -> dict[str, Any]:
    """What both kernels need to know about the map."""
    width = qkv.shape[1]
    head_width = width // shape.heads
    return {
        **maps.options,
        "H": shape.heads,
        "D": head_width,
        "DP": tiles.tile(head_width),
        "CP": tiles.tile(width),
        "DROPS": kept is not None,
        "EPS": shape.eps,
        "SCALE": head_width**-0.5,
        "PRECISION": tiles.precision(qkv),
    }


def attention_half(
    x: Tensor, norm: tuple[Tensor, Tensor], qkv: tuple[Tensor, Tensor], bias: Tensor, proj: tuple[Tensor, Tensor],
    kept: Tensor | None, shape: Shape,
) -> Tensor:  # fmt: skip
    """The half as one operation of autograd; norm and linear layers are (weight, bias)."""
    half: Tensor = _AttentionHalf.apply(x, *norm, *qkv, bias, *proj, kept, shape)  # type: ignore[no-untyped-call]
    return half
