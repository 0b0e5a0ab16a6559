// Rows dealt out in blocks, and room for what is worked on; for both kernels of the MLP.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int ROWS = 128;  // worked on at a time

// Whole blocks of ROWS rows, the last of what is left.
struct Blocks {
    int64_t rows, blocks;
    int parts;
    explicit Blocks(int64_t n) : rows(n), blocks((n + ROWS - 1) / ROWS), parts(int(std::min<int64_t>(PARTS, blocks))) {}
    int64_t bound(int part) const { return std::min(blocks * part / parts * ROWS, rows); }
};

inline int up(int n, int to) { return (n + to - 1) / to * to; }

// Memory that begins where a line of the cache does.
template <typename N>
class Room {
    std::vector<N> held;
public:
    N* at;
    explicit Room(int64_t count) : held(count + 64 / sizeof(N)) {
        at = (N*)(((uintptr_t)held.data() + 63) & ~uintptr_t(63));
    }
    Room(Room&&) = default;
    operator N*() const { return at; }
};

}  // namespace
