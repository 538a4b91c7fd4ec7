// The activation between the two matrices of a feed-forward block, silu(gate) * up, and its backward pass. Bounded by memory: each
// input is read once, each output written once (12 I bytes per token forward, 24 I backward).
//
// On the calling thread alone: training calls it between matrix products of PyTorch, whose OpenMP threads spin while they wait. Threads of
// our own would fight with them for the cores: of 512 tokens with I = 256 the backward pass takes 0.18 ms on one thread, 0.43 on two
// of the pool (two cores), 1.05 as operations of PyTorch on two.
#pragma once

#include <cstddef>

namespace ernie45 {

// hidden (tokens, width) = gate / (1 + e^-gate) * up; products (tokens, 2 width) hold a token's gates, then its ups.
void swiglu(const float* products, std::size_t tokens, std::size_t width, float* hidden);

// Of one token, with s = 1 / (1 + e^-gate), a = gate s, h = a up and d = gradient * weight:
//   d_products = (d up (s + a (1 - s)), d a),   gradient <- weight h,   dot = sum of h * gradient
// The sum is taken in 16 partial sums (lane i takes i, i + 16, ..), folded i + 8, i + 4, i + 2, i + 1. `weights` and `dots` (tokens)
// may be null: weights of one, and no sums.
struct SwigluGradient {
    const float* products = nullptr;
    float* gradient = nullptr;  // in: the gradient of h; out: h times the weight
    float* d_products = nullptr;
    const float* weights = nullptr;
    float* dots = nullptr;
};
void swiglu_backward(const SwigluGradient& arrays, std::size_t tokens, std::size_t width);

struct SwigluKernels {
    void (*forward_row)(const float* products, std::size_t width, float* hidden);
    // Returns the dot product.
    float (*backward_row)(const float* products, std::size_t width, float weight, float* gradient, float* d_products);
};

const SwigluKernels& baseline_swiglu();
const SwigluKernels& avx2_swiglu();
const SwigluKernels& avx512_swiglu();

}  // namespace ernie45
