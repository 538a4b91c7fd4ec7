// Packed matrices: 8- or 4-bit weights in the order in which the kernels stream them, and activations rounded to 8 bits per group.
//
// A matrix of N rows (outputs) and K columns (inputs) is cut into blocks of 16 rows and groups of 64 columns; both are padded with zeros.
// Within block and group, 64 consecutive bytes hold 16 rows x 4 columns:
//   8 bit: byte 4 r + j of vector v = weight of row r, column 4 v + j, plus 128
//   4 bit: the low nibble of byte 4 r + j of vector v = row r, column 8 v + j; the high nibble = column 8 v + 4 + j; both plus 8
// So one vector of weights meets one 32-bit word of activations (4 columns) that is broadcast to all rows, and each 32-bit lane sums
// one row: no shuffles, no horizontal sums. Scales are float16, 16 of a block side by side, one set per `group` columns.
//
// The product is exact in integers within a group of 64; groups are added in float32 in ascending order:
//   y = fma(float(dot), weight scale * activation scale, y)
// Every instruction set does exactly this, so all give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ernie45 {

constexpr std::size_t kRows = 16;   // rows of a block
constexpr std::size_t kGroup = 64;  // columns that share an activation scale
constexpr int kOffset4 = 8, kOffset8 = 128;

inline std::size_t round_up(std::size_t value, std::size_t unit) { return (value + unit - 1) / unit * unit; }

struct Packed {
    const std::uint8_t* weights = nullptr;
    const std::uint16_t* scales = nullptr;  // float16
    std::size_t rows = 0, columns = 0;      // without padding
    std::size_t groups_per_scale = 1;       // groups of 64 columns that share a weight scale
    int bits = 8;

    std::size_t blocks() const { return round_up(rows, kRows) / kRows; }
    std::size_t groups() const { return round_up(columns, kGroup) / kGroup; }
    std::size_t scale_sets() const { return round_up(groups(), groups_per_scale) / groups_per_scale; }
    std::size_t group_bytes() const { return kRows * kGroup * static_cast<std::size_t>(bits) / 8; }
    const std::uint8_t* block_weights(std::size_t block) const { return weights + block * groups() * group_bytes(); }
    const std::uint16_t* block_scales(std::size_t block) const { return scales + block * scale_sets() * kRows; }
};

// Rows of activations, rounded to 8 bits: x = values * scale, values in -127 .. 127.
struct Rounded {
    const std::int8_t* values = nullptr;  // (tokens, groups * 64), zeros in the padding
    const float* scales = nullptr;        // (tokens, groups): largest magnitude of the group / 127
    const std::int32_t* sums = nullptr;   // (tokens, groups): sum of the group's values
};

// One row block times `tokens` rows of activations: out (tokens, 16) float32. `tokens` is 1 .. kMaxTile.
constexpr std::size_t kMaxTile = 8;
using BlockKernel = void (*)(const std::uint8_t* weights, const std::uint16_t* scales, std::size_t groups,
                             std::size_t groups_per_scale, const Rounded& x, std::size_t tokens, float* out);
// Rounds one group of 64 values.
using RoundKernel = void (*)(const float* x, std::int8_t* values, float* scale, std::int32_t* sum);
// silu(gate) * up of 16 values. The exponential is the same polynomial in every file (exponential.hpp), so the bits are too.
using SwigluKernel = void (*)(const float* gate, const float* up, float* out);

struct BlockKernels {
    BlockKernel block4, block8;
    RoundKernel round;
    SwigluKernel swiglu;
};

const BlockKernels& baseline_blocks();
const BlockKernels& avx2_blocks();
const BlockKernels& avx512_blocks();

}  // namespace ernie45
