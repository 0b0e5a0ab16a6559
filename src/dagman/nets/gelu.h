// GELU and its slope for vectors of float32.

#pragma once

#include "vectors.h"

namespace {

// The normal distribution function (Abramowitz and Stegun 7.1.26, within 1e-7) and x times its density.
struct Normal {
    V below, bell;
    explicit Normal(V x) : below(), bell(power_of_two(x * x * (-0.5f * LOG2_E))) {
        const V t = reciprocal(magnitude(x) * 0.2316418882f + 1.0f);
        V p = V{} + 0.5307027145f;
        p = p * t - 0.7265760135f;
        p = p * t + 0.7107068705f;
        p = p * t - 0.142248368f;
        p = p * t + 0.127414796f;
        const V tail = p * t * bell;
        below = x > 0.0f ? 1.0f - tail : tail;
    }
    V slope(V x) const { return below + x * bell * 0.3989422804f; }  // of GELU
};
inline V gelu(V x) { return x * Normal(x).below; }

}  // namespace
