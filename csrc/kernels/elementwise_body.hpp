// The elementwise kernels, written once. Included by the file of each instruction set, whose flags decide about the registers. Loops
// without `Lanes` hold exact operations or one rounding per value, so that the compiler's vectors cannot change a bit.
#pragma once

#include <limits>

#include "kernels/elementwise.hpp"
#include "kernels/lanes.hpp"

namespace ernie45 {
namespace {

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline void norm_row(const float* x, std::size_t width, const float* weight, float eps, const float* residual, float* sum, float* y) {
    const float* h = x;
    if (residual != nullptr) {
        for (std::size_t i = 0; i < width; ++i) sum[i] = x[i] + residual[i];
        h = sum;
    }
    const std::size_t whole = width / kLanes * kLanes, rest = width - whole;
    Lanes squares = all(0);
    for (std::size_t i = 0; i < whole; i += kLanes) squares = fma(load(h + i), load(h + i), squares);
    if (rest != 0) {
        const Lanes last = load_part(h + whole, rest);
        squares = fma(last, last, squares);
    }
    const float mean = fold(squares) / static_cast<float>(width);
    const float factor = 1.0f / __builtin_sqrtf(mean + eps);
    const Lanes wide = all(factor);
    for (std::size_t i = 0; i < whole; i += kLanes) store(y + i, multiply(multiply(load(h + i), wide), load(weight + i)));
    if (rest != 0) {
        const Lanes last = multiply(multiply(load_part(h + whole, rest), wide), load_part(weight + whole, rest));
        store_part(y + whole, last, rest);
    }
}

inline void rotate(const float* x, const float* rotation, std::size_t dim, float* out) {
    for (std::size_t i = 0; i < dim; i += 2) {
        const float a = x[i], b = x[i + 1], c = rotation[i], s = rotation[i + 1];
        const float bs = b * s, as = a * s;
        out[i] = __builtin_fmaf(a, c, -bs);
        out[i + 1] = __builtin_fmaf(b, c, as);
    }
}

inline void to_bfloat16(const float* x, std::size_t count, std::uint16_t* out) {
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t bits = bits_of(x[i]);
        const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        const bool not_a_number = (bits & 0x7FFFFFFFu) > 0x7F800000u;
        out[i] = static_cast<std::uint16_t>(not_a_number ? 0x7FC0u : rounded);
    }
}

inline void to_int8(const float* x, std::size_t count, std::int8_t* out, float* scale) {
    // Magnitudes compare like their bits; a NaN is the largest and makes the scale NaN.
    std::uint32_t largest_bits = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t bits = bits_of(x[i]) & 0x7FFFFFFFu;
        largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    *scale = largest / 127.0f;
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (std::size_t i = 0; i < count; ++i) {
        const float value = __builtin_nearbyintf(x[i] * inverse);
        out[i] = static_cast<std::int8_t>(value >= -127.0f ? (value <= 127.0f ? value : 127.0f) : -127.0f);
    }
}

inline void softmax_row(float* x, std::size_t count) {
    constexpr float none = -std::numeric_limits<float>::infinity();
    float largest = x[0];
    for (std::size_t i = 1; i < count; ++i) largest = x[i] > largest ? x[i] : largest;
    const Lanes wide = all(largest);
    Lanes sum = all(0);
    for (std::size_t i = 0; i < count; i += kLanes) {
        const std::size_t now = count - i < kLanes ? count - i : kLanes;
        float padded[kLanes];
        for (std::size_t j = 0; j < kLanes; ++j) padded[j] = j < now ? x[i + j] : none;
        const Lanes s = load(padded), p = zero_where(exponential(subtract(s, wide)), s, none);
        sum = add(sum, p);
        store_part(x + i, p, now);
    }
    const float total = fold(sum);
    for (std::size_t i = 0; i < count; ++i) x[i] /= total;
}

constexpr ElementwiseKernels kElementwise{norm_row, rotate, to_bfloat16, to_int8, softmax_row};

}  // namespace
}  // namespace ernie45
