// Attention kernels for AVX-512.
#include "kernels/attention_body.hpp"

namespace ernie45 {
namespace {

using Vector = __m512;
constexpr std::size_t kWidth = 16;

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector read(const float* x) { return _mm512_loadu_ps(x); }
inline void write(float* x, Vector a) { _mm512_storeu_ps(x, a); }
inline Vector broadcast(float x) { return _mm512_set1_ps(x); }
inline Vector times(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector madd(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline void keep(Vector& a) { asm("" : "+v"(a)); }

inline __m128 read_quarter(const void* at, std::size_t offset) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(at) + offset));
}
inline Vector read_quarters(const void* const* at, std::size_t offset) {
    Vector a = _mm512_castps128_ps512(read_quarter(at[0], offset));
    a = _mm512_insertf32x4(a, read_quarter(at[4], offset), 1);
    a = _mm512_insertf32x4(a, read_quarter(at[8], offset), 2);
    return _mm512_insertf32x4(a, read_quarter(at[12], offset), 3);
}
inline Vector low_singles(Vector a, Vector b) { return _mm512_unpacklo_ps(a, b); }
inline Vector high_singles(Vector a, Vector b) { return _mm512_unpackhi_ps(a, b); }
inline Vector low_doubles(Vector a, Vector b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
inline Vector high_doubles(Vector a, Vector b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}

inline Vector even(Vector pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16)); }
inline Vector odd(Vector pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline void join_even_odd(Vector& a, Vector& b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const Vector first = _mm512_permutex2var_ps(a, low, b);
    b = _mm512_permutex2var_ps(a, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b);
    a = first;
}
template <int Byte>
inline Vector signed_byte(Vector fours) {
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(_mm512_castps_si512(fours), 24 - 8 * Byte), 24));
}
inline Vector read_bytes(const void* at) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at))));
}
inline Vector read_bfloat16(const void* at) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(at))), 16));
}

// The 32 registers hold 8 rows x 2 vectors.
constexpr std::size_t kScoreGroups = 2;
constexpr std::size_t pass_rows(std::size_t rows) { return rows; }
constexpr std::size_t weigh_pairs(std::size_t rows) { return rows > 4 ? 1 : rows > 1 ? 2 : 4; }

}  // namespace
}  // namespace ernie45

#include "kernels/attention_tiles.hpp"

namespace ernie45 {
namespace {

// The router's products keep 16 sums in registers, such as 8 rows x 2 keys. Loops over them are unrolled by order: left to itself,
// GCC keeps the sums in memory.

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
void dots_tile(const float* q, const float* k, std::size_t dim, float* tile) {
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
        _mm512_mask_storeu_ps(tile, static_cast<__mmask16>((1u << (Rows * Keys)) - 1), all_sums);
    } else {
        float values[16];
        _mm512_storeu_ps(values, all_sums);
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Keys; ++i) std::memcpy(tile + i * kTileRows, values + i * Rows, Rows * sizeof(float));
    }
}

template <std::size_t Rows>
void dots_rows(const float* q, const float* k, std::size_t keys, std::size_t dim, float* tile) {
    constexpr std::size_t kKeys = 16 / Rows;
    std::size_t key = 0;
    for (; key + kKeys <= keys; key += kKeys) dots_tile<Rows, kKeys>(q, k + key * dim, dim, tile + key * kTileRows);
    for (; key < keys; ++key) dots_tile<Rows, 1>(q, k + key * dim, dim, tile + key * kTileRows);
}

void dots(const float* q, std::size_t rows, const float* k, std::size_t keys, std::size_t dim, float* tile) {
    switch (rows) {
        case 8: return dots_rows<8>(q, k, keys, dim, tile);
        case 7: return dots_rows<7>(q, k, keys, dim, tile);
        case 6: return dots_rows<6>(q, k, keys, dim, tile);
        case 5: return dots_rows<5>(q, k, keys, dim, tile);
        case 4: return dots_rows<4>(q, k, keys, dim, tile);
        case 3: return dots_rows<3>(q, k, keys, dim, tile);
        case 2: return dots_rows<2>(q, k, keys, dim, tile);
        default: return dots_rows<1>(q, k, keys, dim, tile);
    }
}

}  // namespace

const AttentionKernels& avx512_attention() {
    static constexpr AttentionKernels kernels{widen_int8, pack, score, softmax, weigh, join, finish, dots};
    return kernels;
}

}  // namespace ernie45
