// Philox 4x64 with 10 rounds: a number that is a function of a key and a counter. Source: J. Salmon, M. Moraes, R. Dror, D. Shaw,
// "Parallel random numbers: as easy as 1, 2, 3" (2011).
#pragma once

#include <array>
#include <cstdint>

namespace ernie45 {

struct WideProduct {
    std::uint64_t high, low;
};

// a x b in full, by halves: not every compiler has integers of 128 bits.
inline WideProduct multiply_wide(std::uint64_t a, std::uint64_t b) {
    constexpr std::uint64_t mask = 0xFFFFFFFF;
    const std::uint64_t low = (a & mask) * (b & mask), left = (a >> 32) * (b & mask), right = (a & mask) * (b >> 32);
    const std::uint64_t middle = (low >> 32) + (left & mask) + (right & mask);
    return {(a >> 32) * (b >> 32) + (left >> 32) + (right >> 32) + (middle >> 32), a * b};
}

inline std::array<std::uint64_t, 4> philox(std::array<std::uint64_t, 4> x, std::array<std::uint64_t, 2> key) {
    for (int round = 0; round < 10; ++round) {
        const WideProduct first = multiply_wide(0xD2E7470EE14C6C93, x[0]), second = multiply_wide(0xCA5A826395121157, x[2]);
        x = {second.high ^ x[1] ^ key[0], second.low, first.high ^ x[3] ^ key[1], first.low};
        key[0] += 0x9E3779B97F4A7C15;
        key[1] += 0xBB67AE8584CAA73B;
    }
    return x;
}

}  // namespace ernie45
