// Block kernels in portable C++: the definition that the other files must equal bit for bit. See packed.hpp.
#include <cmath>
#include <cstring>

#include "kernels/exponential.hpp"
#include "kernels/half.hpp"
#include "kernels/packed.hpp"

namespace ernie45 {
namespace {

// Sum of one row of a group: row r of the 16, exact.
template <int Bits>
std::int32_t dot(const std::uint8_t* group, std::size_t r, const std::int8_t* x) {
    std::int32_t sum = 0;
    for (std::size_t column = 0; column < kGroup; ++column) {
        if (Bits == 8) {
            sum += (group[column / 4 * 64 + 4 * r + column % 4] - kOffset8) * x[column];
        } else {
            const std::uint8_t byte = group[column / 8 * 64 + 4 * r + column % 4];
            sum += ((column % 8 < 4 ? byte & 15 : byte >> 4) - kOffset4) * x[column];
        }
    }
    return sum;
}

template <int Bits>
void block(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
           const Rounded& x, std::size_t tokens, float* out) {
    std::memset(out, 0, tokens * kRows * sizeof(float));
    for (std::size_t g = 0; g < groups; ++g) {
        const std::uint8_t* group = weights + g * kRows * kGroup * Bits / 8;
        for (std::size_t r = 0; r < kRows; ++r) {
            const float scale = half_to_float(scales[g / groups_per_scale * kRows + r]);
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::int32_t sum = dot<Bits>(group, r, x.values + (t * groups + g) * kGroup);
                float& y = out[t * kRows + r];
                y = std::fma(static_cast<float>(sum), scale * x.scales[t * groups + g], y);
            }
        }
    }
}

void round_group(const float* x, std::int8_t* values, float* scale, std::int32_t* sum) {
    float largest = 0;
    for (std::size_t i = 0; i < kGroup; ++i) largest = std::fmax(largest, std::fabs(x[i]));
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    *scale = largest / 127.0f;
    *sum = 0;
    for (std::size_t i = 0; i < kGroup; ++i) {
        values[i] = static_cast<std::int8_t>(std::nearbyint(x[i] * inverse));
        *sum += values[i];
    }
}

float exponential(float x) {
    x = std::fmin(std::fmax(x, kExpLowest), kExpHighest);
    const float n = std::nearbyint(x * kLog2E);
    float r = std::fma(-n, kLn2High, x);
    r = std::fma(-n, kLn2Low, r);
    float p = kExpTerms[0];
    for (std::size_t i = 1; i < kExpCount; ++i) p = std::fma(p, r, kExpTerms[i]);
    return std::ldexp(p, static_cast<int>(n));
}

void swiglu(const float* gate, const float* up, float* out) {
    for (std::size_t i = 0; i < kRows; ++i) out[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
}

}  // namespace

const BlockKernels& baseline_blocks() {
    static constexpr BlockKernels kernels{block<4>, block<8>, round_group, swiglu};
    return kernels;
}

}  // namespace ernie45
