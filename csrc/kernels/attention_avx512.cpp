// Attention kernels for AVX-512. Products keep 16 sums in registers: 8 rows x 2 keys, or 8 rows x 2 vectors of the output. Loops over them
// are unrolled by order: left to itself, GCC keeps the sums in memory.
#include "kernels/attention_body.hpp"

namespace ernie45 {
namespace {

// Sums of 16 vectors, each folded in the stated order, by a tree that works on all of them: result i is the sum of the vector at
// slot(i).
constexpr std::size_t slot(std::size_t i) { return (i % 2 * 2 + i % 4 / 2) + (i / 4 % 2 * 8 + i / 8 * 4); }

[[gnu::always_inline]] inline __m512 fold_all(const __m512* v) {
    __m512 a[8], b[4], c[2];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 8; ++i) {
        a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[i], v[i + 8], 0x44), _mm512_shuffle_f32x4(v[i], v[i + 8], 0xEE));
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 4; ++i) {
        b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD));
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 2; ++i) {
        c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[i], b[i + 2], 0x44), _mm512_shuffle_ps(b[i], b[i + 2], 0xEE));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xDD));
}

// Rows x Keys products, at most 16.
template <std::size_t Rows, std::size_t Keys>
void dots_tile(const float* q, const float* k, std::size_t dim, float* scores) {
    static_assert(Rows * Keys <= 16, "one sum per slot");
    __m512 sums[16];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
    const auto step = [&](std::size_t d, __mmask16 mask) __attribute__((always_inline)) {
        __m512 key[Keys];
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Keys; ++i) key[i] = _mm512_maskz_loadu_ps(mask, k + i * dim + d);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < Rows; ++r) {
            __m512 query = _mm512_maskz_loadu_ps(mask, q + r * dim + d);
            asm("" : "+v"(query));  // loaded once, not once per key
#pragma GCC unroll 16
            for (std::size_t i = 0; i < Keys; ++i) {
                __m512& sum = sums[slot(i * Rows + r)];
                sum = _mm512_fmadd_ps(query, key[i], sum);
            }
        }
    };
    const std::size_t whole = dim / kLanes * kLanes;
    for (std::size_t d = 0; d < whole; d += kLanes) step(d, 0xFFFF);
    if (whole < dim) step(whole, static_cast<__mmask16>((1u << (dim - whole)) - 1));
    const __m512 all_sums = fold_all(sums);
    if (Rows == kTileRows) {
        _mm512_mask_storeu_ps(scores, static_cast<__mmask16>((1u << (Rows * Keys)) - 1), all_sums);
    } else {
        float values[16];
        _mm512_storeu_ps(values, all_sums);
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Keys; ++i) std::memcpy(scores + i * kTileRows, values + i * Rows, Rows * sizeof(float));
    }
}

template <std::size_t Rows>
void dots_rows(const float* q, const float* k, std::size_t keys, std::size_t dim, float* scores) {
    constexpr std::size_t kKeys = 16 / Rows;
    std::size_t key = 0;
    for (; key + kKeys <= keys; key += kKeys) dots_tile<Rows, kKeys>(q, k + key * dim, dim, scores + key * kTileRows);
    for (; key < keys; ++key) dots_tile<Rows, 1>(q, k + key * dim, dim, scores + key * kTileRows);
}

void dots(const float* q, std::size_t rows, const float* k, std::size_t keys, std::size_t dim, float* scores) {
    switch (rows) {
        case 8: return dots_rows<8>(q, k, keys, dim, scores);
        case 7: return dots_rows<7>(q, k, keys, dim, scores);
        case 6: return dots_rows<6>(q, k, keys, dim, scores);
        case 5: return dots_rows<5>(q, k, keys, dim, scores);
        case 4: return dots_rows<4>(q, k, keys, dim, scores);
        case 3: return dots_rows<3>(q, k, keys, dim, scores);
        case 2: return dots_rows<2>(q, k, keys, dim, scores);
        default: return dots_rows<1>(q, k, keys, dim, scores);
    }
}

// Columns of the output from d on, Vectors x 16 of them.
template <std::size_t Rows, std::size_t Vectors>
void weigh_tile(const float* p, const float* v, std::size_t keys, std::size_t dim, float* o) {
    __m512 sums[Rows][Vectors];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Vectors; ++i) sums[r][i] = _mm512_loadu_ps(o + r * dim + i * kLanes);
    }
    for (std::size_t key = 0; key < keys; ++key) {
        __m512 value[Vectors];
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Vectors; ++i) value[i] = _mm512_loadu_ps(v + key * dim + i * kLanes);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < Rows; ++r) {
            const __m512 weight = _mm512_set1_ps(p[key * kTileRows + r]);
#pragma GCC unroll 16
            for (std::size_t i = 0; i < Vectors; ++i) sums[r][i] = _mm512_fmadd_ps(weight, value[i], sums[r][i]);
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Vectors; ++i) _mm512_storeu_ps(o + r * dim + i * kLanes, sums[r][i]);
    }
}

template <std::size_t Rows>
void weigh_rows(const float* p, const float* v, std::size_t keys, std::size_t dim, float* o) {
    // At least 8 sums hide the latency of the multiply-add.
    constexpr std::size_t kVectors = Rows > 4 ? 2 : Rows > 2 ? 4 : 8;
    std::size_t d = 0;
    for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) weigh_tile<Rows, kVectors>(p, v + d, keys, dim, o + d);
    for (; d < dim; d += kLanes) weigh_tile<Rows, 1>(p, v + d, keys, dim, o + d);
}

void weigh(const float* p, std::size_t rows, const float* v, std::size_t keys, std::size_t dim, float* o) {
    switch (rows) {
        case 8: return weigh_rows<8>(p, v, keys, dim, o);
        case 7: return weigh_rows<7>(p, v, keys, dim, o);
        case 6: return weigh_rows<6>(p, v, keys, dim, o);
        case 5: return weigh_rows<5>(p, v, keys, dim, o);
        case 4: return weigh_rows<4>(p, v, keys, dim, o);
        case 3: return weigh_rows<3>(p, v, keys, dim, o);
        case 2: return weigh_rows<2>(p, v, keys, dim, o);
        default: return weigh_rows<1>(p, v, keys, dim, o);
    }
}

}  // namespace

const AttentionKernels& avx512_attention() {
    static constexpr AttentionKernels kernels{widen_bfloat16, widen_int8, dots, softmax, weigh, join, finish};
    return kernels;
}

}  // namespace ernie45
