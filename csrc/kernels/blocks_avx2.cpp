// Block kernels for AVX2, FMA and F16C. A 64-byte weight vector is two halves of 8 rows.
//
// 4 bit: products of unsigned nibbles with signed bytes are summed in 16 bits over 8 vectors (8 pairs x 2 x 15 x 127 = 30,480 fits),
// then once in 32 bits. The offset 8 leaves through the sum of the activations. 8 bit: |w| times x with w's sign, because
// unsigned 255 x 127 would overflow 16 bits. Wide activations are 16-bit integers, the weights are widened to meet them.
#include <immintrin.h>

#include <cstring>

#include "kernels/exponential.hpp"
#include "kernels/packed.hpp"

namespace ernie45 {
namespace {

__m256i word(const std::uint8_t* x) {
    std::int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return _mm256_set1_epi32(bits);
}

// Keeps the compiler from turning a running sum into a tree of temporaries: there are not enough registers for that, and spilling
// them took most of the time.
void settle(__m256i& sum) { asm("" : "+x"(sum)); }

// Adds one group's integer sums of 8 rows to the float sums of one token.
void add(float* y, __m256i sum, __m256 scale) {
    _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, _mm256_loadu_ps(y)));
}

__m256 load_scales(const std::uint16_t* scales) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)));
}

// The same for half a group whose weights have a minimum.
void add(float* y, __m256i sum, const std::uint16_t* set, float x_scale, std::int32_t x_sum) {
    add(y, sum, _mm256_mul_ps(load_scales(set), _mm256_set1_ps(x_scale)));
    const __m256 rest = _mm256_set1_ps(x_scale * static_cast<float>(x_sum));
    _mm256_storeu_ps(y, _mm256_fmadd_ps(load_scales(set + kRows), rest, _mm256_loadu_ps(y)));
}

// 32 columns of 4 bits: sums of codes times values.
template <std::size_t Tokens>
void half4(const std::uint8_t* group, const std::uint8_t* values, std::size_t half, __m256i sums[Tokens]) {
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i narrow[Tokens];
    for (std::size_t t = 0; t < Tokens; ++t) narrow[t] = _mm256_setzero_si256();
    for (std::size_t v = 4 * half; v < 4 * half + 4; ++v) {
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 64 * v));
        const __m256i low = _mm256_and_si256(packed, mask), high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
        for (std::size_t t = 0; t < Tokens; ++t) {
            const std::uint8_t* at = values + t * kGroup + 8 * v;
            narrow[t] = _mm256_add_epi16(narrow[t], _mm256_maddubs_epi16(low, word(at)));
            settle(narrow[t]);
            narrow[t] = _mm256_add_epi16(narrow[t], _mm256_maddubs_epi16(high, word(at + 4)));
            settle(narrow[t]);
        }
    }
    for (std::size_t t = 0; t < Tokens; ++t) sums[t] = _mm256_madd_epi16(narrow[t], ones);
}

// What a kernel reads of one group of its tokens.
struct Group {
    const std::uint8_t* values;
    const float* scales;
    const std::int32_t* sums;
    std::size_t height;

    template <bool Wide>
    static Group of(const Rounded& x, std::size_t g) {
        const std::size_t at = g * x.height + x.first;
        return {x.values + at * (Wide ? 2 : 1) * kGroup, x.scales + at, x.sums + g * 2 * x.height + x.first, x.height};
    }
};

template <std::size_t Tokens>
void group4(const std::uint8_t* group, __m256 scale, const Group& x, float* out) {
    __m256i first[Tokens], second[Tokens];
    half4<Tokens>(group, x.values, 0, first);
    half4<Tokens>(group, x.values, 1, second);
    for (std::size_t t = 0; t < Tokens; ++t) {
        const __m256i offset = _mm256_set1_epi32(kOffset4 * (x.sums[t] + x.sums[x.height + t]));
        const __m256i sum = _mm256_sub_epi32(_mm256_add_epi32(first[t], second[t]), offset);
        add(out + t * kRows, sum, _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[t])));
    }
}

template <std::size_t Tokens>
void minima4(const std::uint8_t* group, const std::uint16_t* sets, const Group& x, float* out) {
    for (std::size_t half = 0; half < 2; ++half) {
        __m256i sums[Tokens];
        half4<Tokens>(group, x.values, half, sums);
        for (std::size_t t = 0; t < Tokens; ++t) {
            add(out + t * kRows, sums[t], sets + half * 2 * kRows, x.scales[t], x.sums[half * x.height + t]);
        }
    }
}

template <std::size_t Tokens>
void group8(const std::uint8_t* group, __m256 scale, const Group& x, float* out) {
    const __m256i sign_bit = _mm256_set1_epi8(static_cast<char>(0x80)), ones = _mm256_set1_epi16(1);
    __m256i wide[Tokens];
    for (std::size_t t = 0; t < Tokens; ++t) wide[t] = _mm256_setzero_si256();
    for (std::size_t v = 0; v < 16; ++v) {
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 64 * v));
        const __m256i signed_weights = _mm256_xor_si256(packed, sign_bit);
        const __m256i magnitude = _mm256_abs_epi8(signed_weights);
        for (std::size_t t = 0; t < Tokens; ++t) {
            const __m256i values = word(x.values + t * kGroup + 4 * v);
            const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(values, signed_weights));
            wide[t] = _mm256_add_epi32(wide[t], _mm256_madd_epi16(products, ones));
            settle(wide[t]);
        }
    }
    for (std::size_t t = 0; t < Tokens; ++t) {
        add(out + t * kRows, wide[t], _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[t])));
    }
}

// Four columns of 8 rows: `weights` are 4 rows x 4 columns of 16 bits, one for each half of the rows.
template <std::size_t Tokens>
void multiply_wide(__m256i sums[Tokens][2], __m256i signed_weights, const std::uint8_t* values) {
    const __m256i first = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(signed_weights));
    const __m256i second = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(signed_weights, 1));
    for (std::size_t t = 0; t < Tokens; ++t) {
        std::int64_t bits;
        std::memcpy(&bits, values + t * 2 * kGroup, sizeof bits);
        const __m256i four = _mm256_set1_epi64x(bits);
        sums[t][0] = _mm256_add_epi32(sums[t][0], _mm256_madd_epi16(first, four));
        sums[t][1] = _mm256_add_epi32(sums[t][1], _mm256_madd_epi16(second, four));
        settle(sums[t][0]);
        settle(sums[t][1]);
    }
}

// Columns of one group against wide activations: `first` to `end` are 64-byte vectors of the group.
template <int Bits, std::size_t Tokens>
void part_wide(const std::uint8_t* group, const std::uint8_t* values, std::size_t first, std::size_t end, int offset,
               __m256i rows[Tokens]) {
    const __m256i mask = _mm256_set1_epi8(15), offsets = _mm256_set1_epi8(static_cast<char>(offset));
    __m256i sums[Tokens][2];  // of 4 rows each: columns 0 and 1, columns 2 and 3, side by side
    for (std::size_t t = 0; t < Tokens; ++t) sums[t][0] = sums[t][1] = _mm256_setzero_si256();
    for (std::size_t v = first; v < end; ++v) {
        const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 64 * v));
        if (Bits == 4) {
            const __m256i low = _mm256_and_si256(packed, mask), high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask);
            multiply_wide<Tokens>(sums, _mm256_sub_epi8(low, offsets), values + 16 * v);
            multiply_wide<Tokens>(sums, _mm256_sub_epi8(high, offsets), values + 16 * v + 8);
        } else {
            multiply_wide<Tokens>(sums, _mm256_sub_epi8(packed, offsets), values + 8 * v);
        }
    }
    for (std::size_t t = 0; t < Tokens; ++t) {
        rows[t] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[t][0], sums[t][1]), 0xD8);
    }
}

template <int Bits, std::size_t Tokens>
void group_wide(const std::uint8_t* group, __m256 scale, const Group& x, float* out) {
    __m256i rows[Tokens];
    part_wide<Bits, Tokens>(group, x.values, 0, 2 * Bits, Bits == 4 ? kOffset4 : kOffset8, rows);
    for (std::size_t t = 0; t < Tokens; ++t) add(out + t * kRows, rows[t], _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[t])));
}

template <std::size_t Tokens>
void minima_wide(const std::uint8_t* group, const std::uint16_t* sets, const Group& x, float* out) {
    for (std::size_t half = 0; half < 2; ++half) {
        __m256i rows[Tokens];
        part_wide<4, Tokens>(group, x.values, 4 * half, 4 * half + 4, 0, rows);
        for (std::size_t t = 0; t < Tokens; ++t) {
            add(out + t * kRows, rows[t], sets + half * 2 * kRows, x.scales[t], x.sums[half * x.height + t]);
        }
    }
}

template <Grid kGrid, bool Wide, std::size_t Tokens>
void tile(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
          const Rounded& x, float* out) {
    constexpr int kBits = kGrid == Grid::kSymmetric8 ? 8 : 4;
    std::memset(out, 0, Tokens * kRows * sizeof(float));
    for (std::size_t g = 0; g < groups; ++g) {
        for (std::size_t line = 0; line < kRows * kGroup * kBits / 8; line += 64) {
            _mm_prefetch(reinterpret_cast<const char*>(weights + g * kRows * kGroup * kBits / 8 + line + kAhead), _MM_HINT_T1);
        }
        const Group values = Group::of<Wide>(x, g);
        for (std::size_t rows = 0; rows < kRows; rows += 8) {
            const std::uint8_t* group = weights + g * kRows * kGroup * kBits / 8 + 4 * rows;
            float* y = out + rows;
            if (kGrid == Grid::kMinima4) {
                const std::uint16_t* sets = scales + g * 4 * kRows + rows;
                (Wide ? minima_wide<Tokens> : minima4<Tokens>)(group, sets, values, y);
                continue;
            }
            const __m256 scale = load_scales(scales + g / groups_per_scale * kRows + rows);
            if (Wide) {
                group_wide<kBits, Tokens>(group, scale, values, y);
            } else {
                (kBits == 4 ? group4<Tokens> : group8<Tokens>)(group, scale, values, y);
            }
        }
    }
}

template <Grid kGrid, bool Wide>
void block(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
           const Rounded& x, std::size_t tokens, float* out) {
    // Four tokens fit the registers: more would spill.
    for (std::size_t first = 0; first < tokens; first += 4) {
        Rounded rest = x;
        rest.first += first;
        float* y = out + first * kRows;
        switch (tokens - first) {
            case 1: tile<kGrid, Wide, 1>(weights, scales, groups, groups_per_scale, rest, y); break;
            case 2: tile<kGrid, Wide, 2>(weights, scales, groups, groups_per_scale, rest, y); break;
            case 3: tile<kGrid, Wide, 3>(weights, scales, groups, groups_per_scale, rest, y); break;
            default: tile<kGrid, Wide, 4>(weights, scales, groups, groups_per_scale, rest, y);
        }
    }
}

std::int32_t fold(__m256i a) {
    __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4E));
    sums = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0xB1));
    return _mm_cvtsi128_si32(sums);
}

template <bool Wide>
void round_group(const float* x, std::size_t row, std::size_t height, std::uint8_t* values, float* scales, std::int32_t* sums) {
    constexpr float top = Wide ? kWidest : kNarrowest;
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    __m256 largest = _mm256_setzero_ps();
    for (std::size_t i = 0; i < kGroup; i += 8) largest = _mm256_max_ps(largest, _mm256_and_ps(_mm256_loadu_ps(x + i), no_sign));
    __m128 folded = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    folded = _mm_max_ps(folded, _mm_movehl_ps(folded, folded));
    folded = _mm_max_ss(folded, _mm_movehdup_ps(folded));
    const float absmax = _mm_cvtss_f32(folded);
    const __m256 inverse = _mm256_set1_ps(absmax >= kSmallest ? top / absmax : 0.0f);
    scales[row] = absmax / top;
    __m256i totals[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (std::size_t i = 0; i < kGroup; i += 8) {
        const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
        totals[i / kHalf] = _mm256_add_epi32(totals[i / kHalf], rounded);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        if (Wide) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(values + 2 * (row * kGroup + i)), words);
        } else {
            _mm_storel_epi64(reinterpret_cast<__m128i*>(values + row * kGroup + i), _mm_packs_epi16(words, words));
        }
    }
    for (std::size_t half = 0; half < 2; ++half) sums[half * height + row] = fold(totals[half]);
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
