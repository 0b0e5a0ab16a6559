// Two linear layers with a GELU between, in products of bfloat16 by the matrix tiles of the processor (AMX): what lies
// between the layers is as wide as both together and never leaves the cache. The way back computes it again.
//
// Rows are dealt out in parts that do not depend on the threads: sums come out the same with any.

#include "vectors.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>

#include "blocks.h"
#include "gelu.h"

namespace {

constexpr int T = 16;         // rows of a tile; numbers of float32 in a row of it
constexpr int K = 32;         // numbers of bfloat16 in a row of a tile
constexpr int TILE = T * K;
constexpr int DEEP = ROWS / K;

// Before a tile is loaded, all that was stored lies in memory: GCC's intrinsics do not say how much they read (bug
// 114098), so that it may leave stores out or put them behind.
inline void settle() { asm volatile("" ::: "memory"); }

// Sets all eight tiles of this thread to their full size; nothing is set at the end.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        std::fill_n(shape.bytes, 8, 64);
        std::fill_n(shape.rows, 8, T);
        asm volatile("" ::"r"(&shape) : "memory");
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// Two rows of bfloat16, one number of each in turn, as tiles want the rows of a second factor.
inline V paired(V one, V two) {
    const __m512i low = _mm512_cvtepu16_epi32(halves(one)), high = _mm512_cvtepu16_epi32(halves(two));
    return (V)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
inline V some(const uint16_t* p, int count) { return count <= 0 ? V{} : count >= T ? row(p) : row(p, count); }

// The second factor of a product, (inner, outer), in tiles of (32, 16), those of one column of tiles in a row.
// Of a matrix that lies so:
Room<uint16_t> tiled(const uint16_t* from, int inner, int outer, int padded) {
    Room<uint16_t> tiles(int64_t(padded) * up(outer, T));
    for (int n = 0; n < outer; n += T)
        for (int k = 0; k < padded; k += 2) {
            const uint16_t* at = from + int64_t(k) * outer + n;
            const V one = some(at, k < inner ? outer - n : 0), two = some(at + outer, k + 1 < inner ? outer - n : 0);
            store((float*)(tiles + int64_t(n) * padded + k * T), paired(one, two));
        }
    return tiles;
}
// Of one that lies as (outer, inner):
Room<uint16_t> tiled_across(const uint16_t* from, int inner, int outer, int padded) {
    Room<uint16_t> tiles(int64_t(padded) * up(outer, T));
    for (int n = 0; n < outer; n += T)
        for (int k = 0; k < padded; k += K) {
            const int pairs = std::min(K, inner - k) / 2;
            V lanes[T] = {};
            for (int r = 0; r < std::min(T, outer - n); ++r)
                lanes[r] = row((const float*)(from + int64_t(n + r) * inner + k), pairs);
            transpose(lanes);
            for (int r = 0; r < T; ++r) store((float*)(tiles + int64_t(n) * padded + k * T + r * K), lanes[r]);
        }
    return tiles;
}

// A product of up to (32, inner) and (inner, 32) added to the tiles 0 to 3. `a` lies in rows of `length`; the tiles of
// b's second column of tiles begin `next` behind those of the first.
template <bool TALL, bool WIDE>
inline void multiply(const uint16_t* a, int length, const uint16_t* b, int next, int steps) {
    settle();
    for (int k = 0; k < steps; ++k) {
        _tile_loadd(4, a + k * K, length * 2);
        _tile_loadd(6, b + k * TILE, K * 2);
        _tile_dpbf16ps(0, 4, 6);
        if (TALL) {
            _tile_loadd(5, a + T * length + k * K, length * 2);
            _tile_dpbf16ps(1, 5, 6);
        }
        if (WIDE) {
            _tile_loadd(7, b + next + k * TILE, K * 2);
            _tile_dpbf16ps(2, 4, 7);
            if (TALL) _tile_dpbf16ps(3, 5, 7);
        }
    }
}
inline void clear() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}
template <bool TALL, bool WIDE>
inline void store_tiles(float* to, int length) {
    _tile_stored(0, to, length * 4);
    if (TALL) _tile_stored(1, to + T * length, length * 4);
    if (WIDE) _tile_stored(2, to + T, length * 4);
    if (TALL && WIDE) _tile_stored(3, to + T * length + T, length * 4);
    settle();
}
template <bool TALL, bool WIDE>
inline void load_tiles(const float* from, int length) {
    settle();
    _tile_loadd(0, from, length * 4);
    if (TALL) _tile_loadd(1, from + T * length, length * 4);
    if (WIDE) _tile_loadd(2, from + T, length * 4);
    if (TALL && WIDE) _tile_loadd(3, from + T * length + T, length * 4);
}

// (32, 32) of a product into `to`.
inline void product(const uint16_t* a, int length, const uint16_t* b, int next, int steps, float* to) {
    clear();
    multiply<true, true>(a, length, b, next, steps);
    store_tiles<true, true>(to, K);
}

// Rows of a product, rounded: out (count, width) = a (ROWS, 32 steps) b.
inline void product_rows(const uint16_t* a, int length, const uint16_t* b, int steps, uint16_t* out, int count,
                         int width, float* scratch) {
    const int next = steps * TILE;
    for (int m = 0; m < count; m += 2 * T)
        for (int n = 0; n < width; n += 2 * T) {
            clear();
            if (width - n > T) {
                multiply<true, true>(a + m * length, length, b + n / T * next, next, steps);
                store_tiles<true, true>(scratch, K);
            } else {
                multiply<true, false>(a + m * length, length, b + n / T * next, next, steps);
                store_tiles<true, false>(scratch, K);
            }
            for (int c = 0; c < std::min(2 * T, width - n); c += T) {
                const int columns = std::min(T, width - n - c);
                for (int r = 0; r < std::min(2 * T, count - m); ++r)
                    put(load(scratch + r * K + c), out + int64_t(m + r) * width + n + c, columns);
            }
        }
}

// sums (tall, wide) += a (tall, ROWS) b (ROWS, wide); `tall` a multiple of 16, `wide` of 32.
inline void add_product(const uint16_t* a, const uint16_t* b, float* sums, int tall, int wide) {
    const int next = DEEP * TILE;
    for (int n = 0; n < wide; n += 2 * T)
        for (int m = 0; m < tall; m += 2 * T) {
            float* to = sums + int64_t(m) * wide + n;
            if (tall - m > T) {
                load_tiles<true, true>(to, wide);
                multiply<true, true>(a + m * ROWS, ROWS, b + n / T * next, next, DEEP);
                store_tiles<true, true>(to, wide);
            } else {
                load_tiles<false, true>(to, wide);
                multiply<false, true>(a + m * ROWS, ROWS, b + n / T * next, next, DEEP);
                store_tiles<false, true>(to, wide);
            }
        }
}

// `count` rows with zeros behind them, up to (ROWS, padded).
inline void take(const uint16_t* from, int count, int width, int padded, uint16_t* to) {
    for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < padded; c += T)
            put(some(from + int64_t(r) * width + c, r < count ? width - c : 0), to + r * padded + c);
}
// (ROWS, padded) becomes (tall, ROWS).
inline void turn(const uint16_t* from, int padded, int tall, uint16_t* to) {
    for (int c = 0; c < tall; c += T)
        for (int r = 0; r < ROWS; r += T) {
            V v[T];
            for (int i = 0; i < T; ++i) v[i] = row(from + (r + i) * padded + c);
            transpose(v);
            for (int i = 0; i < T; ++i) put(v[i], to + (c + i) * ROWS + r);
        }
}

}  // namespace

// out = GELU(x first^T + bias) second^T; first: (hidden, width), second: (width, hidden).
extern "C" void mlp_forward_bfloat16(const uint16_t* x, const uint16_t* first, const float* bias,
                                     const uint16_t* second, uint16_t* out, int64_t rows, int width, int hidden,
                                     int threads) {
    const Blocks blocks(rows);
    const int padded = up(width, K), steps = padded / K;
    const Room<uint16_t> up_tiles = tiled_across(first, width, hidden, padded);
    const Room<uint16_t> down_tiles = tiled_across(second, hidden, width, hidden);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks.parts > 1)
    for (int part = 0; part < blocks.parts; ++part) {
        const FlushDenormals flushed;
        const Tiles tiles;
        Room<uint16_t> taken(ROWS * padded), inside(int64_t(ROWS) * hidden);
        Room<float> scratch(K * K);
        for (int64_t start = blocks.bound(part); start < blocks.bound(part + 1); start += ROWS) {
            const int count = int(std::min<int64_t>(ROWS, blocks.bound(part + 1) - start));
            take(x + start * width, count, width, padded, taken);
            for (int n = 0; n < hidden; n += K)
                for (int m = 0; m < count; m += K) {
                    product(taken + m * padded, padded, up_tiles + n * padded, T * padded, steps, scratch);
                    for (int c = 0; c < K; c += T) {
                        const V added = load(bias + n + c);
                        for (int r = 0; r < K; ++r)
                            put(gelu(load(scratch + r * K + c) + added), inside + (m + r) * hidden + n + c);
                    }
                }
            product_rows(inside, hidden, down_tiles, hidden / K, out + start * width, count, width, scratch);
        }
    }
}

// sums: (parts, 2, width up to a multiple of 16, hidden), of first^T and of second; bias_sums: (parts, hidden).
extern "C" void mlp_backward_bfloat16(const uint16_t* x, const uint16_t* first, const float* bias,
                                      const uint16_t* second, const uint16_t* coming, uint16_t* into, float* sums,
                                      float* bias_sums, int64_t rows, int width, int hidden, int threads) {
    const Blocks blocks(rows);
    const int padded = up(width, K), steps = padded / K, tall = up(width, T);
    const Room<uint16_t> up_tiles = tiled_across(first, width, hidden, padded);
    const Room<uint16_t> back_tiles = tiled(second, width, hidden, padded);
    const Room<uint16_t> out_tiles = tiled(first, hidden, width, hidden);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks.parts > 1)
    for (int part = 0; part < blocks.parts; ++part) {
        const FlushDenormals flushed;
        const Tiles tiles;
        const int64_t size = int64_t(ROWS) * hidden, of_sums = int64_t(tall) * hidden;
        Room<uint16_t> taken(ROWS * padded), given(ROWS * padded), turned(tall * ROWS), given_turned(tall * ROWS);
        Room<uint16_t> back(size), back_tiled(size), inside_tiled(size);
        Room<float> before(K * K), coming_inside(K * K);
        float* to_first = sums + int64_t(part) * 2 * of_sums;
        float* to_bias = bias_sums + int64_t(part) * hidden;
        std::fill_n(to_first, 2 * of_sums, 0.0f);
        std::fill_n(to_bias, hidden, 0.0f);
        for (int64_t start = blocks.bound(part); start < blocks.bound(part + 1); start += ROWS) {
            const int count = int(std::min<int64_t>(ROWS, blocks.bound(part + 1) - start));
            take(x + start * width, count, width, padded, taken);
            take(coming + start * width, count, width, padded, given);
            turn(taken, padded, tall, turned);
            turn(given, padded, tall, given_turned);
            for (int n = 0; n < hidden; n += K)
                for (int m = 0; m < ROWS; m += K) {
                    product(taken + m * padded, padded, up_tiles + n * padded, T * padded, steps, before);
                    product(given + m * padded, padded, back_tiles + n * padded, T * padded, steps, coming_inside);
                    for (int c = 0; c < K; c += T) {
                        const V added = load(bias + n + c);
                        V sum = {};
                        uint16_t* back_tile = back_tiled + int64_t(n + c) * ROWS + m * T;
                        uint16_t* act_tile = inside_tiled + int64_t(n + c) * ROWS + m * T;
                        for (int r = 0; r < K; r += 2) {
                            V act[2], slope[2];
                            for (int i = 0; i < 2; ++i) {
                                const V at = load(before + (r + i) * K + c) + added;
                                const Normal normal(at);
                                act[i] = at * normal.below;
                                slope[i] = load(coming_inside + (r + i) * K + c) * normal.slope(at);
                                sum += slope[i];
                                put(slope[i], back + (m + r + i) * hidden + n + c);
                            }
                            store((float*)(back_tile + r * T), paired(slope[0], slope[1]));
                            store((float*)(act_tile + r * T), paired(act[0], act[1]));
                        }
                        store(to_bias + n + c, load(to_bias + n + c) + sum);
                    }
                }
            product_rows(back, hidden, out_tiles, hidden / K, into + start * width, count, width, before);
            add_product(turned, back_tiled, to_first, tall, hidden);
            add_product(given_turned, inside_tiled, to_first + of_sums, tall, hidden);
        }
    }
}

// Whether the system lets this process use tiles (Linux asks that it is asked).
extern "C" int mlp_allowed() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}
#endif
