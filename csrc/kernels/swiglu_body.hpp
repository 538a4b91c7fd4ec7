// The activation's kernels, written once. Included by the file of each instruction set, whose flags decide about the registers.
#pragma once

#include "kernels/lanes.hpp"
#include "kernels/swiglu.hpp"

namespace ernie45 {
namespace {

// The last values of a row come as the others, padded with zeros.
inline Lanes load_some(const float* x, std::size_t count) { return count < kLanes ? load_part(x, count) : load(x); }
inline void store_some(float* x, const Lanes& a, std::size_t count) {
    if (count < kLanes) {
        store_part(x, a, count);
    } else {
        store(x, a);
    }
}

inline Lanes one_plus_exponential(const Lanes& gate) { return add(all(1), exponential(subtract(all(0), gate))); }

inline void forward_row(const float* products, std::size_t width, float* hidden) {
    for (std::size_t i = 0; i < width; i += kLanes) {
        const std::size_t count = width - i;
        const Lanes gate = load_some(products + i, count), up = load_some(products + width + i, count);
        store_some(hidden + i, multiply(divide(gate, one_plus_exponential(gate)), up), count);
    }
}

inline float backward_row(const float* products, std::size_t width, float weight, float* gradient, float* d_products) {
    Lanes dot = all(0);
    const Lanes weights = all(weight);
    for (std::size_t i = 0; i < width; i += kLanes) {
        const std::size_t count = width - i;
        const Lanes gate = load_some(products + i, count), up = load_some(products + width + i, count);
        const Lanes sigmoid = divide(all(1), one_plus_exponential(gate)), silu = multiply(gate, sigmoid);
        const Lanes hidden = multiply(silu, up), d_hidden = load_some(gradient + i, count);
        dot = fma(hidden, d_hidden, dot);
        const Lanes weighted = multiply(d_hidden, weights);
        const Lanes slope = fma(silu, subtract(all(1), sigmoid), sigmoid);
        store_some(gradient + i, multiply(hidden, weights), count);
        store_some(d_products + i, multiply(multiply(weighted, up), slope), count);
        store_some(d_products + width + i, multiply(weighted, silu), count);
    }
    return fold(dot);
}

constexpr SwigluKernels kSwiglu{forward_row, backward_row};

}  // namespace
}  // namespace ernie45
