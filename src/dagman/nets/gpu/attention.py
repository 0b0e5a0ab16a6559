"""Attention within (shifted) windows from the map of queries, keys and values to the map of what they mix."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from dagman.nets.gpu import tiles
from dagman.nets.gpu.tiles import attention_gradient, attention_weights, bias_tile, places, product


@triton.jit
@no_type_check
def _heads(qkv, pad, row, inside, head, part, H, D, DP, PADDED):
    """Query, key or value (part 0, 1, 2) of a head; tokens that the map has not are what a zero token gives."""
    column = tl.arange(0, DP)
    first = (part * H + head) * D
    at = qkv + row[:, None] * (3 * H * D) + first + column[None, :]
    value = tl.load(at, mask=inside[:, None] & (column < D)[None, :], other=0.0)
    if PADDED:
        of_zero = tl.load(pad + first + column, mask=column < D, other=0.0)
        value = tl.where(inside[:, None], value, of_zero[None, :])
    return value


@triton.jit
@no_type_check
def _forward(
    qkv, pad, bias, out, count, X, Y, Z,
    SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr, HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    PADDED: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of some windows."""
    head, column = tl.program_id(0) % H, tl.arange(0, DP)
    added = bias_tile(bias, head, SX * SY * SZ, N)
    for window in range(tl.program_id(0) // H, count, tl.num_programs(0) // H):
        row, inside, side, _, first = places(window, X, Y, Z, SX, SY, SZ, HX, HY, HZ, N)
        query = _heads(qkv + first * 3 * H * D, pad, row, inside, head, 0, H, D, DP, PADDED)
        key = _heads(qkv + first * 3 * H * D, pad, row, inside, head, 1, H, D, DP, PADDED)
        value = _heads(qkv + first * 3 * H * D, pad, row, inside, head, 2, H, D, DP, PADDED)
        weights = attention_weights(query, key, added, side, SCALE, PRECISION)
        mixed = product(weights.to(value.dtype), value, PRECISION)
        at = out + first * H * D + row[:, None] * (H * D) + head * D + column[None, :]
        tl.store(at, mixed.to(out.dtype.element_ty), mask=inside[:, None] & (column < D)[None, :])


@triton.jit
@no_type_check
def _backward(
    qkv, pad, bias, of_out, of_qkv, of_pad, of_bias, count, X, Y, Z,
    SX: tl.constexpr, SY: tl.constexpr, SZ: tl.constexpr, HX: tl.constexpr, HY: tl.constexpr, HZ: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    PADDED: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head of some windows; the bias's gradient is summed over them here and written once."""
    head, column, token = tl.program_id(0) % H, tl.arange(0, DP), tl.arange(0, N)
    TOKENS: tl.constexpr = SX * SY * SZ
    added = bias_tile(bias, head, TOKENS, N)
    sum_bias = tl.zeros([N, N], dtype=tl.float32)
    sum_key, sum_value = tl.zeros([DP], dtype=tl.float32), tl.zeros([DP], dtype=tl.float32)
    for window in range(tl.program_id(0) // H, count, tl.num_programs(0) // H):
        row, inside, side, _, first = places(window, X, Y, Z, SX, SY, SZ, HX, HY, HZ, N)
        query = _heads(qkv + first * 3 * H * D, pad, row, inside, head, 0, H, D, DP, PADDED)
        key = _heads(qkv + first * 3 * H * D, pad, row, inside, head, 1, H, D, DP, PADDED)
        value = _heads(qkv + first * 3 * H * D, pad, row, inside, head, 2, H, D, DP, PADDED)
        real = inside[:, None] & (column < D)[None, :]
        at = of_out + first * H * D + row[:, None] * (H * D) + head * D + column[None, :]
        mixed = tl.load(at, mask=real, other=0.0)
        weights = attention_weights(query, key, added, side, SCALE, PRECISION)
        of_logits, of_query, of_key, of_value = attention_gradient(query, key, value, weights, mixed, SCALE, PRECISION)
        sum_bias += of_logits
        at = of_qkv + first * 3 * H * D + row[:, None] * (3 * H * D) + head * D + column[None, :]
        kind = of_qkv.dtype.element_ty
        tl.store(at, of_query.to(kind), mask=real)
        tl.store(at + H * D, of_key.to(kind), mask=real)
        tl.store(at + 2 * H * D, of_value.to(kind), mask=real)
        if PADDED:
            beyond = ((token < TOKENS) & ~inside)[:, None]
            sum_key += tl.sum(tl.where(beyond, of_key, 0.0), axis=0)
            sum_value += tl.sum(tl.where(beyond, of_value, 0.0), axis=0)
    known = (token < TOKENS)[:, None] & (token < TOKENS)[None, :]
    at = of_bias + tl.program_id(0) * TOKENS * TOKENS + token[:, None] * TOKENS + token[None, :]
    tl.store(at, sum_bias, mask=known)
    if PADDED:
        at = of_pad + tl.program_id(0) // H * 3 * H * D + head * D + column
        tl.store(at + H * D, sum_key, mask=column < D)
        tl.store(at + 2 * H * D, sum_value, mask=column < D)


class _WindowAttention(torch.autograd.Function):
    """Saves its input alone; the attention matrix never leaves the chip."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, pad: Tensor, bias: Tensor, heads: int, window: int, shift: int) -> Tensor:
        batch, x, y, z, width = qkv.shape
        ctx.maps = tiles.windows(batch, (x, y, z), window, shift)
        ctx.heads = heads
        ctx.save_for_backward(qkv, pad, bias)
        out = qkv.new_empty(batch, x, y, z, width // 3)
        number = ctx.maps.number
        tensors = (qkv, pad, bias, out)
        tiles.launch(_forward, heads * number, qkv.device, *tensors, number, **_sizes(qkv, ctx.maps, heads))
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        qkv, pad, bias = ctx.saved_tensors
        shared = tiles.programs(ctx.maps.number, qkv.device, beside=ctx.heads)
        of_qkv = torch.empty_like(qkv)
        of_bias = bias.new_empty(shared, *bias.shape)
        of_pad = bias.new_zeros(shared, len(pad))
        tiles.launch(
            _backward,
            ctx.heads * shared,
            qkv.device,
            *(qkv, pad, bias, gradient[0].contiguous(), of_qkv, of_pad, of_bias, ctx.maps.number),
            **_sizes(qkv, ctx.maps, ctx.heads),
        )
        return of_qkv, of_pad.sum(dim=0).to(pad.dtype), of_bias.sum(dim=0), None, None, None


def _sizes(qkv: Tensor, maps: tiles.Windows, heads: int) -> dict[str, Any]:
    """What both kernels need to know about the map."""
    width = qkv.shape[-1] // (3 * heads)
    return {
        **maps.options,
        "H": heads,
        "D": width,
        "DP": tiles.tile(width),
        "PADDED": maps.reach_over,
        "SCALE": width**-0.5,
        "PRECISION": tiles.precision(qkv),
    }


def window_attention(qkv: Tensor, pad: Tensor, bias: Tensor, *, window: int, shift: int) -> Tensor:
    """The attention as one operation of autograd."""
    heads = len(bias)
    mixed: Tensor = _WindowAttention.apply(qkv, pad, bias, heads, window, shift)  # type: ignore[no-untyped-call]
    return mixed
