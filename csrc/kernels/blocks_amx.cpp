// Block kernels for AMX: one instruction multiplies 16 tokens x 64 columns by 64 columns x 16 rows. Weights lie in memory as its
// second operand wants them (packed.hpp), activations as its first. Sums are the same integers as elsewhere, and what follows them is the
// same float arithmetic in the same order, so the bits are too. A few tokens are left to the vector kernels: they would fill no tile.
//
// Weights are unpacked to signed bytes once for up to 64 tokens. While the tile unit multiplies one run of columns, the vector units turn the
// integers of the run before into floats with their scales: that, about 24 cycles for 256 integers, is the bound.
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/packed.hpp"

namespace ernie45 {
namespace {

constexpr std::size_t kFewest = 9;  // tokens for which a tile pays

// Tile registers: four sums (64 tokens), A is 16 tokens x 64 or 32 bytes, B is 64 or 32 columns x 16 rows in lines of 4 columns. Macros,
// because the intrinsics paste the number into assembly. Sums have registers of their own so that four products are under way at once.
#define ERNIE45_A 4
#define ERNIE45_B 5

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16};

    explicit TileConfig(bool half) {
        if (half) bytes_per_row[ERNIE45_A] = 32, rows[ERNIE45_B] = 8;
    }
};

// Sums of 16 tokens x 16 rows over the columns of A and B, into register and memory.
#define ERNIE45_PRODUCT(number, values, sums)          \
    do {                                               \
        _tile_zero(number);                            \
        _tile_loadd(ERNIE45_A, values, kGroup);        \
        _tile_dpbssd(number, ERNIE45_A, ERNIE45_B);    \
        _tile_stored(number, sums, kRows * sizeof(std::int32_t)); \
    } while (false)

// The integer sums of up to 64 tokens x 16 rows over one run of columns: a group, or half of one.
template <bool Wide>
struct Products {
    alignas(64) std::int32_t sums[Wide ? 2 : 1][kMaxTile][kRows];

    // `values` are those of the first tile of tokens, `tile_bytes` from one tile to the next, `plane` from high to low bytes; B is loaded.
    void compute(const std::uint8_t* values, std::size_t tile_bytes, std::size_t plane, std::size_t tokens) {
        for (std::size_t i = 0; i < (Wide ? 2 : 1); ++i, values += plane) {
            ERNIE45_PRODUCT(0, values, sums[i][0]);
            if (tokens > kRowsOfTile) ERNIE45_PRODUCT(1, values + tile_bytes, sums[i][kRowsOfTile]);
            if (tokens > 2 * kRowsOfTile) ERNIE45_PRODUCT(2, values + 2 * tile_bytes, sums[i][2 * kRowsOfTile]);
            if (tokens > 3 * kRowsOfTile) ERNIE45_PRODUCT(3, values + 3 * tile_bytes, sums[i][3 * kRowsOfTile]);
        }
    }

    __m512 row(std::size_t token) const {
        const __m512i first = _mm512_load_si512(sums[0][token]);
        if (!Wide) return _mm512_cvtepi32_ps(first);
        return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(first, 8), _mm512_load_si512(sums[Wide ? 1 : 0][token])));
    }
};

// A group's weights as signed bytes (codes as they are where there are minima), 4 columns x 16 rows a line.
template <Grid kGrid>
void unpack(const std::uint8_t* group, std::uint8_t* codes) {
    constexpr bool kNibbles = kGrid != Grid::kSymmetric8;
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i offset = _mm512_set1_epi8(kGrid == Grid::kMinima4 ? 0 : static_cast<char>(kNibbles ? kOffset4 : kOffset8));
    for (std::size_t line = 0; line < kRows * kGroup / (kNibbles ? 2 : 1); line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(group + line + kAhead), _MM_HINT_T1);
        const __m512i packed = _mm512_loadu_si512(group + line);
        if (kNibbles) {
            const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
            _mm512_store_si512(codes + 2 * line, _mm512_sub_epi8(_mm512_and_si512(packed, mask), offset));
            _mm512_store_si512(codes + 2 * line + 64, _mm512_sub_epi8(high, offset));
        } else {
            _mm512_store_si512(codes + line, _mm512_sub_epi8(packed, offset));
        }
    }
}

template <Grid kGrid, bool Wide>
void tiles(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
           const Rounded& x, std::size_t tokens, float* out) {
    constexpr bool kMinima = kGrid == Grid::kMinima4;
    constexpr std::size_t kBytes = (Wide ? 2 : 1) * kGroup, kParts = kMinima ? 2 : 1;
    constexpr std::size_t kGroupBytes = kRows * kGroup / (kGrid == Grid::kSymmetric8 ? 1 : 2);
    alignas(64) std::uint8_t codes[kRows * kGroup];
    Products<Wide> products[2];
    const std::size_t group_bytes = x.height * kBytes, tile_bytes = groups * group_bytes, plane = x.height * kGroup;

    const auto multiply = [&](std::size_t run) {
        const std::size_t g = run / kParts, part = run % kParts;
        if (part == 0) unpack<kGrid>(weights + g * kGroupBytes, codes);
        _tile_loadd(ERNIE45_B, codes + part * kRows * kHalf, 64);
        products[run % 2].compute(x.values + g * group_bytes + part * kHalf, tile_bytes, plane, tokens);
    };
    const auto add = [&](std::size_t run) {
        const std::size_t g = run / kParts, part = run % kParts;
        const std::uint16_t* set = scales + (kMinima ? 2 * run : g / groups_per_scale) * kRows;
        const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(set)));
        const __m512 minimum =
            kMinima ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(set + kRows))) : _mm512_setzero_ps();
        for (std::size_t first = 0; first < tokens; first += kRowsOfTile) {
            const std::size_t before = (first / kRowsOfTile * groups + g) * x.height;
            const float* x_scales = x.scales + before;
            const std::int32_t* x_sums = x.sums + 2 * before + part * x.height;
            for (std::size_t t = 0; t < std::min(kRowsOfTile, tokens - first); ++t) {
                float* y = out + (first + t) * kRows;
                const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t]));
                __m512 value = _mm512_fmadd_ps(products[run % 2].row(first + t), both, _mm512_loadu_ps(y));
                if (kMinima) {
                    const float x_sum = x_scales[t] * static_cast<float>(x_sums[t]);
                    value = _mm512_fmadd_ps(minimum, _mm512_set1_ps(x_sum), value);
                }
                _mm512_storeu_ps(y, value);
            }
        }
    };
    std::memset(out, 0, tokens * kRows * sizeof(float));
    multiply(0);
    for (std::size_t run = 1; run < groups * kParts; ++run) {
        multiply(run);
        add(run - 1);
    }
    add(groups * kParts - 1);
}

template <Grid kGrid, bool Wide>
void block(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups, std::size_t groups_per_scale,
           const Rounded& x, std::size_t tokens, float* out) {
    if (tokens < kFewest) {
        const BlockKernels& vector = avx512_blocks();
        const auto& kernels = kGrid == Grid::kMinima4 ? vector.minima4 : kGrid == Grid::kSymmetric4 ? vector.block4 : vector.block8;
        return kernels[Wide](weights, scales, groups, groups_per_scale, x, tokens, out);
    }
    static const TileConfig config(kGrid == Grid::kMinima4);
    _tile_loadconfig(&config);
    tiles<kGrid, Wide>(weights, scales, groups, groups_per_scale, x, tokens, out);
    _tile_release();
}

}  // namespace

const BlockKernels& amx_blocks() {
    static const BlockKernels& vector = avx512_blocks();
    static const BlockKernels kernels{{block<Grid::kSymmetric4, false>, block<Grid::kSymmetric4, true>},
                                      {block<Grid::kSymmetric8, false>, block<Grid::kSymmetric8, true>},
                                      {block<Grid::kMinima4, false>, block<Grid::kMinima4, true>},
                                      {vector.round[0], vector.round[1]},
                                      vector.swiglu,
                                      4 * kRowsOfTile};
    return kernels;
}

}  // namespace ernie45
