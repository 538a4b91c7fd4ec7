// Block kernels for AVX2, FMA and F16C. A 64-byte weight vector is two halves of 8 rows.
//
// 4 bit: products of unsigned nibbles with signed bytes are summed in 16 bits over 8 vectors (8 pairs x 2 x 15 x 127 = 30,480 fits),
// then once in 32 bits. The offset 8 leaves through the sum of the activations. 8 bit: |w| times x with w's sign, because
// unsigned 255 x 127 would overflow 16 bits.
#include <immintrin.h>

#include <cstring>

#include "kernels/exponential.hpp"
#include "kernels/packed.hpp"

namespace ernie45 {
namespace {

__m256i word(const std::int8_t* x) {
    std::int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return _mm256_set1_epi32(bits);
}

// Adds one group's integer sums of 8 rows to the float sums of one token.
void add(float* y, __m256i sum, __m256 scale) {
    _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(y)));
}

template <std::size_t Tokens>
void group4(const std::uint8_t* group, __m256 scale, const Rounded& x, std::size_t groups, std::size_t g, float* out) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i wide[Tokens];
    for (std::size_t half = 0; half < 2; ++half) {  // 32 columns each: 8 vectors of 4 columns
        __m256i narrow[Tokens];
        for (std::size_t t = 0; t < Tokens; ++t) narrow[t] = _mm256_setzero_si256();
        for (std::size_t v = 4 * half; v < 4 * half + 4; ++v) {
            const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 64 * v));
            const __m256i low = _mm256_and_si256(packed, mask), high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            for (std::size_t t = 0; t < Tokens; ++t) {
                const std::int8_t* values = x.values + (t * groups + g) * kGroup + 8 * v;
                narrow[t] = _mm256_add_epi16(narrow[t], _mm256_maddubs_epi16(low, word(values)));
                narrow[t] = _mm256_add_epi16(narrow[t], _mm256_maddubs_epi16(high, word(values + 4)));
            }
        }
        for (std::size_t t = 0; t < Tokens; ++t) {
            const __m256i sum = _mm256_madd_epi16(narrow[t], ones);
            wide[t] = half == 0 ? sum : _mm256_add_epi32(wide[t], sum);
        }
    }
    for (std::size_t t = 0; t < Tokens; ++t) {
        const std::size_t at = t * groups + g;
        const __m256i sum = _mm256_sub_epi32(wide[t], _mm256_set1_epi32(kOffset4 * x.sums[at]));
        add(out + t * kRows, sum, _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[at])));
    }
}

template <std::size_t Tokens>
void group8(const std::uint8_t* group, __m256 scale, const Rounded& x, std::size_t groups, std::size_t g, float* out) {
    const __m256i sign_bit = _mm256_set1_epi8(static_cast<char>(0x80)), ones = _mm256_set1_epi16(1);
    __m256i wide[Tokens];
    for (std::size_t t = 0; t < Tokens; ++t) wide[t] = _mm256_setzero_si256();
    for (std::size_t v = 0; v < 16; ++v) {
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 64 * v));
        const __m256i signed_weights = _mm256_xor_si256(packed, sign_bit);
        const __m256i magnitude = _mm256_abs_epi8(signed_weights);
        for (std::size_t t = 0; t < Tokens; ++t) {
            const __m256i values = word(x.values + (t * groups + g) * kGroup + 4 * v);
            const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(values, signed_weights));
            wide[t] = _mm256_add_epi32(wide[t], _mm256_madd_epi16(products, ones));
        }
    }
    for (std::size_t t = 0; t < Tokens; ++t) {
        add(out + t * kRows, wide[t], _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[t * groups + g])));
    }
}

template <int Bits, std::size_t Tokens>
void tile(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
          const Rounded& x, float* out) {
    std::memset(out, 0, Tokens * kRows * sizeof(float));
    for (std::size_t g = 0; g < groups; ++g) {
        const std::uint8_t* group = weights + g * kRows * kGroup * Bits / 8;
        const std::uint16_t* set = scales + g / groups_per_scale * kRows;
        for (std::size_t half = 0; half < 2; ++half) {
            const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(set + 8 * half)));
            if (Bits == 4) {
                group4<Tokens>(group + 32 * half, scale, x, groups, g, out + 8 * half);
            } else {
                group8<Tokens>(group + 32 * half, scale, x, groups, g, out + 8 * half);
            }
        }
    }
}

template <int Bits>
void block(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
           const Rounded& x, std::size_t tokens, float* out) {
    // Four tokens fit the registers: more would spill.
    for (std::size_t first = 0; first < tokens; first += 4) {
        const Rounded rest{x.values + first * groups * kGroup, x.scales + first * groups, x.sums + first * groups};
        float* y = out + first * kRows;
        switch (tokens - first) {
            case 1: tile<Bits, 1>(weights, scales, groups, groups_per_scale, rest, y); break;
            case 2: tile<Bits, 2>(weights, scales, groups, groups_per_scale, rest, y); break;
            case 3: tile<Bits, 3>(weights, scales, groups, groups_per_scale, rest, y); break;
            default: tile<Bits, 4>(weights, scales, groups, groups_per_scale, rest, y);
        }
    }
}

void round_group(const float* x, std::int8_t* values, float* scale, std::int32_t* sum) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 largest = _mm256_setzero_ps();
    for (std::size_t i = 0; i < kGroup; i += 8) largest = _mm256_max_ps(largest, _mm256_and_ps(_mm256_loadu_ps(x + i), no_sign));
    __m128 folded = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    folded = _mm_max_ps(folded, _mm_movehl_ps(folded, folded));
    folded = _mm_max_ss(folded, _mm_movehdup_ps(folded));
    const float absmax = _mm_cvtss_f32(folded);
    const __m256 inverse = _mm256_set1_ps(absmax > 0 ? 127.0f / absmax : 0.0f);
    *scale = absmax / 127.0f;
    __m256i total = _mm256_setzero_si256();
    for (std::size_t i = 0; i < kGroup; i += 8) {
        const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
        total = _mm256_add_epi32(total, rounded);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(values + i), _mm_packs_epi16(words, words));
    }
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4E));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xB1));
    *sum = _mm_cvtsi128_si32(sums);
}

__m256 exponential(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(kExpLowest)), _mm256_set1_ps(kExpHighest));
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), r);
    __m256 p = _mm256_set1_ps(kExpTerms[0]);
    for (std::size_t i = 1; i < kExpCount; ++i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kExpTerms[i]));
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
}

void swiglu(const float* gate, const float* up, float* out) {
    for (std::size_t i = 0; i < kRows; i += 8) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 below = _mm256_add_ps(_mm256_set1_ps(1.0f), exponential(_mm256_sub_ps(_mm256_setzero_ps(), g)));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_div_ps(g, below), _mm256_loadu_ps(up + i)));
    }
}

}  // namespace

const BlockKernels& avx2_blocks() {
    static constexpr BlockKernels kernels{block<4>, block<8>, round_group, swiglu};
    return kernels;
}

}  // namespace ernie45
