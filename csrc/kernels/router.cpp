#include "kernels/router.hpp"

#include <algorithm>
#include <vector>

#include "kernels/aligned.hpp"
#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/thread_pool.hpp"

namespace ernie45 {
namespace {

constexpr std::size_t kExpertsPerTask = 16;

// scores (tokens, experts)
void find_scores(const float* x, std::size_t tokens, const Router& router, float* scores) {
    const AttentionKernels& kernels = attention_kernels();
    const std::size_t parts = (router.experts + kExpertsPerTask - 1) / kExpertsPerTask, tiles = (tokens + kTileRows - 1) / kTileRows;
    parallel_for(parts * tiles, [&](std::size_t task) {
        const std::size_t token = task / parts * kTileRows, rows = std::min(kTileRows, tokens - token);
        const std::size_t expert = task % parts * kExpertsPerTask, count = std::min(kExpertsPerTask, router.experts - expert);
        float tile[kExpertsPerTask * kTileRows];
        kernels.dots(x + token * router.hidden, rows, router.gate + expert * router.hidden, count, router.hidden, tile);
        for (std::size_t row = 0; row < rows; ++row) {
            for (std::size_t i = 0; i < count; ++i) scores[(token + row) * router.experts + expert + i] = tile[i * kTileRows + row];
        }
    });
}

// The best of probability + bias, each written once to ids; probabilities that are not numbers come last, in order of id.
void choose(const float* probabilities, const Router& router, std::int32_t* ids) {
    for (std::size_t rank = 0; rank < router.active; ++rank) {
        std::int32_t best = -1;
        float best_score = 0;
        for (std::size_t expert = 0; expert < router.experts; ++expert) {
            const auto id = static_cast<std::int32_t>(expert);
            const float score = router.bias == nullptr ? probabilities[expert] : probabilities[expert] + router.bias[expert];
            const bool better = best < 0 || score > best_score || (best_score != best_score && score == score);
            if (better && std::find(ids, ids + rank, id) == ids + rank) {
                best = id;
                best_score = score;
            }
        }
        ids[rank] = best;
    }
}

}  // namespace

void route(const float* x, std::size_t tokens, const Router& router, const Routing& routing) {
    std::fill(routing.counts, routing.counts + router.experts, 0);
    if (tokens == 0) return;
    thread_local Scratch memory;
    float* scores = memory.floats(tokens * router.experts);
    find_scores(x, tokens, router, scores);
    const ElementwiseKernels& kernels = elementwise_kernels();
    const auto one = [&](std::size_t token) {
        float* probabilities = scores + token * router.experts;
        kernels.softmax_row(probabilities, router.experts);
        std::int32_t* ids = routing.ids + token * router.active;
        float *weights = routing.weights + token * router.active, sum = 0;
        choose(probabilities, router, ids);
        for (std::size_t rank = 0; rank < router.active; ++rank) sum += probabilities[ids[rank]];
        const float divisor = sum < router.norm_min ? router.norm_min : sum;
        for (std::size_t rank = 0; rank < router.active; ++rank) weights[rank] = probabilities[ids[rank]] / divisor;
    };
    if (tokens < 16) {
        for (std::size_t token = 0; token < tokens; ++token) one(token);
    } else {
        parallel_for(tokens, one);
    }

    thread_local std::vector<std::int64_t> next;
    for (std::size_t i = 0; i < tokens * router.active; ++i) ++routing.counts[routing.ids[i]];
    next.assign(router.experts, 0);
    for (std::size_t expert = 1; expert < router.experts; ++expert) next[expert] = next[expert - 1] + routing.counts[expert - 1];
    for (std::size_t i = 0; i < tokens * router.active; ++i) {
        const auto at = static_cast<std::size_t>(next[static_cast<std::size_t>(routing.ids[i])]++);
        routing.tokens[at] = static_cast<std::int32_t>(i / router.active);
        routing.token_weights[at] = routing.weights[i];
    }
}

}  // namespace ernie45
