// Operations that touch every value once: norm, rotary embedding with the append to keys and values. Bounded by memory: each input is
// read once, each output written once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/attention.hpp"

namespace ernie45 {

// y = h / sqrt(mean(h^2) + eps) * weight with h = x + residual; all (tokens, width) float32. `residual` may be null; where it is not,
// h is written to `sum` (which may be x or residual). The squares are added in 16 partial sums (lane i takes i, i + 16, ..), folded
// i + 8, i + 4, i + 2, i + 1.
void rms_norm(const float* x, std::size_t tokens, std::size_t width, const float* weight, float eps, const float* residual,
              float* sum, float* y);

// Turns the pairs (2 j, 2 j + 1) of every query and key head of qkv (T, N + 2 G, D) by rotation (T, D / 2), complex float32:
//   (a, b) -> (fma(a, cos, -(b sin)), fma(b, cos, a sin))
// writes the queries to q (T, N, D) and appends keys and values to their stores. bfloat16 rounds to nearest even; int8 stores
// round(x * (127 / largest)) and the scale largest / 127 of each token and head.
void rope_append(const float* qkv, std::size_t query_heads, const float* rotation, const KvStores& stores, const Sequences& sequences,
                 float* q);

struct ElementwiseKernels {
    void (*norm_row)(const float* x, std::size_t width, const float* weight, float eps, const float* residual, float* sum, float* y);
    void (*rotate)(const float* x, const float* rotation, std::size_t dim, float* out);
    void (*to_bfloat16)(const float* x, std::size_t count, std::uint16_t* out);
    void (*to_int8)(const float* x, std::size_t count, std::int8_t* out, float* scale);
    // Row of scores to probabilities: 16 partial sums, folded as above.
    void (*softmax_row)(float* x, std::size_t count);
};

const ElementwiseKernels& baseline_elementwise();
const ElementwiseKernels& avx2_elementwise();
const ElementwiseKernels& avx512_elementwise();
const ElementwiseKernels& elementwise_kernels();

}  // namespace ernie45
