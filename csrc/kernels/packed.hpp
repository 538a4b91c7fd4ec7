// Packed matrices: 8- or 4-bit weights in the order in which the kernels stream them, and activations rounded per group to 8 bits
// or to 16.
//
// A matrix of N rows (outputs) and K columns (inputs) is cut into blocks of 16 rows and groups of 64 columns; both are padded with zeros.
// Within block and group, 64 consecutive bytes hold 16 rows x 4 columns:
//   8 bit: byte 4 r + j of vector v = weight of row r, column 4 v + j, plus 128
//   4 bit: the low nibble of byte 4 r + j of vector v = row r, column 8 v + j; the high nibble = column 8 v + 4 + j; both plus 8
// So one vector of weights meets one 32-bit word of activations (4 columns) that is broadcast to all rows, and each 32-bit lane sums
// one row: no shuffles, no horizontal sums. Scales are float16, 16 of a block side by side, one set per `group` columns.
//
// 4-bit matrices may have a scale and a minimum for every half of a group (32 columns), weight = code * scale + minimum with codes
// 0 .. 15; a set is then 16 scales and 16 minima. That is the grid of GGUF's Q4_1.
//
// The product is exact in integers within a group of 64, or a half; they are added in float32 in ascending order:
//   y = fma(float(dot), weight scale * activation scale, y), and after it, with minima,
//   y = fma(minimum, activation scale * float(sum of the half's values), y)
// Every instruction set does exactly this, so all give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ernie45 {

constexpr std::size_t kRows = 16;   // rows of a block
constexpr std::size_t kGroup = 64;  // columns that share an activation scale
constexpr std::size_t kHalf = 32;   // columns that share a scale and a minimum where there are minima
constexpr int kOffset4 = 8, kOffset8 = 128;

inline std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

struct Packed {
    const std::uint8_t* weights = nullptr;
    const std::uint16_t* scales = nullptr;  // float16
    std::size_t rows = 0, columns = 0;      // without padding
    std::size_t groups_per_scale = 1;       // groups of 64 columns that share a weight scale
    int bits = 8;
    bool wide = false;    // activations are rounded to 16 bits instead of 8
    bool minima = false;  // scale and minimum per half group; 4 bits only

    std::size_t blocks() const { return round_up(rows, kRows) / kRows; }
    std::size_t groups() const { return round_up(columns, kGroup) / kGroup; }
    std::size_t scale_sets() const { return minima ? 2 * groups() : round_up(groups(), groups_per_scale) / groups_per_scale; }
    std::size_t set_size() const { return minima ? 2 * kRows : kRows; }
    std::size_t group_bytes() const { return kRows * kGroup * static_cast<std::size_t>(bits) / 8; }
    const std::uint8_t* block_weights(std::size_t block) const { return weights + block * groups() * group_bytes(); }
    const std::uint16_t* block_scales(std::size_t block) const { return scales + block * scale_sets() * set_size(); }
};

// Rows of activations, rounded per group: x = value * scale. Narrow values lie in -127 .. 127, one byte each, in order. Wide ones
// lie in -32512 .. 32512, two bytes each; how they lie within their group is up to each instruction set's file.
//
// Rows lie in tiles of 16 (kRowsOfTile), or of as many as there are: the values of a group of a tile are together, so that a kernel's tokens
// are a fixed number of bytes apart.
struct Rounded {
    const std::uint8_t* values = nullptr;  // of the first row's tile: (groups, height, 64 or 128 bytes), zeros in the padding
    const float* scales = nullptr;         // (groups, height): largest magnitude of the group / 127 or 32512
    const std::int32_t* sums = nullptr;    // (groups, 2, height): sums of the values of both halves
    std::size_t height = 1;                // rows of a tile
    std::size_t first = 0;                 // the first row's place in its tile
};

constexpr std::size_t kRowsOfTile = 16;
constexpr float kNarrowest = 127.0f, kWidest = 32512.0f;  // 32512 = 127 * 256: its high byte still fits 8 signed bits
// Groups whose largest magnitude is below this are zero: the inverse of their scale could overflow.
constexpr float kSmallest = 1e-30f;

// How weights stand for values, for the kernels that are written once for all of them.
enum class Grid { kSymmetric4, kSymmetric8, kMinima4 };

// How far ahead weights are asked for. The hardware's prefetcher stops at page borders, and mapped files have small pages. Into the
// second-level cache: asking for the first would hold up its few outstanding misses (measured: 20.8 GB/s with T0, 26.6 with T1).
constexpr std::size_t kAhead = 3072;  // bytes

// One row block times `tokens` rows of activations: out (tokens, 16) float32. `tokens` is 1 .. BlockKernels::max_tile; the rows may leave
// their tile only where that is more than 8, and then begin with one. Up to kSlack bytes behind the last are read and do not matter.
constexpr std::size_t kMaxTile = 64, kSlack = 2 * kRowsOfTile * kGroup;
using BlockKernel = void (*)(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups,
                             std::size_t groups_per_scale, const Rounded& x, std::size_t tokens, float* out);
// Rounds 64 values into row `row` of a group of a tile.
using RoundKernel = void (*)(const float* x, std::size_t row, std::size_t height, std::uint8_t* values, float* scales, std::int32_t* sums);
// silu(gate) * up of 16 values. The exponential is the same polynomial in every file (exponential.hpp), so the bits are too.
using SwigluKernel = void (*)(const float* gate, const float* up, float* out);

struct BlockKernels {
    BlockKernel block4[2], block8[2], minima4[2];  // for narrow and for wide activations
    RoundKernel round[2];
    SwigluKernel swiglu;
    std::size_t max_tile;  // tokens that a call takes, at most kMaxTile

    BlockKernel block(const Packed& m) const { return (m.minima ? minima4 : m.bits == 4 ? block4 : block8)[m.wide]; }
};

const BlockKernels& baseline_blocks();
const BlockKernels& avx2_blocks();
const BlockKernels& avx512_blocks();
const BlockKernels& amx_blocks();

}  // namespace ernie45
