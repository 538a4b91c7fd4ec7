// Sixteen float64 values at once, beside the float32 ones of lanes.hpp and under the same rules: two AVX-512 registers, four AVX
// registers or sixteen numbers; each operation rounds once, sums fold in one stated order, and nothing is shared between files.
#pragma once

#include <cstdint>

#include "kernels/lanes.hpp"

namespace ernie45 {
namespace {

#if defined(__AVX512F__)

using Part = __m512d;
inline Part part_all(double x) { return _mm512_set1_pd(x); }
inline Part part_widen(const Lanes& a, std::size_t i) { return _mm512_cvtps_pd(i == 0 ? lower(a) : upper(a)); }
inline void part_store(double* x, Part a) { _mm512_storeu_pd(x, a); }
inline Part part_add(Part a, Part b) { return _mm512_add_pd(a, b); }
inline Part part_subtract(Part a, Part b) { return _mm512_sub_pd(a, b); }
inline Part part_multiply(Part a, Part b) { return _mm512_mul_pd(a, b); }
inline Part part_larger(Part a, Part b) { return _mm512_max_pd(a, b); }
inline Part part_fma(Part a, Part b, Part c) { return _mm512_fmadd_pd(a, b, c); }
inline Part part_raise(Part a, Part n) {
    return _mm512_castsi512_pd(_mm512_add_epi64(_mm512_castpd_si512(a), _mm512_slli_epi64(_mm512_castpd_si512(n), 52)));
}
inline Part part_zero_below(Part a, Part b, Part limit) { return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(b, limit, _CMP_NLT_UQ), a); }

#elif defined(__AVX2__)

using Part = __m256d;
inline Part part_all(double x) { return _mm256_set1_pd(x); }
inline Part part_widen(const Lanes& a, std::size_t i) {
    const __m256 half = i < 2 ? a.low : a.high;
    return _mm256_cvtps_pd(i % 2 == 0 ? _mm256_castps256_ps128(half) : _mm256_extractf128_ps(half, 1));
}
inline void part_store(double* x, Part a) { _mm256_storeu_pd(x, a); }
inline Part part_add(Part a, Part b) { return _mm256_add_pd(a, b); }
inline Part part_subtract(Part a, Part b) { return _mm256_sub_pd(a, b); }
inline Part part_multiply(Part a, Part b) { return _mm256_mul_pd(a, b); }
inline Part part_larger(Part a, Part b) { return _mm256_max_pd(a, b); }
inline Part part_fma(Part a, Part b, Part c) { return _mm256_fmadd_pd(a, b, c); }
inline Part part_raise(Part a, Part n) {
    return _mm256_castsi256_pd(_mm256_add_epi64(_mm256_castpd_si256(a), _mm256_slli_epi64(_mm256_castpd_si256(n), 52)));
}
inline Part part_zero_below(Part a, Part b, Part limit) { return _mm256_and_pd(a, _mm256_cmp_pd(b, limit, _CMP_NLT_UQ)); }

#else

using Part = double;
inline Part part_all(double x) { return x; }
inline Part part_widen(const Lanes& a, std::size_t i) { return static_cast<double>(a.v[i]); }
inline void part_store(double* x, Part a) { *x = a; }
inline Part part_add(Part a, Part b) { return a + b; }
inline Part part_subtract(Part a, Part b) { return a - b; }
inline Part part_multiply(Part a, Part b) { return a * b; }
inline Part part_larger(Part a, Part b) { return a > b ? a : b; }
inline Part part_fma(Part a, Part b, Part c) { return __builtin_fma(a, b, c); }
inline Part part_raise(Part a, Part n) {
    std::uint64_t bits, power;
    std::memcpy(&bits, &a, sizeof bits);
    std::memcpy(&power, &n, sizeof power);
    bits += power << 52;
    std::memcpy(&a, &bits, sizeof bits);
    return a;
}
inline Part part_zero_below(Part a, Part b, Part limit) { return b < limit ? 0.0 : a; }

#endif

constexpr std::size_t kPartLanes = sizeof(Part) / sizeof(double), kParts = kLanes / kPartLanes;

struct Doubles {
    Part v[kParts];
};

template <typename F>
inline Doubles each_part(const F& f) {
    Doubles result;
    for (std::size_t i = 0; i < kParts; ++i) result.v[i] = f(i);
    return result;
}
inline Doubles all_double(double x) {
    return each_part([&](std::size_t) { return part_all(x); });
}
inline Doubles widen(const Lanes& a) {
    return each_part([&](std::size_t i) { return part_widen(a, i); });
}
inline void store(double* x, const Doubles& a) {
    for (std::size_t i = 0; i < kParts; ++i) part_store(x + i * kPartLanes, a.v[i]);
}
inline Doubles add(const Doubles& a, const Doubles& b) {
    return each_part([&](std::size_t i) { return part_add(a.v[i], b.v[i]); });
}
inline Doubles multiply(const Doubles& a, const Doubles& b) {
    return each_part([&](std::size_t i) { return part_multiply(a.v[i], b.v[i]); });
}

// The sum of all: value i with value i + 8, then i + 4, i + 2, i + 1.
inline double fold(const Doubles& a) {
    double v[kLanes];
    store(v, a);
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) v[i] += v[i + half];
    }
    return v[0];
}

// e^x for x <= 0, and 0 below kLowest, where results would stop being normal numbers; NaN stays NaN. e^x = 2^n e^r with n = round(x / ln 2)
// and the Taylor terms up to r^12, which are right to 3e-16 on [-ln 2 / 2, ln 2 / 2]. ln 2 comes in two parts, of which the first has
// zeros enough at its end for n times it to be exact. Adding kRound leaves n in the last bits of the sum.
inline Doubles exponential_below_1(const Doubles& argument) {
    constexpr double kLowest = -708, kRound = 0x1.8p52, kLog2E = 0x1.71547652b82fep0;
    constexpr double kLn2High = 0x1.62e42fefa38p-1, kLn2Low = 0x1.ef35793c7673p-45;
    constexpr double kTerms[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                                 1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
    return each_part([&](std::size_t i) {
        const Part x = part_larger(part_all(kLowest), argument.v[i]);
        const Part shifted = part_fma(x, part_all(kLog2E), part_all(kRound)), n = part_subtract(shifted, part_all(kRound));
        const Part r = part_fma(n, part_all(-kLn2Low), part_fma(n, part_all(-kLn2High), x));
        Part p = part_all(kTerms[0]);
        for (std::size_t term = 1; term < sizeof kTerms / sizeof kTerms[0]; ++term) p = part_fma(p, r, part_all(kTerms[term]));
        return part_zero_below(part_raise(p, shifted), argument.v[i], part_all(kLowest));
    });
}

}  // namespace
}  // namespace ernie45
