#include "kernels/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/isa.hpp"
#include "kernels/philox.hpp"

namespace ernie45 {
namespace {

// What a row is whose largest number is -inf or +inf.
std::int64_t why_not(const float* logits, std::size_t count, float best) {
    const bool any_nan = std::any_of(logits, logits + count, [](float x) { return x != x; });
    return best > 0 || any_nan ? kNotFinite : kNothingToDraw;
}

// The first place where the weights, added to `before` one by one, exceed the target; else the last that weighs anything.
std::size_t walk(const double* weights, std::size_t count, double before, double target) {
    std::size_t last = 0;
    for (std::size_t i = 0; i < count; ++i) {
        if (weights[i] == 0) continue;
        before += weights[i];
        last = i;
        if (before > target) break;
    }
    return last;
}

}  // namespace

const SamplingKernels& sampling_kernels() {
#if defined(__x86_64__)
    switch (current_isa()) {
        case Isa::kAmx:
        case Isa::kAvx512: return avx512_sampling();
        case Isa::kAvx2: return avx2_sampling();
        default: break;
    }
#endif
    return baseline_sampling();
}

std::int64_t draw(const float* logits, std::size_t count, double temperature, std::uint64_t seed, std::uint64_t step) {
    const SamplingKernels& kernels = sampling_kernels();
    const float best = kernels.largest(logits, count);
    if (std::isinf(best)) return why_not(logits, count, best);
    const double rate = 1 / temperature;
    const std::size_t blocks = (count + kSamplingBlock - 1) / kSamplingBlock;
    const auto size = [&](std::size_t block) { return std::min(kSamplingBlock, count - block * kSamplingBlock); };
    thread_local std::vector<double> sums;  // of a block and all before it
    sums.assign(blocks + 1, 0);
    for (std::size_t block = 0; block < blocks; ++block) {
        sums[block + 1] = sums[block] + kernels.weight_sum(logits + block * kSamplingBlock, size(block), best, rate);
    }
    const double total = sums[blocks];
    if (total != total) return kNotFinite;
    // Rounding can push the target to the very end of the sum; then the last block that adds to it is searched, and has no answer.
    const double target = uniform(seed, step) * total;
    auto end = std::upper_bound(sums.begin() + 1, sums.end(), target);
    if (end == sums.end()) end = std::lower_bound(sums.begin() + 1, sums.end(), total);
    const auto block = static_cast<std::size_t>(end - sums.begin()) - 1;
    double weights[kSamplingBlock];
    kernels.weights(logits + block * kSamplingBlock, size(block), best, rate, weights);
    return static_cast<std::int64_t>(block * kSamplingBlock + walk(weights, size(block), sums[block], target));
}

double logprob(const float* logits, std::size_t count, std::size_t token) {
    const SamplingKernels& kernels = sampling_kernels();
    const float best = kernels.largest(logits, count);
    if (std::isinf(best)) return std::numeric_limits<double>::quiet_NaN();
    const double sum = kernels.exponential_sum(logits, count, best);
    return static_cast<double>(logits[token]) - static_cast<double>(best) - std::log(sum);
}

double uniform(std::uint64_t seed, std::uint64_t step) {
    // NumPy counts up before it draws, and takes the upper 53 bits of the first word.
    const std::uint64_t next = step + 1;
    const std::array<std::uint64_t, 4> words = philox({next, next == 0 ? 1U : 0U, 0, 0}, {seed, 0});
    return static_cast<double>(words[0] >> 11) * 0x1p-53;
}

}  // namespace ernie45
