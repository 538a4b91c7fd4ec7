// Attention kernels for AVX2 and FMA.
#include "kernels/attention_body.hpp"

namespace ernie45 {
namespace {

using Vector = __m256;
constexpr std::size_t kWidth = 8;

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector read(const float* x) { return _mm256_loadu_ps(x); }
inline void write(float* x, Vector a) { _mm256_storeu_ps(x, a); }
inline Vector broadcast(float x) { return _mm256_set1_ps(x); }
inline Vector times(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector madd(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline void keep(Vector& a) { asm("" : "+x"(a)); }

inline __m128 read_quarter(const void* at, std::size_t offset) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(static_cast<const char*>(at) + offset));
}
inline Vector read_quarters(const void* const* at, std::size_t offset) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(read_quarter(at[0], offset)), read_quarter(at[4], offset), 1);
}
inline Vector low_singles(Vector a, Vector b) { return _mm256_unpacklo_ps(a, b); }
inline Vector high_singles(Vector a, Vector b) { return _mm256_unpackhi_ps(a, b); }
inline Vector low_doubles(Vector a, Vector b) {
    return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}
inline Vector high_doubles(Vector a, Vector b) {
    return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b)));
}

inline Vector even(Vector pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16)); }
inline Vector odd(Vector pairs) {
    return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xFFFF0000))));
}
inline void join_even_odd(Vector& a, Vector& b) {
    const Vector low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    a = _mm256_permute2f128_ps(low, high, 0x20);
    b = _mm256_permute2f128_ps(low, high, 0x31);
}
template <int Byte>
inline Vector signed_byte(Vector fours) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(_mm256_castps_si256(fours), 24 - 8 * Byte), 24));
}
inline Vector read_bytes(const void* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at))));
}
inline Vector read_bfloat16(const void* at) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at))), 16));
}

// The 16 registers hold 6 rows x 2 vectors; 8 rows go in two passes of 4.
constexpr std::size_t kScoreGroups = 1;
constexpr std::size_t pass_rows(std::size_t rows) { return rows > 6 ? 4 : rows; }
constexpr std::size_t weigh_pairs(std::size_t rows) { return rows > 2 ? 1 : rows > 1 ? 2 : 4; }

}  // namespace
}  // namespace ernie45

#include "kernels/attention_tiles.hpp"

namespace ernie45 {
namespace {

// The router's products keep 8 sums in registers, such as 4 rows x 2 keys. The 16 partial sums of a product are two vectors: the
// lower lanes are summed over all dimensions first, then the upper ones. Loops over the sums are unrolled by order: left to itself,
// GCC keeps the sums in memory.
constexpr std::size_t kHalf = 8;

// Sums of 8 vectors, each folded i + 4, i + 2, i + 1, by a tree that works on all of them: result i is the sum of the vector at slot(i).
constexpr std::size_t slot(std::size_t i) { return i % 2 * 2 + i % 4 / 2 + i / 4 * 4; }

[[gnu::always_inline]] inline __m256 fold_all(const __m256* v) {
    __m256 a[4], b[2];
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 4; ++i) {
        a[i] = _mm256_add_ps(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20), _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
    }
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 2; ++i) {
        b[i] = _mm256_add_ps(_mm256_shuffle_ps(a[i], a[i + 2], 0x44), _mm256_shuffle_ps(a[i], a[i + 2], 0xEE));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(b[0], b[1], 0x88), _mm256_shuffle_ps(b[0], b[1], 0xDD));
}

// Adds one half of the lanes of every 16 dimensions to the sums.
template <std::size_t Rows, std::size_t Keys>
[[gnu::always_inline]] inline void dots_half(const float* q, const float* k, std::size_t whole, std::size_t dim, std::size_t half, __m256* sums) {
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 8; ++i) sums[i] = _mm256_setzero_ps();
    const auto step = [&](std::size_t d, const auto& read) __attribute__((always_inline)) {
        __m256 key[Keys];
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Keys; ++i) key[i] = read(k + i * dim + d);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < Rows; ++r) {
            __m256 query = read(q + r * dim + d);
            asm("" : "+x"(query));  // loaded once, not once per key
#pragma GCC unroll 16
            for (std::size_t i = 0; i < Keys; ++i) {
                __m256& sum = sums[slot(i * Rows + r)];
                sum = _mm256_fmadd_ps(query, key[i], sum);
            }
        }
    };
    for (std::size_t d = half * kHalf; d < whole; d += kLanes) {
        step(d, [](const float* x) { return _mm256_loadu_ps(x); });
    }
    const std::size_t rest = dim - whole;
    if (rest > half * kHalf) {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(rest - half * kHalf)), lanes);
        step(whole + half * kHalf, [&](const float* x) { return _mm256_maskload_ps(x, mask); });
    }
}

// Rows x Keys products, at most 8.
template <std::size_t Rows, std::size_t Keys>
void dots_tile(const float* q, const float* k, std::size_t dim, float* tile) {
    static_assert(Rows * Keys <= 8, "one sum per slot");
    const std::size_t whole = dim / kLanes * kLanes;
    __m256 low[8], high[8];
    dots_half<Rows, Keys>(q, k, whole, dim, 0, low);
    dots_half<Rows, Keys>(q, k, whole, dim, 1, high);
#pragma GCC unroll 16
    for (std::size_t i = 0; i < 8; ++i) low[i] = _mm256_add_ps(low[i], high[i]);
    float values[8];
    _mm256_storeu_ps(values, fold_all(low));
#pragma GCC unroll 16
    for (std::size_t i = 0; i < Keys; ++i) std::memcpy(tile + i * kTileRows, values + i * Rows, Rows * sizeof(float));
}

template <std::size_t Rows>
void dots_rows(const float* q, const float* k, std::size_t keys, std::size_t dim, float* tile) {
    constexpr std::size_t kKeys = 8 / Rows;
    std::size_t key = 0;
    for (; key + kKeys <= keys; key += kKeys) dots_tile<Rows, kKeys>(q, k + key * dim, dim, tile + key * kTileRows);
    for (; key < keys; ++key) dots_tile<Rows, 1>(q, k + key * dim, dim, tile + key * kTileRows);
}

void dots(const float* q, std::size_t rows, const float* k, std::size_t keys, std::size_t dim, float* tile) {
    std::size_t row = 0;
    for (; row + 4 <= rows; row += 4) dots_rows<4>(q + row * dim, k, keys, dim, tile + row);
    switch (rows - row) {
        case 3: return dots_rows<3>(q + row * dim, k, keys, dim, tile + row);
        case 2: return dots_rows<2>(q + row * dim, k, keys, dim, tile + row);
        case 1: return dots_rows<1>(q + row * dim, k, keys, dim, tile + row);
        default: return;
    }
}

}  // namespace

const AttentionKernels& avx2_attention() {
    static constexpr AttentionKernels kernels{widen_int8, pack, score, softmax, weigh, join, finish, dots};
    return kernels;
}

}  // namespace ernie45
