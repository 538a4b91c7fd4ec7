// The sampling kernels, written once. Included by the file of each instruction set, whose flags decide about the registers.
#pragma once

#include <limits>

#include "kernels/double_lanes.hpp"
#include "kernels/sampling.hpp"

namespace ernie45 {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// body(lanes, i) for every sixteen values; behind the last one -inf, which weighs nothing.
template <typename Body>
inline void for_lanes(const float* x, std::size_t count, const Body& body) {
    const std::size_t whole = count / kLanes * kLanes;
    for (std::size_t i = 0; i < whole; i += kLanes) body(load(x + i), i);
    if (whole == count) return;
    float padded[kLanes];
    for (std::size_t j = 0; j < kLanes; ++j) padded[j] = whole + j < count ? x[whole + j] : kNone;
    body(load(padded), whole);
}

// Of two numbers `larger` gives the second where one is NaN. Four at a time, because one would wait for the one before.
inline float largest(const float* x, std::size_t count) {
    constexpr std::size_t step = 4 * kLanes;
    const std::size_t whole = count / step * step;
    Lanes a = all(kNone), b = a, c = a, d = a;
    for (std::size_t i = 0; i < whole; i += step) {
        a = larger(load(x + i), a);
        b = larger(load(x + i + kLanes), b);
        c = larger(load(x + i + 2 * kLanes), c);
        d = larger(load(x + i + 3 * kLanes), d);
    }
    for_lanes(x + whole, count - whole, [&](const Lanes& values, std::size_t) { a = larger(values, a); });
    return largest_of(larger(larger(a, b), larger(c, d)));
}

inline Doubles weights_of(const Lanes& values, const Lanes& best, const Doubles& rate) {
    return exponential_below_1(multiply(widen(subtract(values, best)), rate));
}

inline void weights(const float* x, std::size_t count, float best, double rate, double* out) {
    const Lanes wide = all(best);
    const Doubles rates = all_double(rate);
    for_lanes(x, count, [&](const Lanes& values, std::size_t i) {
        double found[kLanes];
        store(found, weights_of(values, wide, rates));
        const std::size_t now = count - i < kLanes ? count - i : kLanes;
        std::memcpy(out + i, found, now * sizeof(double));
    });
}

inline double weight_sum(const float* x, std::size_t count, float best, double rate) {
    const Lanes wide = all(best);
    const Doubles rates = all_double(rate);
    Doubles sum = all_double(0);
    for_lanes(x, count, [&](const Lanes& values, std::size_t) { sum = add(sum, weights_of(values, wide, rates)); });
    return fold(sum);
}

inline double exponential_sum(const float* x, std::size_t count, float best) {
    const Lanes wide = all(best);
    Doubles sum = all_double(0);
    for_lanes(x, count, [&](const Lanes& values, std::size_t) {
        sum = add(sum, widen(zero_where(exponential(subtract(values, wide)), values, kNone)));
    });
    return fold(sum);
}

constexpr SamplingKernels kSampling{largest, weights, weight_sum, exponential_sum};

}  // namespace
}  // namespace ernie45
