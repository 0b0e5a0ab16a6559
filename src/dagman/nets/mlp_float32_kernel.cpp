// Two linear layers with a GELU between, in float32: what lies between the layers is as wide as both together and never
// leaves the cache. The way back computes it again.
//
// Rows are dealt out in parts that do not depend on the threads: sums come out the same with any.

#include <type_traits>

#include "blocks.h"
#include "gelu.h"

namespace {

constexpr int N = 3;               // vectors of a product that is held in registers: N of each of M rows
constexpr int M = W == 16 ? 8 : 4;
constexpr int PANEL = N * W;       // columns of a matrix that lie together, row by row; the last may be fewer

// Calls work(first column, vectors) for each panel; the vectors are a constant.
template <typename Work>
inline void panels(int columns, Work work) {
    int c = 0;
    for (; columns - c > 2 * W; c += PANEL) work(c, std::integral_constant<int, 3>());
    if (columns - c > W) work(c, std::integral_constant<int, 2>());
    else if (columns - c > 0) work(c, std::integral_constant<int, 1>());
}
inline int stride(int columns, int first) { return std::min(up(columns - first, W), PANEL); }

// c (M, n vectors) += a b: `across` and `along` lead to a's next row and column; b's rows follow each other.
template <int n>
__attribute__((noinline)) void multiply(const float* a, int64_t across, int64_t along, const float* b, int steps,
                                        V (&c)[M][n]) {
    V sums[M][n];
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < n; ++j) sums[i][j] = c[i][j];
    for (int k = 0; k < steps; ++k, a += along, b += n * W) {
        V factor[n];
        for (int j = 0; j < n; ++j) {
            factor[j] = load(b + j * W);
            asm("" : "+v"(factor[j]));  // held: GCC would load it again for each row
        }
        for (int i = 0; i < M; ++i)
            for (int j = 0; j < n; ++j) sums[i][j] += a[i * across] * factor[j];
    }
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < n; ++j) c[i][j] = sums[i][j];
}

// A matrix (inner, outer), or one that lies as (outer, inner), in panels of columns with zeros beyond the last.
Room<float> in_panels(const float* from, int inner, int outer, bool turned) {
    Room<float> to(int64_t(inner) * up(outer, W));
    for (int n = 0; n < outer; n += PANEL) {
        const int wide = stride(outer, n);
        float* at = to + int64_t(n) * inner;
        const int columns = std::min(wide, outer - n);
        if (turned)
            for (int j = 0; j < columns; ++j)
                for (int k = 0; k < inner; ++k) at[k * wide + j] = from[int64_t(n + j) * inner + k];
        else
            for (int k = 0; k < inner; ++k) std::copy_n(from + int64_t(k) * outer + n, columns, at + k * wide);
    }
    return to;
}

// out (count, width) = a b; a (ROWS, inner) lies in panels, b (inner, width) too.
inline void product(const float* a, const float* b, int inner, float* out, int count, int width) {
    panels(width, [&](int n, auto vectors) {
        for (int m = 0; m < count; m += M) {
            V c[M][vectors] = {};
            const float* factor = b + int64_t(n) * inner;
            panels(inner, [&](int k, auto deep) {
                constexpr int steps = deep * W;
                multiply<vectors>(a + int64_t(k) * ROWS + m * steps, steps, 1, factor + int64_t(k) * vectors * W, steps, c);
            });
            for (int i = 0; i < std::min(M, count - m); ++i)
                for (int j = 0; j < vectors; ++j) {
                    float* at = out + int64_t(m + i) * width + n + j * W;
                    const int left = width - n - j * W;
                    if (left >= W) put(c[i][j], at);
                    else put(c[i][j], at, left);
                }
        }
    });
}

// sums (width, hidden) += a^T b; a (count, width) lies row by row, b (count, hidden) in panels.
inline void add_product(const float* a, const float* b, int count, float* sums, int width, int hidden) {
    panels(hidden, [&](int n, auto vectors) {
        for (int m = 0; m < width; m += M) {
            V c[M][vectors];
            float* at = sums + int64_t(m) * hidden + n;
            for (int i = 0; i < M; ++i)
                for (int j = 0; j < vectors; ++j) c[i][j] = load(at + i * hidden + j * W);
            multiply<vectors>(a + m, 1, width, b + int64_t(n) * ROWS, count, c);
            for (int i = 0; i < M; ++i)
                for (int j = 0; j < vectors; ++j) store(at + i * hidden + j * W, c[i][j]);
        }
    });
}

// The rows of a block where they lie, or with zeros behind them in `room`.
inline const float* whole(const float* from, int count, int width, float* room) {
    if (count == ROWS) return from;
    std::fill(std::copy_n(from, count * width, room), room + ROWS * width, 0.0f);
    return room;
}

}  // namespace

// out = GELU(x first^T + bias) second^T; first: (hidden, width), second: (width, hidden). A width of whole rows M, a
// hidden width of whole vectors.
extern "C" void mlp_forward_float32(const float* x, const float* first, const float* bias, const float* second,
                                    float* out, int64_t rows, int width, int hidden, int threads) {
    const Blocks blocks(rows);
    const Room<float> up_panels = in_panels(first, width, hidden, true);
    const Room<float> down_panels = in_panels(second, hidden, width, true);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks.parts > 1)
    for (int part = 0; part < blocks.parts; ++part) {
        const FlushDenormals flushed;
        Room<float> room(ROWS * width), inside(int64_t(ROWS) * hidden);
        for (int64_t start = blocks.bound(part); start < blocks.bound(part + 1); start += ROWS) {
            const int count = int(std::min<int64_t>(ROWS, blocks.bound(part + 1) - start));
            const float* taken = whole(x + start * width, count, width, room);
            panels(hidden, [&](int n, auto vectors) {
                for (int m = 0; m < count; m += M) {
                    V c[M][vectors];
                    for (int i = 0; i < M; ++i)
                        for (int j = 0; j < vectors; ++j) c[i][j] = load(bias + n + j * W);
                    multiply<vectors>(taken + m * width, width, 1, up_panels + int64_t(n) * width, width, c);
                    float* to = inside + int64_t(n) * ROWS + m * vectors * W;
                    for (int i = 0; i < M; ++i)
                        for (int j = 0; j < vectors; ++j) store(to + (i * vectors + j) * W, gelu(c[i][j]));
                }
            });
            product(inside, down_panels, hidden, out + start * width, count, width);
        }
    }
}

// sums: (parts, 2, width up to a multiple of 16, hidden), of first^T and of second; bias_sums: (parts, hidden).
extern "C" void mlp_backward_float32(const float* x, const float* first, const float* bias, const float* second,
                                     const float* coming, float* into, float* sums, float* bias_sums, int64_t rows,
                                     int width, int hidden, int threads) {
    const Blocks blocks(rows);
    const Room<float> up_panels = in_panels(first, width, hidden, true);
    const Room<float> back_panels = in_panels(second, width, hidden, false);
    const Room<float> out_panels = in_panels(first, hidden, width, false);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks.parts > 1)
    for (int part = 0; part < blocks.parts; ++part) {
        const FlushDenormals flushed;
        const int64_t size = int64_t(ROWS) * hidden, of_sums = int64_t(up(width, 16)) * hidden;
        Room<float> room(ROWS * width), given_room(ROWS * width), inside(size), back(size);
        float* to_first = sums + int64_t(part) * 2 * of_sums;
        float* to_bias = bias_sums + int64_t(part) * hidden;
        std::fill_n(to_first, 2 * of_sums, 0.0f);
        std::fill_n(to_bias, hidden, 0.0f);
        for (int64_t start = blocks.bound(part); start < blocks.bound(part + 1); start += ROWS) {
            const int count = int(std::min<int64_t>(ROWS, blocks.bound(part + 1) - start));
            const float* taken = whole(x + start * width, count, width, room);
            const float* given = whole(coming + start * width, count, width, given_room);
            panels(hidden, [&](int n, auto vectors) {
                V sum[vectors] = {};
                for (int m = 0; m < count; m += M) {
                    V before[M][vectors], slope[M][vectors] = {};
                    for (int i = 0; i < M; ++i)
                        for (int j = 0; j < vectors; ++j) before[i][j] = load(bias + n + j * W);
                    multiply<vectors>(taken + m * width, width, 1, up_panels + int64_t(n) * width, width, before);
                    multiply<vectors>(given + m * width, width, 1, back_panels + int64_t(n) * width, width, slope);
                    const int64_t to = int64_t(n) * ROWS + m * vectors * W;
                    for (int i = 0; i < M; ++i)
                        for (int j = 0; j < vectors; ++j) {
                            const V at = before[i][j];
                            const Normal normal(at);
                            const V flowing = slope[i][j] * normal.slope(at);
                            sum[j] += flowing;
                            store(inside + to + (i * vectors + j) * W, at * normal.below);
                            store(back + to + (i * vectors + j) * W, flowing);
                        }
                }
                for (int j = 0; j < vectors; ++j) store(to_bias + n + j * W, load(to_bias + n + j * W) + sum[j]);
            });
            product(back, out_panels, hidden, into + start * width, count, width);
            add_product(taken, back, up(count, M), to_first, width, hidden);
            add_product(given, inside, up(count, M), to_first + of_sums, width, hidden);
        }
    }
}

extern "C" int mlp_parts(int64_t rows) { return Blocks(rows).parts; }
