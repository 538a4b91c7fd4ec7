// The router of a mixture of experts: scores, choice, weights, and the tokens ordered by expert as packed_ffn takes them.
// Bytes moved for a few tokens: the gate's, 4 E H.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ernie45 {

struct Router {
    const float* gate = nullptr;  // (experts, hidden)
    const float* bias = nullptr;  // (experts) or null: steers the choice, not the weights
    std::size_t experts = 0, hidden = 0, active = 0;
    float norm_min = 0;  // lower bound of the sum that the chosen probabilities are divided by
};

struct Routing {
    float* weights = nullptr;        // (tokens, active), rows sum to 1
    std::int32_t* ids = nullptr;     // (tokens, active), best first; ties go to the lowest id
    std::int64_t* counts = nullptr;  // (experts) tokens of each
    std::int32_t* tokens = nullptr;  // (tokens * active) ordered by expert, then by token
    float* token_weights = nullptr;  // (tokens * active) their weights
};

// Probabilities are the softmax of x (tokens, hidden) . gate, summed as attention's scores are (attention.hpp); the best of
// probability + bias are chosen; the sum of the chosen probabilities runs from the best down.
void route(const float* x, std::size_t tokens, const Router& router, const Routing& routing);

}  // namespace ernie45
