// Attention within windows, forward and backward, in one pass over each window and head; float32 inside.
// Logits are held over ln 2, so that softmax is of powers of two.
//
// The matrix of a head is held transposed, keys down and queries across the lanes, so that softmax needs no sum over
// lanes and head widths such as 12 fill them. Queries go in blocks of LANES, so the matrix stays in the nearest cache.
// Ranges of windows, and heads where there are few windows, are dealt out in parts that do not depend on the threads:
// sums come out the same with any.
//
// Plain C interface, no PyTorch headers: it compiles in seconds, and OpenMP's symbols are those that PyTorch has loaded.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "vectors.h"

namespace {

#ifdef __AVX512F__
constexpr int GROUP = 4;  // vectors of lanes handled together: registers hold 4 x GROUP sums
#else
constexpr int GROUP = 2;
#endif
constexpr int LANES = 64;

int up(int n, int step) { return (n + step - 1) / step * step; }

struct Sizes {
    int64_t windows;
    int tokens, heads, width, threads;
};

// Sizes of the padded copies of one head.
struct Shape {
    int tokens, width, rows, deep, lanes;
    explicit Shape(const Sizes& s)
        : tokens(s.tokens), width(s.width), rows(up(s.tokens, W)), deep(up(s.width, W)), lanes(up(s.tokens, W)) {}
};

using Buffer = std::unique_ptr<float[], decltype(&std::free)>;
Buffer buffer(size_t count) {
    const size_t bytes = up(int(count * 4 % 64), 64) + count * 4 / 64 * 64;
    float* p = static_cast<float*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
    std::memset(p, 0, bytes);
    return Buffer(p, &std::free);
}

// Rows of one head of one window, side by side: to[token][deep], moved by `shift` if there is one, and scaled.
template <typename T>
void gather(const T* from, const float* shift, const int32_t* order, int64_t stride, const Shape& n, float scale,
            float* to) {
    for (int c = 0; c < n.width; c += W) {
        const int count = std::min(W, n.width - c);
        const V moved = shift ? row(shift + c, count) : V{};
        for (int i = 0; i < n.tokens; ++i)
            store(to + i * n.deep + c, (row(from + order[i] * stride + c, count) + moved) * scale);
    }
}

// across[c][lane] = rows[first + lane][c]
void turn(const float* rows, const Shape& n, int first, int lanes, float* across) {
    for (int lane = 0; lane < lanes; lane += W)
        for (int c = 0; c < n.deep; c += W) {
            V block[W];
            for (int i = 0; i < W; ++i) block[i] = load(rows + (first + lane + i) * n.deep + c);
            transpose(block);
            for (int i = 0; i < W; ++i) store(across + (c + i) * LANES + lane, block[i]);
        }
}

// The row of each query: to[order[lane]][c] = across[c][lane] * factor[lane], added up in `sums` if there are any.
template <typename T>
void scatter(const float* across, const float* factor, const int32_t* order, int64_t stride, const Shape& n, int count,
             T* to, float* sums) {
    for (int lane = 0; lane < count; lane += W) {
        const V times = load(factor + lane);
        for (int c = 0; c < n.width; c += W) {
            V block[W];
            for (int i = 0; i < W; ++i) block[i] = load(across + (c + i) * LANES + lane) * times;
            transpose(block);
            const int rows = std::min(W, count - lane), columns = std::min(W, n.width - c);
            for (int i = 0; i < rows; ++i) put(block[i], to + order[lane + i] * stride + c, columns);
            if (!sums) continue;
            V sum = load(sums + c);
            for (int i = 0; i < rows; ++i) sum += block[i];
            store(sums + c, sum);
        }
    }
}

// to[key][lane] = from[key][lane] + sum over c of rows[key][c] * across[c][lane]
template <int K, int G>
inline void product(const float* rows, int deep, const float* across, int width, const float* from, int stride, float* to) {
    V sum[K][G];
    for (int k = 0; k < K; ++k)
        for (int g = 0; g < G; ++g) sum[k][g] = from ? load(from + k * stride + g * W) : V{};
    for (int c = 0; c < width; ++c) {
        V lane[G];
        for (int g = 0; g < G; ++g) lane[g] = load(across + c * LANES + g * W);
        for (int k = 0; k < K; ++k)
            for (int g = 0; g < G; ++g) sum[k][g] += lane[g] * rows[k * deep + c];
    }
    for (int k = 0; k < K; ++k)
        for (int g = 0; g < G; ++g) store(to + k * LANES + g * W, sum[k][g]);
}

template <int G>
void products(const float* rows, const float* across, const Shape& n, int lane, const float* from, float* to) {
    int key = 0;
    const float* start = from ? from + lane : nullptr;
    for (; key + 4 <= n.tokens; key += 4)
        product<4, G>(rows + key * n.deep, n.deep, across + lane, n.width, start ? start + key * n.lanes : nullptr,
                      n.lanes, to + key * LANES + lane);
    for (; key < n.tokens; ++key)
        product<1, G>(rows + key * n.deep, n.deep, across + lane, n.width, start ? start + key * n.lanes : nullptr,
                      n.lanes, to + key * LANES + lane);
}

void all_products(const float* rows, const float* across, const Shape& n, int lanes, const float* from, float* to) {
    int lane = 0;
    for (; lane + GROUP * W <= lanes; lane += GROUP * W) products<GROUP>(rows, across, n, lane, from, to);
    for (; lane < lanes; lane += W) products<1>(rows, across, n, lane, from, to);
}

// to[c][lane] = sum over keys of rows[key][c] * matrix[key][lane]
template <int C, int G>
inline void mixture(const float* rows, const Shape& n, const float* matrix, float* to) {
    V sum[C][G] = {};
    for (int key = 0; key < n.tokens; ++key) {
        V lane[G];
        for (int g = 0; g < G; ++g) lane[g] = load(matrix + key * LANES + g * W);
        for (int c = 0; c < C; ++c)
            for (int g = 0; g < G; ++g) sum[c][g] += lane[g] * rows[key * n.deep + c];
    }
    for (int c = 0; c < C; ++c)
        for (int g = 0; g < G; ++g) store(to + c * LANES + g * W, sum[c][g]);
}

template <int G>
void mixtures(const float* rows, const Shape& n, const float* matrix, float* to) {
    int c = 0;
    for (; c + 6 <= n.width; c += 6) mixture<6, G>(rows + c, n, matrix, to + c * LANES);
    for (; c + 2 <= n.width; c += 2) mixture<2, G>(rows + c, n, matrix, to + c * LANES);
    for (; c < n.width; ++c) mixture<1, G>(rows + c, n, matrix, to + c * LANES);
}

void all_mixtures(const float* rows, const Shape& n, const float* matrix, int lanes, float* to) {
    int lane = 0;
    for (; lane + GROUP * W <= lanes; lane += GROUP * W) mixtures<GROUP>(rows, n, matrix + lane, to + lane);
    for (; lane < lanes; lane += W) mixtures<1>(rows, n, matrix + lane, to + lane);
}

// first[key][c] += sum over lanes of a[key][lane] * x[lane][c], and second from b and y
template <int K>
inline void back_mixture(const float* a, const float* x, const float* b, const float* y, int count, int deep,
                         float* first, float* second) {
    V one[K], two[K];
    for (int k = 0; k < K; ++k) one[k] = load(first + k * deep), two[k] = load(second + k * deep);
    for (int lane = 0; lane < count; ++lane) {
        const V from_x = load(x + lane * deep), from_y = load(y + lane * deep);
        for (int k = 0; k < K; ++k) one[k] += from_x * a[k * LANES + lane];
        for (int k = 0; k < K; ++k) two[k] += from_y * b[k * LANES + lane];
    }
    for (int k = 0; k < K; ++k) store(first + k * deep, one[k]), store(second + k * deep, two[k]);
}

void back_mixtures(const float* a, const float* x, const float* b, const float* y, const Shape& n, int count,
                   float* first, float* second) {
    constexpr int K = W == 16 ? 8 : 4;  // `rows` is a multiple of both; matrices have as many rows, the last of zeros
    for (int c = 0; c < n.deep; c += W)
        for (int key = 0; key < n.rows; key += K)
            back_mixture<K>(a + key * LANES, x + c, b + key * LANES, y + c, count, n.deep, first + key * n.deep + c,
                            second + key * n.deep + c);
}

// How the work is cut: ranges of windows, and in each groups of heads.
struct Parts {
    int64_t windows;
    int heads, ranges, groups;
    explicit Parts(const Sizes& s)
        : windows(s.windows), heads(s.heads), ranges(int(std::min<int64_t>(PARTS, std::max<int64_t>(s.windows / 8, 1)))),
          groups(std::min(heads, PARTS / ranges)) {}
    int count() const { return ranges * groups; }
    int64_t window(int range) const { return windows * range / ranges; }
    int head(int group) const { return heads * group / groups; }
};

// One part.
struct Part {
    int range, begin, end;  // of heads
    int64_t first, last;    // windows
    Part(const Parts& parts, int number)
        : range(number / parts.groups), begin(parts.head(number % parts.groups)),
          end(parts.head(number % parts.groups + 1)), first(parts.window(range)), last(parts.window(range + 1)) {}
};

// What is added to the logits of a part's heads: bias and mask, over ln 2, padded to whole vectors.
void prepare(const float* bias, const float* mask, const Part& part, const Shape& n, float* added) {
    for (int h = part.begin; h < part.end; ++h)
        for (int j = 0; j < n.tokens; ++j)
            for (int i = 0; i < n.tokens; ++i)
                added[((h - part.begin) * n.tokens + j) * n.lanes + i] =
                    (bias[(h * n.tokens + j) * n.tokens + i] + mask[j * n.tokens + i]) * LOG2_E;
}

// `count` numbers of each token of the next window come nearer while this one is computed: a share with each head.
template <typename T>
inline void fetch(const T* from, const int32_t* order, int64_t stride, int count, const Shape& n, int share, int shares) {
    for (int i = n.tokens * share / shares; i < n.tokens * (share + 1) / shares; ++i)
        for (int c = 0; c < count; c += 64 / sizeof(T)) __builtin_prefetch(from + order[i] * stride + c, 0, 2);
}

template <typename T>
void forward(const T* qkv, const float* shift, const float* bias, const int32_t* order, const int32_t* kind,
             const float* masks, T* out, float* statistics, const Sizes s) {
    const Shape n(s);
    const int64_t wide = int64_t(s.heads) * s.width, square = int64_t(n.tokens) * n.tokens;
    const float scale = LOG2_E / __builtin_sqrtf(float(s.width));
    const Parts parts(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int number = 0; number < parts.count(); ++number) {
        const FlushDenormals flushed;
        const Part part(parts, number);
        const int heads = part.end - part.begin;
        const size_t rows = size_t(n.rows) * n.deep;
        Buffer added = buffer(size_t(heads) * n.tokens * n.lanes), query = buffer(rows), key = buffer(rows),
               value = buffer(rows), across = buffer(size_t(n.deep) * LANES), mixed = buffer(size_t(n.deep) * LANES),
               matrix = buffer(size_t(n.rows) * LANES);
        int held = -1;
        for (int64_t w = part.first; w < part.last; ++w) {
            if (kind[w] != held) {
                held = kind[w];
                prepare(bias, masks + held * square, part, n, added.get());
            }
            const int32_t* place = order + w * n.tokens;
            for (int h = part.begin; h < part.end; ++h) {
                if (w + 1 < part.last)
                    for (int third = 0; third < 3; ++third)
                        fetch(qkv + third * wide + part.begin * s.width, place + n.tokens, 3 * wide, heads * s.width, n,
                              h - part.begin, heads);
                float* const thirds[] = {query.get(), key.get(), value.get()};
                for (int third = 0; third < 3; ++third) {
                    const int64_t start = third * wide + h * s.width;
                    gather(qkv + start, shift + start, place, 3 * wide, n, third ? 1.0f : scale, thirds[third]);
                }
                for (int first = 0; first < n.tokens; first += LANES) {
                    const int count = std::min(LANES, n.tokens - first), lanes = up(count, W);
                    turn(query.get(), n, first, lanes, across.get());
                    const float* start = added.get() + size_t(h - part.begin) * n.tokens * n.lanes + first;
                    all_products(key.get(), across.get(), n, lanes, start, matrix.get());
                    float peak[LANES], share[LANES];
                    for (int lane = 0; lane < lanes; lane += W) {
                        float* m = matrix.get() + lane;
                        V tops[4] = {load(m), load(m), load(m), load(m)}, sum = {};
                        for (int j = 0; j < n.tokens; ++j) tops[j % 4] = largest(tops[j % 4], load(m + j * LANES));
                        const V top = largest(largest(tops[0], tops[1]), largest(tops[2], tops[3]));
                        for (int j = 0; j < n.tokens; ++j) {
                            const V p = power_of_two(load(m + j * LANES) - top);
                            sum += p;
                            store(m + j * LANES, p);
                        }
                        store(peak + lane, top);
                        store(share + lane, 1.0f / sum);
                    }
                    all_mixtures(value.get(), n, matrix.get(), lanes, mixed.get());
                    scatter(mixed.get(), share, place + first, wide, n, count, out + h * s.width, nullptr);
                    if (statistics) {
                        float* kept = statistics + (w * s.heads + h) * 2 * n.tokens + first;
                        std::copy(peak, peak + count, kept);
                        std::copy(share, share + count, kept + n.tokens);
                    }
                }
            }
        }
    }
}

template <typename T>
void backward(const T* qkv, const float* shift, const float* bias, const int32_t* order, const int32_t* kind,
              const float* masks, const float* statistics, const T* gradient, T* into, float* shift_parts,
              float* bias_parts, const Sizes s) {
    const Shape n(s);
    const int64_t wide = int64_t(s.heads) * s.width, square = int64_t(n.tokens) * n.tokens;
    const float scale = LOG2_E / __builtin_sqrtf(float(s.width));
    float to_query[LANES];
    std::fill_n(to_query, LANES, scale / LOG2_E);
    const Parts parts(s);
#pragma omp parallel for schedule(dynamic) num_threads(s.threads)
    for (int number = 0; number < parts.count(); ++number) {
        const FlushDenormals flushed;
        const Part part(parts, number);
        const int heads = part.end - part.begin;
        const size_t rows = size_t(n.rows) * n.deep, matrices = size_t(n.rows) * LANES, turned = size_t(n.deep) * LANES;
        Buffer added = buffer(size_t(heads) * n.tokens * n.lanes), query = buffer(rows), key = buffer(rows),
               value = buffer(rows), coming = buffer(rows), across = buffer(turned), back = buffer(turned),
               mixed = buffer(turned), matrix = buffer(matrices), slope = buffer(matrices), to_key = buffer(rows),
               to_value = buffer(rows), bias_sum = buffer(size_t(heads) * n.tokens * n.lanes),
               shift_sum = buffer(size_t(heads) * 3 * n.deep);
        int held = -1;
        for (int64_t w = part.first; w < part.last; ++w) {
            if (kind[w] != held) {
                held = kind[w];
                prepare(bias, masks + held * square, part, n, added.get());
            }
            const int32_t* place = order + w * n.tokens;
            for (int h = part.begin; h < part.end; ++h) {
                if (w + 1 < part.last) {
                    const int64_t start = part.begin * s.width;
                    for (int third = 0; third < 3; ++third) {
                        fetch(qkv + third * wide + start, place + n.tokens, 3 * wide, heads * s.width, n,
                              h - part.begin, heads);
                        fetch(into + third * wide + start, place + n.tokens, 3 * wide, heads * s.width, n,
                              h - part.begin, heads);
                    }
                    fetch(gradient + start, place + n.tokens, wide, heads * s.width, n, h - part.begin, heads);
                }
                float* const thirds[] = {query.get(), key.get(), value.get()};
                for (int third = 0; third < 3; ++third) {
                    const int64_t start = third * wide + h * s.width;
                    gather(qkv + start, shift + start, place, 3 * wide, n, third ? 1.0f : scale, thirds[third]);
                }
                gather(gradient + h * s.width, nullptr, place, wide, n, 1.0f, coming.get());
                float* to_shift = shift_sum.get() + (h - part.begin) * 3 * n.deep;
                std::fill_n(to_key.get(), rows, 0.0f);
                std::fill_n(to_value.get(), rows, 0.0f);
                for (int first = 0; first < n.tokens; first += LANES) {
                    const int count = std::min(LANES, n.tokens - first), lanes = up(count, W);
                    const size_t corner = size_t(h - part.begin) * n.tokens * n.lanes + first;
                    turn(query.get(), n, first, lanes, across.get());
                    turn(coming.get(), n, first, lanes, back.get());
                    all_products(key.get(), across.get(), n, lanes, added.get() + corner, matrix.get());
                    all_products(value.get(), back.get(), n, lanes, nullptr, slope.get());
                    float peak[LANES] = {}, share[LANES] = {};
                    const float* kept = statistics + (w * s.heads + h) * 2 * n.tokens + first;
                    std::copy(kept, kept + count, peak);
                    std::copy(kept + n.tokens, kept + n.tokens + count, share);
                    for (int lane = 0; lane < lanes; lane += W) {
                        float *m = matrix.get() + lane, *d = slope.get() + lane, *b = bias_sum.get() + corner + lane;
                        const V top = load(peak + lane), part_of = load(share + lane);
                        V dots[4] = {}, wholes[4] = {};  // of each fourth: shorter sums round less
                        for (int j = 0; j < n.tokens; ++j) {
                            const V p = power_of_two(load(m + j * LANES) - top) * part_of;
                            dots[j % 4] += p * load(d + j * LANES);
                            wholes[j % 4] += p;
                            store(m + j * LANES, p);
                        }
                        // The whole is 1 but for rounding, which all queries would add to the gradient of the keys' bias.
                        const V dot = ((dots[0] + dots[1]) + (dots[2] + dots[3])) /
                                      ((wholes[0] + wholes[1]) + (wholes[2] + wholes[3]));
                        for (int j = 0; j < n.tokens; ++j) {
                            const V ds = load(m + j * LANES) * (load(d + j * LANES) - dot);
                            store(d + j * LANES, ds);
                            store(b + j * n.lanes, load(b + j * n.lanes) + ds);
                        }
                    }
                    all_mixtures(key.get(), n, slope.get(), lanes, mixed.get());
                    back_mixtures(slope.get(), query.get() + first * n.deep, matrix.get(), coming.get() + first * n.deep,
                                  n, count, to_key.get(), to_value.get());
                    scatter(mixed.get(), to_query, place + first, 3 * wide, n, count, into + h * s.width, to_shift);
                }
                T* to = into + wide + h * s.width;
                for (int c = 0; c < n.width; c += W) {
                    const int columns = std::min(W, n.width - c);
                    V keys = load(to_shift + n.deep + c), values = load(to_shift + 2 * n.deep + c);
                    for (int j = 0; j < n.tokens; ++j) {
                        const V k = load(&to_key[j * n.deep + c]) * (1 / LOG2_E), v = load(&to_value[j * n.deep + c]);
                        put(k, to + place[j] * 3 * wide + c, columns);
                        put(v, to + place[j] * 3 * wide + wide + c, columns);
                        keys += k;
                        values += v;
                    }
                    store(to_shift + n.deep + c, keys);
                    store(to_shift + 2 * n.deep + c, values);
                }
            }
        }
        for (int h = part.begin; h < part.end; ++h)
            for (int third = 0; third < 3; ++third)
                std::copy_n(shift_sum.get() + ((h - part.begin) * 3 + third) * n.deep, n.width,
                            shift_parts + (int64_t(part.range) * 3 + third) * wide + h * s.width);
        float* sums = bias_parts + (part.range * s.heads + part.begin) * square;
        for (int r = 0; r < heads * n.tokens; ++r)
            std::copy_n(bias_sum.get() + size_t(r) * n.lanes, n.tokens, sums + size_t(r) * n.tokens);
    }
}

}  // namespace

// qkv: (rows, 3, heads, width); shift: (3, heads, width), added to each row; bias: (heads, keys, queries); order: the row
// of each token of each window; kind: for each window its mask; out: (rows, heads, width); statistics: (windows, heads,
// 2, queries) or null; shift_parts: (window_ranges, 3, heads, width); bias_parts: (window_ranges, heads, keys, queries).
#define EXPORTED(NAME, T)                                                                                              \
    extern "C" void window_forward_##NAME(const T* qkv, const float* shift, const float* bias, const int32_t* order,   \
                                          const int32_t* kind, const float* masks, T* out, float* statistics,          \
                                          int64_t windows, int tokens, int heads, int width, int threads) {            \
        forward<T>(qkv, shift, bias, order, kind, masks, out, statistics, {windows, tokens, heads, width, threads});   \
    }                                                                                                                  \
    extern "C" void window_backward_##NAME(const T* qkv, const float* shift, const float* bias, const int32_t* order,  \
                                           const int32_t* kind, const float* masks, const float* statistics,           \
                                           const T* gradient, T* into, float* shift_parts, float* bias_parts,          \
                                           int64_t windows, int tokens, int heads, int width, int threads) {           \
        backward<T>(qkv, shift, bias, order, kind, masks, statistics, gradient, into, shift_parts, bias_parts,         \
                    {windows, tokens, heads, width, threads});                                                         \
    }

EXPORTED(float32, float)
EXPORTED(bfloat16, uint16_t)

extern "C" int window_ranges(int64_t windows) { return Parts({windows, 1, 1, 1, 1}).ranges; }
