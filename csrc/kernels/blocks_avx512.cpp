// Block kernels for AVX-512 with VNNI: one instruction multiplies 64 unsigned weights by 64 signed activations and sums them by row.
// The weights' offset leaves through the sums' starting value, -offset x (sum of the activations).
//
// A wide activation is 256 high + low, both signed bytes; the high bytes of a group of a tile lie before its low ones. Both are summed
// in integers of their own, and 256 x the one is added to the other: at most 64 x 255 x 32512 < 2^31, so nothing overflows.
#include <immintrin.h>

#include <cstring>

#include "kernels/exponential.hpp"
#include "kernels/packed.hpp"

namespace ernie45 {
namespace {

__m512i word(const std::uint8_t* x) {
    std::int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return _mm512_set1_epi32(bits);
}

// Integer sums of a run of columns of one group. `start` is what they begin with.
template <bool Wide, std::size_t Tokens>
struct Sums {
    __m512i low[Tokens], high[Tokens];

    void begin(std::size_t t, std::int32_t start) {
        low[t] = _mm512_set1_epi32(start);
        high[t] = _mm512_setzero_si512();
    }
    // Four columns of 16 rows.
    void add(__m512i weights, const std::uint8_t* values, std::size_t plane) {
        for (std::size_t t = 0; t < Tokens; ++t) {
            if (Wide) high[t] = _mm512_dpbusd_epi32(high[t], weights, word(values + t * kGroup));
            low[t] = _mm512_dpbusd_epi32(low[t], weights, word(values + (Wide ? plane : 0) + t * kGroup));
        }
    }
    __m512 total(std::size_t t) const {
        return _mm512_cvtepi32_ps(Wide ? _mm512_add_epi32(low[t], _mm512_slli_epi32(high[t], 8)) : low[t]);
    }
};

template <Grid kGrid, bool Wide, std::size_t Tokens>
void tile(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
          const Rounded& x, float* out) {
    constexpr bool kMinima = kGrid == Grid::kMinima4, kNibbles = kGrid != Grid::kSymmetric8;
    constexpr std::size_t kBytes = (Wide ? 2 : 1) * kGroup;
    constexpr std::size_t kGroupVectors = kNibbles ? 8 : 16, kParts = kMinima ? 2 : 1, kVectors = kGroupVectors / kParts;
    const __m512i mask = _mm512_set1_epi8(15);
    const std::size_t plane = x.height * kGroup;
    __m512 y[Tokens];
    for (std::size_t t = 0; t < Tokens; ++t) y[t] = _mm512_setzero_ps();
    for (std::size_t g = 0; g < groups; ++g) {
        const std::uint8_t* group = weights + g * kGroupVectors * 64;
        const std::uint8_t* values = x.values + g * x.height * kBytes + x.first * kGroup;
        const float* x_scales = x.scales + g * x.height + x.first;
        const std::int32_t* x_sums = x.sums + g * 2 * x.height + x.first;
        for (std::size_t part = 0; part < kParts; ++part) {
            Sums<Wide, Tokens> sums;
            for (std::size_t t = 0; t < Tokens; ++t) {
                sums.begin(t, kMinima ? 0 : -(kNibbles ? kOffset4 : kOffset8) * (x_sums[t] + x_sums[x.height + t]));
            }
#pragma GCC unroll 8  // without, half of the loop is copies between registers
            for (std::size_t v = part * kVectors; v < (part + 1) * kVectors; ++v) {
                _mm_prefetch(reinterpret_cast<const char*>(group + 64 * v + kAhead), _MM_HINT_T1);
                const __m512i packed = _mm512_loadu_si512(group + 64 * v);
                if (kNibbles) {
                    sums.add(_mm512_and_si512(packed, mask), values + 8 * v, plane);
                    sums.add(_mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), values + 8 * v + 4, plane);
                } else {
                    sums.add(packed, values + 4 * v, plane);
                }
            }
            const std::uint16_t* set = scales + (kMinima ? (2 * g + part) * 2 : g / groups_per_scale) * kRows;
            const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(set)));
            for (std::size_t t = 0; t < Tokens; ++t) {
                y[t] = _mm512_fmadd_ps(sums.total(t), _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t])), y[t]);
                if (kMinima) {
                    const __m512 minimum = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(set + kRows)));
                    const float x_sum = x_scales[t] * static_cast<float>(x_sums[part * x.height + t]);
                    y[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x_sum), y[t]);
                }
            }
        }
    }
    for (std::size_t t = 0; t < Tokens; ++t) _mm512_storeu_ps(out + t * kRows, y[t]);
}

template <Grid kGrid, bool Wide>
void block(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
           const Rounded& x, std::size_t tokens, float* out) {
    switch (tokens) {
        case 8: return tile<kGrid, Wide, 8>(weights, scales, groups, groups_per_scale, x, out);
        case 7: return tile<kGrid, Wide, 7>(weights, scales, groups, groups_per_scale, x, out);
        case 6: return tile<kGrid, Wide, 6>(weights, scales, groups, groups_per_scale, x, out);
        case 5: return tile<kGrid, Wide, 5>(weights, scales, groups, groups_per_scale, x, out);
        case 4: return tile<kGrid, Wide, 4>(weights, scales, groups, groups_per_scale, x, out);
        case 3: return tile<kGrid, Wide, 3>(weights, scales, groups, groups_per_scale, x, out);
        case 2: return tile<kGrid, Wide, 2>(weights, scales, groups, groups_per_scale, x, out);
        default: return tile<kGrid, Wide, 1>(weights, scales, groups, groups_per_scale, x, out);
    }
}

template <bool Wide>
void round_group(const float* x, std::size_t row, std::size_t height, std::uint8_t* values, float* scales, std::int32_t* sums) {
    constexpr float top = Wide ? kWidest : kNarrowest;
    __m512 largest = _mm512_setzero_ps();
    for (std::size_t i = 0; i < kGroup; i += 16) largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
    const float absmax = _mm512_reduce_max_ps(largest);
    const __m512 inverse = _mm512_set1_ps(absmax >= kSmallest ? top / absmax : 0.0f);
    scales[row] = absmax / top;
    __m512i totals[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (std::size_t i = 0; i < kGroup; i += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
        totals[i / kHalf] = _mm512_add_epi32(totals[i / kHalf], rounded);
        std::uint8_t* out = values + row * kGroup + i;
        if (Wide) {
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(rounded, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(high));
            // The low byte, read as signed.
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + height * kGroup), _mm512_cvtepi32_epi8(rounded));
        } else {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtsepi32_epi8(rounded));
        }
    }
    for (std::size_t half = 0; half < 2; ++half) sums[half * height + row] = _mm512_reduce_add_epi32(totals[half]);
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
    static constexpr BlockKernels kernels{
        {block<Grid::kSymmetric4, false>, block<Grid::kSymmetric4, true>},
        {block<Grid::kSymmetric8, false>, block<Grid::kSymmetric8, true>},
        {block<Grid::kMinima4, false>, block<Grid::kMinima4, true>},
        {round_group<false>, round_group<true>},
        swiglu,
        8};
    return kernels;
}

}  // namespace ernie45
