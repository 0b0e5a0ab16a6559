"""What Triton kernels share: where a window's tokens lie in the map, softmax, layer norm, and how they are launched.

A kernel works on one window, or on one block of rows, at a time and walks over several of them, so that what it sums
over all (gradients of weights and of the position bias) stays on the chip; each program then writes its sum once.
"""

import math
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl

from dagman.nets.cells import Size
from dagman.nets.windows import FORBIDDEN, effective_window

FAR = tl.constexpr(FORBIDDEN)
ROWS = 64
"""Rows of a block, where rows are independent."""
WAVES = 4
"""Programs for each multiprocessor, where each sums gradients."""
AMPLE_SHARED = 160 * 1024
"""Bytes of memory that the warps of a block share, where a card has enough of it (A100, H100, B200)."""


@triton.jit
@no_type_check
def places(window, X, Y, Z, SX, SY, SZ, HX, HY, HZ, N):
    """For the N tokens of a window: row in the map, whether the map has it, its side; the map, and its first row.

    Where the shift joins far sides of the map, tokens of different sides must not meet. Offsets within a map fit 32
    bits, those of a batch need not.
    """
    nx, ny, nz = tl.cdiv(X, SX), tl.cdiv(Y, SY), tl.cdiv(Z, SZ)
    item = window // (nx * ny * nz)
    token = tl.arange(0, N)
    x = window // (ny * nz) % nx * SX + token // (SY * SZ) + HX
    y = window // nz % ny * SY + token // SZ % SY + HY
    z = window % nz * SZ + token % SZ + HZ
    side = (x >= nx * SX).to(tl.int32) * 4 + (y >= ny * SY).to(tl.int32) * 2 + (z >= nz * SZ).to(tl.int32)
    x = tl.where(x >= nx * SX, x - nx * SX, x)
    y = tl.where(y >= ny * SY, y - ny * SY, y)
    z = tl.where(z >= nz * SZ, z - nz * SZ, z)
    exists = token < SX * SY * SZ
    row = (x * Y + y) * Z + z
    return row, exists & (x < X) & (y < Y) & (z < Z), side, item, item.to(tl.int64) * X * Y * Z


@triton.jit
@no_type_check
def bias_tile(bias, head, TOKENS, N):
    """The bias of a head for all pairs of tokens; minus infinity for keys that the window does not have."""
    token = tl.arange(0, N)
    known = (token < TOKENS)[:, None] & (token < TOKENS)[None, :]
    at = bias + head * TOKENS * TOKENS + token[:, None] * TOKENS + token[None, :]
    return tl.load(at, mask=known, other=0.0) + tl.where(token < TOKENS, 0.0, float("-inf"))[None, :]


@triton.jit
@no_type_check
def product(left, right, PRECISION):
    """Matrix product with a sum in float32."""
    if PRECISION == "upcast":
        made = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        made = tl.dot(left, right, input_precision=PRECISION)
    return made


@triton.jit
@no_type_check
def attention_weights(query, key, bias, side, SCALE, PRECISION):
    """Softmax of the logits in float32; tokens of far sides do not meet."""
    logits = product(query, tl.trans(key), PRECISION) * SCALE + bias
    logits += tl.where(side[:, None] == side[None, :], 0.0, FAR)
    power = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return power / tl.sum(power, axis=1)[:, None]


@triton.jit
@no_type_check
def attention_gradient(query, key, value, weights, mixed, SCALE, PRECISION):
    """Gradients of logits, query, key and value from that of what was mixed."""
    kind = query.dtype
    of_weights = product(mixed, tl.trans(value), PRECISION)
    of_logits = weights * (of_weights - tl.sum(weights * of_weights, axis=1)[:, None])
    rounded = of_logits.to(kind)
    of_query = product(rounded, key, PRECISION) * SCALE
    of_key = product(tl.trans(rounded), query, PRECISION) * SCALE
    of_value = product(tl.trans(weights.to(kind)), mixed, PRECISION)
    return of_logits, of_query, of_key, of_value


@triton.jit
@no_type_check
def normalised(x, known, WIDTH, EPS):
    """Layer norm without affine of rows whose columns past WIDTH are 0, and one over their deviation."""
    centred = tl.where(known, x - (tl.sum(x, axis=1) / WIDTH)[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / WIDTH + EPS)
    return centred * inverse[:, None], inverse


@triton.jit
@no_type_check
def vector(values, first, size, P):
    """Some of a vector, zeros behind it."""
    at = tl.arange(0, P)
    return tl.load(values + first + at, mask=at < size, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def matrix(values, row, rows, column, columns, R: tl.constexpr, C: tl.constexpr, stride):
    """A tile of a matrix, zeros where it has no more."""
    i, j = row + tl.arange(0, R), column + tl.arange(0, C)
    real = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(values + i[:, None] * stride + j[None, :], mask=real, other=0.0)


class Windows(NamedTuple):
    """Maps in windows, as the kernels want it said."""

    number: int
    """Of all maps."""
    grid: Size
    sides: Size
    shifts: Size

    @property
    def tokens(self) -> int:
        """In a window."""
        return math.prod(self.sides)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of that name of every kernel that works on windows."""
        names = ("X", "Y", "Z", "SX", "SY", "SZ", "HX", "HY", "HZ")
        sizes = dict(zip(names, self.grid + self.sides + self.shifts, strict=True))
        return {"N": tile(self.tokens), **sizes}

    @property
    def reach_over(self) -> bool:
        """Whether windows reach over the map."""
        return any(side % step for side, step in zip(self.grid, self.sides, strict=True))


def windows(batch: int, grid: Size, window: int, shift: int) -> Windows:
    """How `batch` maps of `grid` tokens fall into windows; MONAI's rule for maps smaller than one."""
    sides, shifts = effective_window(grid, window, shift)
    each = math.prod(math.ceil(side / step) for side, step in zip(grid, sides, strict=True))
    return Windows(batch * each, grid, sides, shifts)


def tile(size: int) -> int:
    """The side of a tile that holds so many: a power of two, at least the 16 of a matrix product."""
    return max(16, 1 << (size - 1).bit_length())


def warps(width: int) -> int:
    """Warps of a program that holds whole tokens of that width: as many as its tiles need registers."""
    return 4 if tile(width) <= 64 else 8


def precision(x: torch.Tensor) -> str:
    """How products of matrices like x are made: three of tensor cores keep float32's digits; bfloat16 has no choice.

    Triton's interpreter has no products of bfloat16; those of the same values in float32 are equal.
    """
    if x.device.type == "cpu":
        return "upcast"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def programs(work: int, device: torch.device, *, beside: int) -> int:
    """How many programs share so many pieces of work, where `beside` do the same for another head."""
    if device.type != "cuda":
        return min(work, 3)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(work, WAVES * processors // beside))


def stages(shared: int) -> int:
    """How many rounds of a loop have their loads under way, where a block may share so many bytes of memory.

    Two are faster and take up to twice as much: more than the 99 KiB of cards that are not built for data centres.
    """
    return 2 if shared >= AMPLE_SHARED else 1


def launch(kernel: Any, number: int, device: torch.device, *args: Any, warps: int = 4, **options: Any) -> None:
    """Run so many programs of a kernel on the device of its tensors, whichever is current."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 0)  # AMD's do not say
        with torch.cuda.device(device):
            kernel[(number,)](*args, **options, num_warps=warps, num_stages=stages(shared))
    else:
        kernel[(number,)](*args, **options)
