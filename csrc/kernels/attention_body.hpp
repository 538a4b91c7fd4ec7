// The parts of the attention kernels that are written once, on `Lanes`. Included by the file of each instruction set.
#pragma once

#include <limits>

#include "kernels/attention.hpp"
#include "kernels/lanes.hpp"

namespace ernie45 {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

inline void widen_bfloat16(const std::uint16_t* x, std::size_t count, float* out) {
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t bits = static_cast<std::uint32_t>(x[i]) << 16;
        std::memcpy(out + i, &bits, sizeof bits);
    }
}

inline void widen_int8(const std::int8_t* x, float scale, std::size_t count, float* out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(x[i]) * scale;
}

// Lanes hold two keys of 8 rows.
inline void softmax(float* scores, std::size_t keys, float* maxima, float* sums) {
    const std::size_t padded = (keys + 3) / 4 * 4;
    for (std::size_t i = keys * kTileRows; i < padded * kTileRows; ++i) scores[i] = kNone;
    Lanes largest = load(scores);
    for (std::size_t key = 2; key < padded; key += 2) largest = larger(largest, load(scores + key * kTileRows));
    float both[kLanes];
    store(both, largest);
    for (std::size_t i = 0; i < kTileRows; ++i) {
        maxima[i] = both[i] > both[i + kTileRows] ? both[i] : both[i + kTileRows];
        both[i] = both[i + kTileRows] = maxima[i];
    }
    largest = load(both);
    Lanes sum[2] = {all(0), all(0)};
    for (std::size_t key = 0; key < padded; key += 4) {
        for (std::size_t half = 0; half < 2; ++half) {
            float* at = scores + (key + 2 * half) * kTileRows;
            const Lanes s = load(at), p = zero_where(exponential(subtract(s, largest)), s, kNone);
            store(at, p);
            sum[half] = add(sum[half], p);
        }
    }
    store(both, add(sum[0], sum[1]));
    for (std::size_t i = 0; i < kTileRows; ++i) sums[i] = both[i] + both[i + kTileRows];
}

inline void join(const float* block_maxima, const float* block_sums, const float* block_o, std::size_t rows, std::size_t dim,
                 float* maxima, float* sums, float* o) {
    // Lanes 0 to 7: maxima so far; 8 to 15: those of the block. One exponential serves both.
    float before[kLanes], after[kLanes], factors[kLanes];
    std::memcpy(before, maxima, kTileRows * sizeof(float));
    std::memcpy(before + kTileRows, block_maxima, kTileRows * sizeof(float));
    for (std::size_t i = 0; i < kTileRows; ++i) {
        after[i] = after[i + kTileRows] = before[i] > before[i + kTileRows] ? before[i] : before[i + kTileRows];
    }
    store(factors, exponential(subtract(load(before), load(after))));
    for (std::size_t row = 0; row < rows; ++row) {
        if (block_maxima[row] == kNone) continue;  // this row sees nothing of the block
        maxima[row] = after[row];
        const float old_factor = factors[row], new_factor = factors[row + kTileRows];
        const float added = block_sums[row] * new_factor;
        sums[row] = __builtin_fmaf(sums[row], old_factor, added);
        const Lanes wide_old = all(old_factor), wide_new = all(new_factor);
        for (std::size_t d = row * dim; d < (row + 1) * dim; d += kLanes) {
            store(o + d, fma(load(o + d), wide_old, multiply(load(block_o + d), wide_new)));
        }
    }
}

inline void finish(const float* o, float sum, std::size_t dim, float* out) {
    const Lanes wide = all(sum);
    for (std::size_t d = 0; d < dim; d += kLanes) store(out + d, divide(load(o + d), wide));
}

}  // namespace
}  // namespace ernie45
