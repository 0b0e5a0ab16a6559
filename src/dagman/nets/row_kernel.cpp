// What is done to each token by itself: LayerNorm with its gradients, and the gradients of GELU; float32 inside.
//
// Rows are dealt out in parts that do not depend on the threads: sums come out the same with any.

#include <algorithm>
#include <cmath>
#include <cstdint>

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

// statistics: mean and 1 / standard deviation of each row.
template <typename T>
void norm_forward(const T* x, const float* weight, const float* bias, T* out, float* statistics, int64_t rows,
                  int width, float epsilon, int threads) {
    const Parts parts(rows);
    const int whole = width / W * W, rest = width - whole;
    const V inside = ones(rest);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parts.count > 1)
    for (int part = 0; part < parts.count; ++part) {
        const FlushDenormals flushed;
        for (int64_t r = parts.bound(part); r < parts.bound(part + 1); ++r) {
            const T* from = x + r * width;
            V sum = {}, square = {};
            for (int c = 0; c < whole; c += W) sum += row(from + c, W);
            if (rest) sum += row(from + whole, rest);
            const float mean = total(sum) / width;
            for (int c = 0; c < whole; c += W) {
                const V far = row(from + c, W) - mean;
                square += far * far;
            }
            if (rest) {
                const V far = (row(from + whole, rest) - mean) * inside;
                square += far * far;
            }
            const float scale = 1.0f / std::sqrt(total(square) / width + epsilon);
            for (int c = 0; c < width; c += W) {
                const int count = std::min(W, width - c);
                const V slope = row(weight + c, count) * scale;
                put((row(from + c, count) - mean) * slope + row(bias + c, count), out + r * width + c, count);
            }
            if (statistics) statistics[2 * r] = mean, statistics[2 * r + 1] = scale;
        }
    }
}

// sums: (parts, 2, width), of the weight's and the bias's gradient.
template <typename T>
void norm_backward(const T* x, const float* weight, const float* statistics, const T* gradient, T* into, float* sums,
                   int64_t rows, int width, int threads) {
    const Parts parts(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parts.count > 1)
    for (int part = 0; part < parts.count; ++part) {
        const FlushDenormals flushed;
        float *to_weight = sums + int64_t(part) * 2 * width, *to_bias = to_weight + width;
        std::fill_n(to_weight, 2 * width, 0.0f);
        for (int64_t r = parts.bound(part); r < parts.bound(part + 1); ++r) {
            const T *from = x + r * width, *coming = gradient + r * width;
            const float mean = statistics[2 * r], scale = statistics[2 * r + 1];
            V sum = {}, along = {};
            for (int c = 0; c < width; c += W) {
                const int count = std::min(W, width - c);
                const V g = row(coming + c, count), unit = (row(from + c, count) - mean) * scale;
                const V weighed = g * row(weight + c, count);
                sum += weighed;
                along += weighed * unit;
                put(row(to_weight + c, count) + g * unit, to_weight + c, count);
                put(row(to_bias + c, count) + g, to_bias + c, count);
            }
            const float level = total(sum) / width, tilt = total(along) / width;
            for (int c = 0; c < width; c += W) {
                const int count = std::min(W, width - c);
                const V unit = (row(from + c, count) - mean) * scale;
                const V weighed = row(coming + c, count) * row(weight + c, count);
                put((weighed - level - unit * tilt) * scale, into + r * width + c, count);
            }
        }
    }
}

// The normal distribution function (Abramowitz and Stegun 7.1.26, within 1e-7) and x times its density.
inline V gelu_slope(V x) {
    const V bell = power_of_two(x * x * (-0.5f * LOG2_E));
    const V t = reciprocal(largest(x, -x) * 0.2316418882f + 1.0f);
    V p = V{} + 0.5307027145f;
    p = p * t - 0.7265760135f;
    p = p * t + 0.7107068705f;
    p = p * t - 0.142248368f;
    p = p * t + 0.127414796f;
    const V tail = p * t * bell;
    return (x > 0.0f ? 1.0f - tail : tail) + x * bell * 0.3989422804f;
}

// sums: (parts, width), over the rows: the gradient of a bias before the GELU.
template <typename T>
void gelu_backward(const T* x, const T* gradient, T* into, float* sums, int64_t rows, int width, int threads) {
    const Parts parts(rows);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (parts.count > 1)
    for (int part = 0; part < parts.count; ++part) {
        const FlushDenormals flushed;
        float* to_bias = sums + int64_t(part) * width;
        std::fill_n(to_bias, width, 0.0f);
        for (int64_t r = parts.bound(part); r < parts.bound(part + 1); ++r)
            for (int c = 0; c < width; c += W) {
                const int count = std::min(W, width - c);
                const V back = row(gradient + r * width + c, count) * gelu_slope(row(x + r * width + c, count));
                put(back, into + r * width + c, count);
                put(row(to_bias + c, count) + back, to_bias + c, count);
            }
    }
}

}  // namespace

#define EXPORTED(NAME, T)                                                                                             \
    extern "C" void norm_forward_##NAME(const T* x, const float* weight, const float* bias, T* out, float* statistics, \
                                        int64_t rows, int width, float epsilon, int threads) {                         \
        norm_forward<T>(x, weight, bias, out, statistics, rows, width, epsilon, threads);                              \
    }                                                                                                                  \
    extern "C" void norm_backward_##NAME(const T* x, const float* weight, const float* statistics, const T* gradient,  \
                                         T* into, float* sums, int64_t rows, int width, int threads) {                 \
        norm_backward<T>(x, weight, statistics, gradient, into, sums, rows, width, threads);                           \
    }                                                                                                                  \
    extern "C" void gelu_backward_##NAME(const T* x, const T* gradient, T* into, float* sums, int64_t rows, int width, \
                                         int threads) {                                                                \
        gelu_backward<T>(x, gradient, into, sums, rows, width, threads);                                               \
    }

EXPORTED(float32, float)
EXPORTED(bfloat16, uint16_t)

extern "C" int row_parts(int64_t rows) { return Parts(rows).count; }
