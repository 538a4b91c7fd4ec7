// Sixteen float32 values at once, in the registers that the including file's flags allow: one AVX-512 register, two AVX registers
// or an array. Everything written with it gives the same bits on every instruction set: each operation rounds once, and `fold` adds
// the sixteen values in one stated order.
//
// Everything here has internal linkage: files with different flags must not share functions.
#pragma once

#include <cstddef>
#include <cstring>

#include "kernels/exponential.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ernie45 {
namespace {

constexpr std::size_t kLanes = 16;

#if defined(__AVX512F__)

struct Lanes {
    __m512 v;
};

inline Lanes load(const float* x) { return {_mm512_loadu_ps(x)}; }
inline Lanes load_part(const float* x, std::size_t count) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), x)};
}
inline void store(float* x, Lanes a) { _mm512_storeu_ps(x, a.v); }
inline Lanes all(float x) { return {_mm512_set1_ps(x)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes subtract(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes smaller(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes negative_fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Lanes nearest(Lanes a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// a x 2^n for whole n; the result stays a normal number.
inline Lanes times_power(Lanes a, Lanes n) {
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23)))};
}
// a, or 0 where b = limit.
inline Lanes zero_where(Lanes a, Lanes b, float limit) {
    return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(b.v, _mm512_set1_ps(limit), _CMP_NEQ_UQ), a.v)};
}

#elif defined(__AVX2__)

struct Lanes {
    __m256 low, high;
};

inline Lanes load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline Lanes load_part(const float* x, std::size_t count) {
    float padded[kLanes] = {};
    std::memcpy(padded, x, count * sizeof(float));
    return load(padded);
}
inline void store(float* x, Lanes a) {
    _mm256_storeu_ps(x, a.low);
    _mm256_storeu_ps(x + 8, a.high);
}
inline Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Lanes subtract(Lanes a, Lanes b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Lanes multiply(Lanes a, Lanes b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Lanes divide(Lanes a, Lanes b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Lanes smaller(Lanes a, Lanes b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Lanes negative_fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Lanes nearest(Lanes a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}
inline __m256 times_power(__m256 a, __m256 n) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}
inline Lanes times_power(Lanes a, Lanes n) { return {times_power(a.low, n.low), times_power(a.high, n.high)}; }
inline Lanes zero_where(Lanes a, Lanes b, float limit) {
    const __m256 wide = _mm256_set1_ps(limit);
    return {_mm256_and_ps(a.low, _mm256_cmp_ps(b.low, wide, _CMP_NEQ_UQ)),
            _mm256_and_ps(a.high, _mm256_cmp_ps(b.high, wide, _CMP_NEQ_UQ))};
}

#else

struct Lanes {
    float v[kLanes];
};

template <typename F>
inline Lanes each(const F& f) {
    Lanes result;
    for (std::size_t i = 0; i < kLanes; ++i) result.v[i] = f(i);
    return result;
}
inline Lanes load(const float* x) {
    Lanes result;
    std::memcpy(result.v, x, sizeof result.v);
    return result;
}
inline Lanes load_part(const float* x, std::size_t count) {
    Lanes result = {};
    std::memcpy(result.v, x, count * sizeof(float));
    return result;
}
inline void store(float* x, const Lanes& a) { std::memcpy(x, a.v, sizeof a.v); }
inline Lanes all(float x) {
    return each([&](std::size_t) { return x; });
}
inline Lanes add(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.v[i] + b.v[i]; });
}
inline Lanes subtract(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.v[i] - b.v[i]; });
}
inline Lanes multiply(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.v[i] * b.v[i]; });
}
inline Lanes divide(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.v[i] / b.v[i]; });
}
inline Lanes larger(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes smaller(const Lanes& a, const Lanes& b) {
    return each([&](std::size_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    return each([&](std::size_t i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Lanes negative_fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    return each([&](std::size_t i) { return __builtin_fmaf(-a.v[i], b.v[i], c.v[i]); });
}
inline Lanes nearest(const Lanes& a) {
    return each([&](std::size_t i) { return __builtin_nearbyintf(a.v[i]); });
}
inline Lanes times_power(const Lanes& a, const Lanes& n) {
    // NaN has no whole part; it stays what it is.
    return each([&](std::size_t i) { return n.v[i] == n.v[i] ? __builtin_ldexpf(a.v[i], static_cast<int>(n.v[i])) : n.v[i]; });
}
inline Lanes zero_where(const Lanes& a, const Lanes& b, float limit) {
    return each([&](std::size_t i) { return b.v[i] == limit ? 0.0f : a.v[i]; });
}

#endif

// The sum of all: value i with value i + 8, then i + 4, i + 2, i + 1; and the largest of all, where that order does not matter.
#if defined(__AVX2__)

inline __m256 lower(Lanes a) {
#if defined(__AVX512F__)
    return _mm512_castps512_ps256(a.v);
#else
    return a.low;
#endif
}
inline __m256 upper(Lanes a) {
#if defined(__AVX512F__)
    return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a.v), 1));
#else
    return a.high;
#endif
}
inline float fold(Lanes a) {
    const __m256 eight = _mm256_add_ps(lower(a), upper(a));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest_of(Lanes a) {
    const __m256 eight = _mm256_max_ps(lower(a), upper(a));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#else

inline float fold(const Lanes& a) {
    float v[kLanes];
    store(v, a);
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::size_t i = 0; i < half; ++i) v[i] += v[i + half];
    }
    return v[0];
}
inline float largest_of(const Lanes& a) {
    float result = a.v[0];
    for (std::size_t i = 1; i < kLanes; ++i) result = result > a.v[i] ? result : a.v[i];
    return result;
}

#endif

inline void store_part(float* x, const Lanes& a, std::size_t count) {
    float v[kLanes];
    store(v, a);
    std::memcpy(x, v, count * sizeof(float));
}

// e^x, see exponential.hpp. The maximum returns its second argument where one is NaN, so NaN stays NaN.
inline Lanes exponential(const Lanes& argument) {
    const Lanes x = smaller(all(kExpHighest), larger(all(kExpLowest), argument));
    const Lanes n = nearest(multiply(x, all(kLog2E)));
    const Lanes r = negative_fma(n, all(kLn2Low), negative_fma(n, all(kLn2High), x));
    Lanes p = all(kExpTerms[0]);
    for (std::size_t i = 1; i < kExpCount; ++i) p = fma(p, r, all(kExpTerms[i]));
    return times_power(p, n);
}

}  // namespace
}  // namespace ernie45
