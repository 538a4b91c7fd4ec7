// Block kernels for AVX-512 with VNNI: one instruction multiplies 64 unsigned weights by 64 signed activations and sums them by row.
// The weights' offset leaves through the sums' starting value, -offset x (sum of the activations).
#include <immintrin.h>

#include <cstring>

#include "kernels/exponential.hpp"
#include "kernels/packed.hpp"

namespace ernie45 {
namespace {

constexpr std::size_t kAhead = 4096;  // bytes

__m512i word(const std::int8_t* x) {
    std::int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return _mm512_set1_epi32(bits);
}

template <int Bits, std::size_t Tokens>
void tile(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
          const Rounded& x, float* out) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512 y[Tokens];
    for (std::size_t t = 0; t < Tokens; ++t) y[t] = _mm512_setzero_ps();
    for (std::size_t g = 0; g < groups; ++g) {
        const std::uint8_t* group = weights + g * kRows * kGroup * Bits / 8;
        const __m256i set = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + g / groups_per_scale * kRows));
        __m512i sums[Tokens];
        for (std::size_t t = 0; t < Tokens; ++t) {
            sums[t] = _mm512_set1_epi32(-(Bits == 4 ? kOffset4 : kOffset8) * x.sums[t * groups + g]);
        }
        if (Bits == 4) {
            for (std::size_t v = 0; v < 8; ++v) {
                // The hardware's prefetcher stops at page borders; mapped files have small pages.
                _mm_prefetch(reinterpret_cast<const char*>(group + 64 * v + kAhead), _MM_HINT_T0);
                const __m512i packed = _mm512_loadu_si512(group + 64 * v);
                const __m512i low = _mm512_and_si512(packed, mask);
                const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
                for (std::size_t t = 0; t < Tokens; ++t) {
                    const std::int8_t* values = x.values + (t * groups + g) * kGroup + 8 * v;
                    sums[t] = _mm512_dpbusd_epi32(sums[t], low, word(values));
                    sums[t] = _mm512_dpbusd_epi32(sums[t], high, word(values + 4));
                }
            }
        } else {
            for (std::size_t v = 0; v < 16; ++v) {
                _mm_prefetch(reinterpret_cast<const char*>(group + 64 * v + kAhead), _MM_HINT_T0);
                const __m512i packed = _mm512_loadu_si512(group + 64 * v);
                for (std::size_t t = 0; t < Tokens; ++t) {
                    sums[t] = _mm512_dpbusd_epi32(sums[t], packed, word(x.values + (t * groups + g) * kGroup + 4 * v));
                }
            }
        }
        const __m512 scale = _mm512_cvtph_ps(set);
        for (std::size_t t = 0; t < Tokens; ++t) {
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[t * groups + g]));
            y[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), both, y[t]);
        }
    }
    for (std::size_t t = 0; t < Tokens; ++t) _mm512_storeu_ps(out + t * kRows, y[t]);
}

template <int Bits>
void block(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
           const Rounded& x, std::size_t tokens, float* out) {
    switch (tokens) {
        case 8: return tile<Bits, 8>(weights, scales, groups, groups_per_scale, x, out);
        case 7: return tile<Bits, 7>(weights, scales, groups, groups_per_scale, x, out);
        case 6: return tile<Bits, 6>(weights, scales, groups, groups_per_scale, x, out);
        case 5: return tile<Bits, 5>(weights, scales, groups, groups_per_scale, x, out);
        case 4: return tile<Bits, 4>(weights, scales, groups, groups_per_scale, x, out);
        case 3: return tile<Bits, 3>(weights, scales, groups, groups_per_scale, x, out);
        case 2: return tile<Bits, 2>(weights, scales, groups, groups_per_scale, x, out);
        default: return tile<Bits, 1>(weights, scales, groups, groups_per_scale, x, out);
    }
}

void round_group(const float* x, std::int8_t* values, float* scale, std::int32_t* sum) {
    __m512 largest = _mm512_setzero_ps();
    for (std::size_t i = 0; i < kGroup; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    const float absmax = _mm512_reduce_max_ps(largest);
    const __m512 inverse = _mm512_set1_ps(absmax > 0 ? 127.0f / absmax : 0.0f);
    *scale = absmax / 127.0f;
    __m512i total = _mm512_setzero_si512();
    for (std::size_t i = 0; i < kGroup; i += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
        total = _mm512_add_epi32(total, rounded);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), _mm512_cvtsepi32_epi8(rounded));
    }
    *sum = _mm512_reduce_add_epi32(total);
}

__m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(kExpLowest)), _mm512_set1_ps(kExpHighest));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
    __m512 p = _mm512_set1_ps(kExpTerms[0]);
    for (std::size_t i = 1; i < kExpCount; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExpTerms[i]));
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_cvtps_epi32(n), 23)));
}

void swiglu(const float* gate, const float* up, float* out) {
    const __m512 g = _mm512_loadu_ps(gate);
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), g)));
    _mm512_storeu_ps(out, _mm512_mul_ps(_mm512_div_ps(g, below), _mm512_loadu_ps(up)));
}

}  // namespace

const BlockKernels& avx512_blocks() {
    static constexpr BlockKernels kernels{block<4>, block<8>, round_group, swiglu};
    return kernels;
}

}  // namespace ernie45
