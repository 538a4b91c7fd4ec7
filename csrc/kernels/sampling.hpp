// The draw of a token from one row of logits, and the log-probability of one. Bounded by the exponentials: the row, which fits the
// cache, is read twice.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ernie45 {

// What `draw` answers in place of an id.
constexpr std::int64_t kNothingToDraw = -1;  // every logit is -inf
constexpr std::int64_t kNotFinite = -2;      // some logit is NaN or +inf

// The inverse of the cumulative distribution over ids in ascending order, at uniform(seed, step). Ids weigh
//   e^(float64(v - best) x (1 / temperature))
// in float64, v - best in float32; below e^-708, which -inf is, they weigh nothing. Order of the sum: 16 partial sums per block of
// kSamplingBlock ids (lane i takes i, i + 16, ..), folded i + 8, i + 4, i + 2, i + 1; blocks one after the other. The number falls into the
// first block whose sum with all before it exceeds it, or, by rounding, into the last that adds to the sum; from that block's beginning
// weights are added one by one. Where rounding leaves nothing that exceeds the number, the block's last id that weighs anything is
// drawn. An id without weight never is.
// With top_p below 1 it is the same among the fewest heaviest ids that reach this share of the sum, of equal ones the lowest ids; their
// weights are added one by one.
// Expects a row that is not empty, a finite temperature from kLeastTemperature, top_p above 0.
std::int64_t draw(const float* logits, std::size_t count, double temperature, double top_p, std::uint64_t seed, std::uint64_t step);

// logits[token] - best - log(sum of e^(v - best)): exponentials of float32 (exponential.hpp), added in 16 partial sums of float64. NaN
// where a logit is NaN or +inf, or all are -inf.
double logprob(const float* logits, std::size_t count, std::size_t token);

// A number in [0, 1): the first that NumPy's generator gives on Philox(key=seed, counter=step).
double uniform(std::uint64_t seed, std::uint64_t step);

// The smallest that the weights stay finite with.
constexpr double kLeastTemperature = 1e-6;
constexpr std::size_t kSamplingBlock = 512;

struct SamplingKernels {
    // The largest of all; NaN is passed over.
    float (*largest)(const float* x, std::size_t count);
    // Weights as above with rate = 1 / temperature, one by one, and the sum of up to kSamplingBlock.
    void (*weights)(const float* x, std::size_t count, float best, double rate, double* out);
    double (*weight_sum)(const float* x, std::size_t count, float best, double rate);
    // Sum of e^(v - best) for `logprob`.
    double (*exponential_sum)(const float* x, std::size_t count, float best);
};

const SamplingKernels& baseline_sampling();
const SamplingKernels& avx2_sampling();
const SamplingKernels& avx512_sampling();
const SamplingKernels& sampling_kernels();

}  // namespace ernie45
