// Attention kernels for AVX2 and FMA. Products keep 8 sums in registers: 4 rows x 2 keys, or 4 rows x 2 vectors of the output. The 16
// partial sums of a product are two vectors: the lower lanes are summed over all dimensions first, then the upper ones. Loops over
// the sums are unrolled by order: left to itself, GCC keeps the sums in memory.
#include "kernels/attention_body.hpp"

namespace ernie45 {
namespace {

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
void dots_tile(const float* q, const float* k, std::size_t dim, float* scores) {
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
    for (std::size_t i = 0; i < Keys; ++i) std::memcpy(scores + i * kTileRows, values + i * Rows, Rows * sizeof(float));
}

template <std::size_t Rows>
void dots_rows(const float* q, const float* k, std::size_t keys, std::size_t dim, float* scores) {
    constexpr std::size_t kKeys = 8 / Rows;
    std::size_t key = 0;
    for (; key + kKeys <= keys; key += kKeys) dots_tile<Rows, kKeys>(q, k + key * dim, dim, scores + key * kTileRows);
    for (; key < keys; ++key) dots_tile<Rows, 1>(q, k + key * dim, dim, scores + key * kTileRows);
}

void dots(const float* q, std::size_t rows, const float* k, std::size_t keys, std::size_t dim, float* scores) {
    std::size_t row = 0;
    for (; row + 4 <= rows; row += 4) dots_rows<4>(q + row * dim, k, keys, dim, scores + row);
    switch (rows - row) {
        case 3: return dots_rows<3>(q + row * dim, k, keys, dim, scores + row);
        case 2: return dots_rows<2>(q + row * dim, k, keys, dim, scores + row);
        case 1: return dots_rows<1>(q + row * dim, k, keys, dim, scores + row);
        default: return;
    }
}

// Columns of the output, Vectors x 8 of them.
template <std::size_t Rows, std::size_t Vectors>
void weigh_tile(const float* p, const float* v, std::size_t keys, std::size_t dim, float* o) {
    __m256 sums[Rows][Vectors];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Vectors; ++i) sums[r][i] = _mm256_loadu_ps(o + r * dim + i * kHalf);
    }
    for (std::size_t key = 0; key < keys; ++key) {
        __m256 value[Vectors];
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Vectors; ++i) value[i] = _mm256_loadu_ps(v + key * dim + i * kHalf);
#pragma GCC unroll 16
        for (std::size_t r = 0; r < Rows; ++r) {
            const __m256 weight = _mm256_set1_ps(p[key * kTileRows + r]);
#pragma GCC unroll 16
            for (std::size_t i = 0; i < Vectors; ++i) sums[r][i] = _mm256_fmadd_ps(weight, value[i], sums[r][i]);
        }
    }
#pragma GCC unroll 16
    for (std::size_t r = 0; r < Rows; ++r) {
#pragma GCC unroll 16
        for (std::size_t i = 0; i < Vectors; ++i) _mm256_storeu_ps(o + r * dim + i * kHalf, sums[r][i]);
    }
}

template <std::size_t Rows>
void weigh_rows(const float* p, const float* v, std::size_t keys, std::size_t dim, float* o) {
    constexpr std::size_t kVectors = Rows > 2 ? 2 : Rows > 1 ? 4 : 8;
    std::size_t d = 0;
    for (; d + kVectors * kHalf <= dim; d += kVectors * kHalf) weigh_tile<Rows, kVectors>(p, v + d, keys, dim, o + d);
    for (; d < dim; d += kLanes) weigh_tile<Rows, 2>(p, v + d, keys, dim, o + d);
}

void weigh(const float* p, std::size_t rows, const float* v, std::size_t keys, std::size_t dim, float* o) {
    std::size_t row = 0;
    for (; row + 4 <= rows; row += 4) weigh_rows<4>(p + row, v, keys, dim, o + row * dim);
    switch (rows - row) {
        case 3: return weigh_rows<3>(p + row, v, keys, dim, o + row * dim);
        case 2: return weigh_rows<2>(p + row, v, keys, dim, o + row * dim);
        case 1: return weigh_rows<1>(p + row, v, keys, dim, o + row * dim);
        default: return;
    }
}

}  // namespace

const AttentionKernels& avx2_attention() {
    static constexpr AttentionKernels kernels{widen_bfloat16, widen_int8, dots, softmax, weigh, join, finish};
    return kernels;
}

}  // namespace ernie45
