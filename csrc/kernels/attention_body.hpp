// The parts of the attention kernels that are written once, on `Lanes`. Included by the file of each instruction set.
#pragma once

#include <limits>
#include <type_traits>

#include "kernels/attention.hpp"
#include "kernels/lanes.hpp"

namespace ernie45 {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

inline void widen_int8(const std::int8_t* x, float scale, std::size_t count, float* out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(x[i]) * scale;
}

constexpr std::size_t element_bytes(KvType type) {
    return type == KvType::kFloat32 ? sizeof(float) : type == KvType::kBfloat16 ? sizeof(std::uint16_t) : sizeof(std::int8_t);
}

// Calls body(std::integral_constant<KvType, type>).
template <typename Body>
inline void with_type(KvType type, const Body& body) {
    switch (type) {
        case KvType::kFloat32: return body(std::integral_constant<KvType, KvType::kFloat32>());
        case KvType::kBfloat16: return body(std::integral_constant<KvType, KvType::kBfloat16>());
        case KvType::kInt8: return body(std::integral_constant<KvType, KvType::kInt8>());
    }
}

inline void softmax(float* scores, std::size_t keys, std::size_t end, float* maximum, float* sum) {
    const std::size_t padded = (keys + kLanes - 1) / kLanes * kLanes;
    for (std::size_t key = keys; key < padded; ++key) scores[key] = kNone;
    for (std::size_t key = padded; key < end; ++key) scores[key] = 0;
    Lanes largest = all(kNone), total = all(0);
    for (std::size_t key = 0; key < padded; key += kLanes) largest = larger(largest, load(scores + key));
    *maximum = largest_of(largest);
    largest = all(*maximum);
    for (std::size_t key = 0; key < padded; key += kLanes) {
        const Lanes s = load(scores + key), p = zero_where(exponential(subtract(s, largest)), s, kNone);
        store(scores + key, p);
        total = add(total, p);
    }
    *sum = fold(total);
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
