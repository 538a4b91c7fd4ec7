// float16 to float32 in portable C++. Included by files without special flags only; the others have an instruction for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ernie45 {

inline float half_to_float(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t exponent = (half >> 10) & 31u, mantissa = half & 1023u;
    float magnitude;
    if (exponent == 0) {
        magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    } else {
        const std::uint32_t bits = exponent == 31 ? 0x7F800000u | (mantissa << 13) : ((exponent + 112) << 23) | (mantissa << 13);
        std::memcpy(&magnitude, &bits, sizeof magnitude);
    }
    return sign ? -magnitude : magnitude;
}

}  // namespace ernie45
