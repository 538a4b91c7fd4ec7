// Products with packed matrices, for any number of tokens. All arrays are contiguous float32 unless said otherwise; results do not
// depend on the number of threads nor on the other tokens of the call.
#pragma once

#include "kernels/packed.hpp"

namespace ernie45 {

// y (tokens, rows) = x (tokens, columns) W^T, plus `bias` (rows) and `residual` (tokens, rows) where they are not null.
// Bytes moved for one token: those of the matrix. Source of the layout: packed.hpp.
void packed_linear(const float* x, std::size_t tokens, const Packed& matrix, const float* bias, const float* residual, float* y);

// The `count` largest values of each row of what packed_linear would give, and their columns (tokens, count), largest first and of equal ones
// the lowest column first; the product itself is never in memory. NaN counts as smallest.
void packed_top(const float* x, std::size_t tokens, const Packed& matrix, const float* bias, std::size_t count, float* values,
                std::int64_t* ids);

// A feed-forward unit: a dense layer, a shared expert or one routed expert.
struct FfnUnit {
    Packed gate_up;  // row blocks alternate: 16 gate rows, the 16 up rows that belong to them; 2 x width padded to 64
    Packed down;
    const std::int32_t* tokens = nullptr;  // the tokens that pass through it, ascending; null: all
    const float* weights = nullptr;        // weight of each in the sum; null: 1
    std::size_t count = 0;                 // how many tokens
};

// y (tokens, hidden) = residual + sum over units of weight * down(silu(gate(x)) * up(x)); residual may be null (zero). Each token's
// sum runs over its units in the order given. All units of a call are worked on together, so that small experts keep all threads busy.
void packed_ffn(const float* x, std::size_t tokens, std::size_t hidden, const FfnUnit* units, std::size_t num_units,
                const float* residual, float* y);

// One row of a packed matrix as float32 (columns): an embedding lookup.
void packed_row(const Packed& matrix, std::size_t row, float* y);

}  // namespace ernie45
