// What is done to each token by itself: a branch's bias, drop path, sum with the stream and LayerNorm in one pass, a
// bias and GELU in another, and their gradients; float32 inside.
//
// Rows are dealt out in parts that do not depend on the threads: sums come out the same with any.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gelu.h"
#include "vectors.h"

namespace {

struct Parts {
    int64_t rows;
    int count;
    explicit Parts(int64_t n) : rows(n), count(int(std::min<int64_t>(PARTS, std::max<int64_t>(n / 64, 1)))) {}
    int64_t bound(int part) const { return rows * part / count; }
};

// Ones up to `count`, zeros beyond.
inline V ones(int count) {
    float lanes[W];
    for (int i = 0; i < W; ++i) lanes[i] = i < count ? 1.0f : 0.0f;
    return load(lanes);
}

// Calls work(c) or work(c, count) for the vectors of a row; a count is given where they are not whole.
template <typename Work>
inline void over(int width, Work work) {
    int c = 0;
    for (; c + W <= width; c += W) work(c);
    if (c < width) work(c, width - c);
}

// `from` is followed by zeros up to a whole vector. statistics: mean and 1 / standard deviation.
template <typename B>
inline void normalise(const float* from, V all, const float* weight, const float* bias, B* out, float* statistics,
                      int width, float epsilon, V inside) {
    const int whole = width / W * W;
    const float mean = total(all) / width;
    V square = {};
    for (int c = 0; c < whole; c += W) {
        const V far = load(from + c) - mean;
        square += far * far;
    }
    if (whole < width) {
        const V far = (load(from + whole) - mean) * inside;
        square += far * far;
    }
    const float scale = 1.0f / std::sqrt(total(square) / width + epsilon);
    over(width, [&](int c, auto... count) {
        const V slope = row(weight + c, count...) * scale;
        put((load(from + c) - mean) * slope + row(bias + c, count...), out + c, count...);
    });
    if (statistics) statistics[0] = mean, statistics[1] = scale;
}

// sum = x + factor * (branch + added), one factor for `each` rows, or 1 without factors; without a branch, x is the
// sum. Then, with a weight, out = LayerNorm of the sum.
template <typename X, typename B>
void residual_forward(const X* x, const B* branch, const float* added, const float* factors, int64_t each, X* sum,
                      const float* weight, const float* bias, B* out, float* statistics, int64_t rows, int width,
                      float epsilon, int threads) {
    const Parts parts(rows);
    const V inside = ones(width % W);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parts.count > 1)
    for (int part = 0; part < parts.count; ++part) {
        const FlushDenormals flushed;
        std::vector<float> held(width + W);
        for (int64_t r = parts.bound(part); r < parts.bound(part + 1); ++r) {
            const int64_t start = r * width;
            const float factor = factors ? factors[r / each] : 1.0f;
            V all = {};
            over(width, [&](int c, auto... count) {
                V here = row(x + start + c, count...);
                if (branch) {
                    const V joining = row(branch + start + c, count...) + row(added + c, count...);
                    here = stored(here + joining * factor, x);
                    put(here, sum + start + c, count...);
                }
                all += here;
                store(held.data() + c, here);
            });
            if (weight)
                normalise(held.data(), all, weight, bias, out + start, statistics ? statistics + 2 * r : nullptr, width,
                          epsilon, inside);
        }
    }
}

// The way back: `coming` is the gradient of `out`, `also` that of the sum beside it, `into` that of the sum and of x in
// all (without a weight it is `also` and not written), `to_branch` that of the branch where it differs.
// norm_sums: (parts, 2, width), of weight and bias; branch_sums: (parts, width), of `added`.
template <typename X, typename B>
void residual_backward(const X* sum, const float* weight, const float* statistics, const B* coming, const X* also,
                       const float* factors, int64_t each, X* into, B* to_branch, float* norm_sums, float* branch_sums,
                       int64_t rows, int width, int threads) {
    const Parts parts(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parts.count > 1)
    for (int part = 0; part < parts.count; ++part) {
        const FlushDenormals flushed;
        float* to_weight = weight ? norm_sums + int64_t(part) * 2 * width : nullptr;
        float* to_bias = weight ? to_weight + width : nullptr;
        float* to_added = branch_sums ? branch_sums + int64_t(part) * width : nullptr;
        if (weight) std::fill_n(to_weight, 2 * width, 0.0f);
        if (to_added) std::fill_n(to_added, width, 0.0f);
        for (int64_t r = parts.bound(part); r < parts.bound(part + 1); ++r) {
            const int64_t start = r * width;
            const float factor = factors ? factors[r / each] : 1.0f;
            float mean = 0, scale = 0, level = 0, tilt = 0;
            if (weight) {
                mean = statistics[2 * r], scale = statistics[2 * r + 1];
                V all = {}, along = {};
                over(width, [&](int c, auto... count) {
                    const V g = row(coming + start + c, count...);
                    const V unit = (row(sum + start + c, count...) - mean) * scale;
                    const V weighed = g * row(weight + c, count...);
                    all += weighed;
                    along += weighed * unit;
                    put(row(to_weight + c, count...) + g * unit, to_weight + c, count...);
                    put(row(to_bias + c, count...) + g, to_bias + c, count...);
                });
                level = total(all) / width, tilt = total(along) / width;
            }
            over(width, [&](int c, auto... count) {
                V back = also ? row(also + start + c, count...) : V{};
                if (weight) {
                    const V unit = (row(sum + start + c, count...) - mean) * scale;
                    const V weighed = row(coming + start + c, count...) * row(weight + c, count...);
                    back += (weighed - level - unit * tilt) * scale;
                    put(back, into + start + c, count...);
                }
                const V joined = back * factor;
                if (to_branch) put(joined, to_branch + start + c, count...);
                if (to_added) put(row(to_added + c, count...) + joined, to_added + c, count...);
            });
        }
    }
}

// out = GELU(x + bias)
template <typename T>
void gelu_forward(const T* x, const float* bias, T* out, int64_t rows, int width, int threads) {
    const Parts parts(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parts.count > 1)
    for (int part = 0; part < parts.count; ++part) {
        const FlushDenormals flushed;
        for (int64_t r = parts.bound(part); r < parts.bound(part + 1); ++r)
            over(width, [&](int c, auto... count) {
                put(gelu(row(x + r * width + c, count...) + row(bias + c, count...)), out + r * width + c, count...);
            });
    }
}

// sums: (parts, width), over the rows: the gradient of the bias.
template <typename T>
void gelu_backward(const T* x, const float* bias, const T* gradient, T* into, float* sums, int64_t rows, int width,
                   int threads) {
    const Parts parts(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parts.count > 1)
    for (int part = 0; part < parts.count; ++part) {
        const FlushDenormals flushed;
        float* to_bias = sums + int64_t(part) * width;
        std::fill_n(to_bias, width, 0.0f);
        for (int64_t r = parts.bound(part); r < parts.bound(part + 1); ++r)
            over(width, [&](int c, auto... count) {
                const V at = row(x + r * width + c, count...) + row(bias + c, count...);
                const V back = row(gradient + r * width + c, count...) * Normal(at).slope(at);
                put(back, into + r * width + c, count...);
                put(row(to_bias + c, count...) + back, to_bias + c, count...);
            });
    }
}

}  // namespace

#define RESIDUAL(NAME, X, B)                                                                                          \
    extern "C" void residual_forward_##NAME(const X* x, const B* branch, const float* added, const float* factors,    \
                                            int64_t each, X* sum, const float* weight, const float* bias, B* out,     \
                                            float* statistics, int64_t rows, int width, float epsilon, int threads) { \
        residual_forward<X, B>(x, branch, added, factors, each, sum, weight, bias, out, statistics, rows, width,      \
                               epsilon, threads);                                                                     \
    }                                                                                                                 \
    extern "C" void residual_backward_##NAME(const X* sum, const float* weight, const float* statistics,              \
                                             const B* coming, const X* also, const float* factors, int64_t each,      \
                                             X* into, B* to_branch, float* norm_sums, float* branch_sums,             \
                                             int64_t rows, int width, int threads) {                                  \
        residual_backward<X, B>(sum, weight, statistics, coming, also, factors, each, into, to_branch, norm_sums,     \
                                branch_sums, rows, width, threads);                                                   \
    }
#define GELU(NAME, T)                                                                                                 \
    extern "C" void gelu_forward_##NAME(const T* x, const float* bias, T* out, int64_t rows, int width, int threads) { \
        gelu_forward<T>(x, bias, out, rows, width, threads);                                                          \
    }                                                                                                                 \
    extern "C" void gelu_backward_##NAME(const T* x, const float* bias, const T* gradient, T* into, float* sums,      \
                                         int64_t rows, int width, int threads) {                                      \
        gelu_backward<T>(x, bias, gradient, into, sums, rows, width, threads);                                        \
    }

RESIDUAL(float32, float, float)
RESIDUAL(bfloat16, uint16_t, uint16_t)
RESIDUAL(mixed, float, uint16_t)  // a stream of float32, branches of bfloat16
GELU(float32, float)
GELU(bfloat16, uint16_t)

extern "C" int row_parts(int64_t rows) { return Parts(rows).count; }
