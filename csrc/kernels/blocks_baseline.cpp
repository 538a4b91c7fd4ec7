// Block kernels in portable C++: the definition that the other files must equal bit for bit. See packed.hpp.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels/exponential.hpp"
#include "kernels/half.hpp"
#include "kernels/packed.hpp"

namespace ernie45 {
namespace {

template <bool Wide>
using Value = std::conditional_t<Wide, std::int16_t, std::int8_t>;

// The code of a weight: row r of the 16, from 0 on.
template <int Bits>
int code(const std::uint8_t* group, std::size_t r, std::size_t column) {
    if (Bits == 8) return group[column / 4 * 64 + 4 * r + column % 4];
    const std::uint8_t byte = group[column / 8 * 64 + 4 * r + column % 4];
    return column % 8 < 4 ? byte & 15 : byte >> 4;
}

// Sum of one row over some columns of a group, exact.
template <int Bits, bool Wide>
std::int32_t dot(const std::uint8_t* group, std::size_t r, const std::uint8_t* values, std::size_t first, std::size_t end, int offset) {
    std::int32_t sum = 0;
    for (std::size_t column = first; column < end; ++column) {
        Value<Wide> x;
        std::memcpy(&x, values + column * sizeof x, sizeof x);
        sum += (code<Bits>(group, r, column) - offset) * x;
    }
    return sum;
}

template <int Bits, bool Wide>
void block(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
           const Rounded& x, std::size_t tokens, float* out) {
    std::memset(out, 0, tokens * kRows * sizeof(float));
    for (std::size_t g = 0; g < groups; ++g) {
        const std::uint8_t* group = weights + g * kRows * kGroup * Bits / 8;
        for (std::size_t r = 0; r < kRows; ++r) {
            const float scale = half_to_float(scales[g / groups_per_scale * kRows + r]);
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::size_t at = g * x.height + x.first + t;
                const std::int32_t sum = dot<Bits, Wide>(group, r, x.values + at * sizeof(Value<Wide>) * kGroup, 0, kGroup,
                                                         Bits == 4 ? kOffset4 : kOffset8);
                float& y = out[t * kRows + r];
                y = std::fma(static_cast<float>(sum), scale * x.scales[at], y);
            }
        }
    }
}

template <bool Wide>
void block_minima(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t, const Rounded& x,
                  std::size_t tokens, float* out) {
    std::memset(out, 0, tokens * kRows * sizeof(float));
    for (std::size_t h = 0; h < 2 * groups; ++h) {
        const std::size_t g = h / 2, first = h % 2 * kHalf;
        const std::uint8_t* group = weights + g * kRows * kGroup / 2;
        for (std::size_t r = 0; r < kRows; ++r) {
            const float scale = half_to_float(scales[h * 2 * kRows + r]);
            const float minimum = half_to_float(scales[h * 2 * kRows + kRows + r]);
            for (std::size_t t = 0; t < tokens; ++t) {
                const std::size_t at = g * x.height + x.first + t;
                const std::uint8_t* values = x.values + at * sizeof(Value<Wide>) * kGroup;
                const std::int32_t x_sum = x.sums[h * x.height + x.first + t];
                const std::int32_t sum = dot<4, Wide>(group, r, values, first, first + kHalf, 0);
                float& y = out[t * kRows + r];
                y = std::fma(static_cast<float>(sum), scale * x.scales[at], y);
                y = std::fma(minimum, x.scales[at] * static_cast<float>(x_sum), y);
            }
        }
    }
}

template <bool Wide>
void round_group(const float* x, std::size_t row, std::size_t height, std::uint8_t* values, float* scales, std::int32_t* sums) {
    constexpr float top = Wide ? kWidest : kNarrowest;
    float largest = 0;
    for (std::size_t i = 0; i < kGroup; ++i) largest = std::fmax(largest, std::fabs(x[i]));
    const float inverse = largest >= kSmallest ? top / largest : 0.0f;
    scales[row] = largest / top;
    sums[row] = sums[height + row] = 0;
    for (std::size_t i = 0; i < kGroup; ++i) {
        const auto value = static_cast<Value<Wide>>(std::nearbyint(x[i] * inverse));
        std::memcpy(values + (row * kGroup + i) * sizeof value, &value, sizeof value);
        sums[i / kHalf * height + row] += value;
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
    static constexpr BlockKernels kernels{
        {block<4, false>, block<4, true>},         {block<8, false>, block<8, true>}, {block_minima<false>, block_minima<true>},
        {round_group<false>, round_group<true>}, swiglu, 8};
    return kernels;
}

}  // namespace ernie45
