// Vectors of float32 for AVX-512 (with and without its rounding to bfloat16) and AVX2, rows of float32 and bfloat16 to
// and from them.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr int PARTS = 16;
constexpr float LOG2_E = 1.44269504088896341f;

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));

inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
#ifdef __AVX512F__
inline V largest(V a, V b) { return _mm512_max_ps(a, b); }
inline V reciprocal(V x) {
    const V near = _mm512_rcp14_ps(x);
    return near * (2.0f - x * near);
}
inline V magnitude(V x) { return _mm512_abs_ps(x); }
#else
inline V largest(V a, V b) { return _mm256_max_ps(a, b); }
inline V reciprocal(V x) { return 1.0f / x; }
inline V magnitude(V x) { return (V)((I)x & 0x7fffffff); }
#endif

// 2^r for r from -1/2 to 1/2, within 3e-9.
inline V power_of_rest(V r) {
    V p = V{} + 1.55946776e-4f;
    p = p * r + 1.34066439e-3f;
    p = p * r + 9.61769297e-3f;
    p = p * r + 5.55031055e-2f;
    p = p * r + 2.40226528e-1f;
    p = p * r + 6.93147215e-1f;
    return p * r + 1.0f;
}

// 2^x for x of at most 0, and 0 below 2^-126. What is no number stays none.
inline V power_of_two(V x) {
#ifdef __AVX512F__
    x = largest(V{} - 200.0f, x);  // the second, where one is no number
    const V whole = _mm512_roundscale_ps(x, 0);
    return _mm512_scalef_ps(power_of_rest(x - whole), whole);
#else
    const V magic = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const I kept = ~(x < -126.0f);
    x = largest(V{} - 126.0f, x);
    const V t = x + magic, p = power_of_rest(x - (t - magic));
    return (V)(((I)p + ((I)t << 23)) & kept);
#endif
}

// To the nearest number of bfloat16, the even one of two: it stands in the upper half of the bits.
inline I rounded(V x) {
    const I bits = (I)x;
    return x == x ? bits + 0x7fff + ((bits >> 16) & 1) : I{} + 0x7fc00000;
}
#if defined(__AVX512BF16__)
inline __m256i halves(V x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#elif defined(__AVX512F__)
inline __m256i halves(V x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)rounded(x), 16)); }
#endif

// A row of up to W numbers in its own precision: what is beyond `count` is zero, or is left as it is.
#ifdef __AVX512F__
inline V row(const float* p, int count) { return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p); }
inline V row(const uint16_t* p, int count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p);
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
inline void put(V x, float* p, int count) { _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), x); }
inline void put(V x, uint16_t* p, int count) {
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), halves(x));
}
#else
inline __m256i some(int count) {
    static const int32_t bits[2 * W] = {-1, -1, -1, -1, -1, -1, -1, -1};
    return _mm256_loadu_si256((const __m256i*)(bits + W - count));
}
inline V row(const float* p, int count) { return _mm256_maskload_ps(p, some(count)); }
inline V row(const uint16_t* p, int count) {
    __m128i bits;
    if (count == W) {
        bits = _mm_loadu_si128((const __m128i*)p);
    } else if (count == W / 2) {
        bits = _mm_loadl_epi64((const __m128i*)p);
    } else {
        uint16_t halves[W] = {};
        for (int c = 0; c < count; ++c) halves[c] = p[c];
        bits = _mm_loadu_si128((const __m128i*)halves);
    }
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
inline void put(V x, float* p, int count) { _mm256_maskstore_ps(p, some(count), x); }
inline void put(V x, uint16_t* p, int count) {
    const __m256i high = _mm256_srli_epi32((__m256i)rounded(x), 16);
    const __m128i bits = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    if (count == W) {
        _mm_storeu_si128((__m128i*)p, bits);
    } else if (count == W / 2) {
        _mm_storel_epi64((__m128i*)p, bits);
    } else {
        uint16_t halves[W];
        _mm_storeu_si128((__m128i*)halves, bits);
        for (int c = 0; c < count; ++c) p[c] = halves[c];
    }
}
#endif

// A whole vector.
inline V row(const float* p) { return load(p); }
inline void put(V x, float* p) { store(p, x); }
#ifdef __AVX512F__
inline V row(const uint16_t* p) {
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline void put(V x, uint16_t* p) {
    _mm256_storeu_si256((__m256i*)p, halves(x));
}
#else
inline V row(const uint16_t* p) { return row(p, W); }
inline void put(V x, uint16_t* p) { put(x, p, W); }
#endif

// What `put` leaves of a number.
inline V stored(V x, const float*) { return x; }
#ifdef __AVX512F__
inline V stored(V x, const uint16_t*) { return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(x)), 16); }
#else
inline V stored(V x, const uint16_t*) { return (V)(rounded(x) & int32_t(0xffff0000)); }
#endif

// W rows of W become columns.
inline void transpose(V v[W]) {
#ifdef __AVX512F__
    const I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int step = 1; step < W; step *= 2) {
        const I odd = (lane & step) != 0;  // all bits set where true; sources of the second row count from 16
        const I first = odd ? lane - step + 16 : lane, second = odd ? lane + 16 : lane + step;
        for (int i = 0; i < W; ++i) {
            if (i & step) continue;
            const __m512 a = v[i], b = v[i + step];
            v[i] = _mm512_permutex2var_ps(a, (__m512i)first, b);
            v[i + step] = _mm512_permutex2var_ps(a, (__m512i)second, b);
        }
    }
#else
    __m256 pair[8], four[8];
    for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        pair[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; ++k) {
            four[i + 2 * k] = _mm256_shuffle_ps(pair[i + k], pair[i + 2 + k], 0x44);
            four[i + 2 * k + 1] = _mm256_shuffle_ps(pair[i + k], pair[i + 2 + k], 0xee);
        }
    for (int i = 0; i < 4; ++i) {
        v[i] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x20);
        v[i + 4] = _mm256_permute2f128_ps(four[i], four[i + 4], 0x31);
    }
#endif
}

inline float total(V v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps(v);
#else
    const __m128 half = _mm256_castps256_ps128(v) + _mm256_extractf128_ps(v, 1);
    const __m128 pair = half + _mm_movehl_ps(half, half);
    return pair[0] + pair[1];
#endif
}

struct FlushDenormals {
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
};

}  // namespace
