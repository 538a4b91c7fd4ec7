// Constants of e^x = 2^n e^r with n = round(x / ln 2): a polynomial of degree 7 in r on [-ln 2 / 2, ln 2 / 2] (Taylor terms; the relative
// error there is below 2e-7) and ln 2 in two parts, so that n ln 2 is subtracted without rounding. Every file evaluates it with
// the same fused multiply-adds in the same order.
#pragma once

#include <cstddef>

namespace ernie45 {

constexpr float kExpLowest = -87.0f, kExpHighest = 88.0f;  // the result stays a normal number
constexpr float kLog2E = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
constexpr std::size_t kExpCount = 8;
constexpr float kExpTerms[kExpCount] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};

}  // namespace ernie45
