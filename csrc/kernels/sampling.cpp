#include "kernels/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
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

struct Row {
    const SamplingKernels& kernels;
    const float* logits;
    std::size_t count;
    float best;
    double temperature, rate = 1 / temperature;

    const float* block(std::size_t i) const { return logits + i * kSamplingBlock; }
    std::size_t block_size(std::size_t i) const { return std::min(kSamplingBlock, count - i * kSamplingBlock); }
};

// The first place where the weights, added to `before` one by one, exceed the target; else the last that weighs anything.
std::size_t walk(const double* weights, std::size_t count, double before, double target) {
    for (std::size_t i = 0; i < count; ++i) {
        before += weights[i];
        if (before > target) return i;
    }
    std::size_t last = count - 1;
    while (last > 0 && weights[last] == 0) --last;
    return last;
}

// The id at this share of the whole sum. sums: see `draw`.
std::size_t find(const Row& row, const std::vector<double>& sums, double share) {
    const double total = sums.back(), target = share * total;
    // Rounding can push the target to the very end of the sum; then the last block that adds to it is searched, and has no answer.
    auto end = std::upper_bound(sums.begin() + 1, sums.end(), target);
    if (end == sums.end()) end = std::lower_bound(sums.begin() + 1, sums.end(), total);
    const auto block = static_cast<std::size_t>(end - sums.begin()) - 1;
    double weights[kSamplingBlock];
    row.kernels.weights(row.block(block), row.block_size(block), row.best, row.rate, weights);
    return block * kSamplingBlock + walk(weights, row.block_size(block), sums[block], target);
}

// Some ids in ascending order.
struct Candidates {
    std::vector<std::size_t> ids;  // as many as there are weights, then room
    std::vector<float> logits;     // likewise
    std::vector<double> weights;

    double sum() const { return std::accumulate(weights.begin(), weights.end(), 0.0); }
};

// The ids whose logit reaches a limit. Most stretches of a row hold none and are passed over at once; in others a branch would be
// guessed wrong too often.
void collect(const Row& row, float limit, Candidates& found) {
    constexpr std::size_t stretch = 64;
    found.ids.resize(row.count);
    found.logits.resize(row.count);
    std::size_t size = 0;
    for (std::size_t start = 0; start < row.count; start += stretch) {
        const std::size_t end = std::min(start + stretch, row.count);
        if (row.kernels.largest(row.logits + start, end - start) < limit) continue;
        for (std::size_t id = start; id < end; ++id) {
            found.ids[size] = id;
            found.logits[size] = row.logits[id];
            size += row.logits[id] >= limit;
        }
    }
    found.weights.resize(size);
    row.kernels.weights(found.logits.data(), size, row.best, row.rate, found.weights.data());
}

struct Ranked {
    double weight;
    std::size_t place;

    bool operator<(const Ranked& other) const { return weight > other.weight || (weight == other.weight && place < other.place); }
};

// Weights within an eighth of a power of two share a class; heavier ones have a higher.
constexpr std::size_t kClasses = (1023 << 3) + 1;

std::size_t class_of(double weight) {
    std::uint64_t bits;
    std::memcpy(&bits, &weight, sizeof bits);
    return static_cast<std::size_t>(bits >> 49);
}

// Of a list, the last of those that, from the heaviest on, reach `mass`: halves in which it cannot be are ordered no further.
Ranked last_member(std::vector<Ranked>& ranked, double mass) {
    auto first = ranked.begin(), end = ranked.end();
    while (end - first > 1) {
        const auto middle = first + (end - first) / 2;
        std::nth_element(first, middle, end);
        double sum = 0;
        for (auto at = first; at != middle; ++at) sum += at->weight;
        if (sum >= mass) {
            end = middle;
        } else {
            mass -= sum;
            first = middle;
        }
    }
    return *first;
}

// The same of weights up to 1: what they sum to by class tells the one class that must be ranked.
Ranked last_member(const std::vector<double>& weights, double mass) {
    thread_local std::vector<double> sums;
    sums.assign(kClasses, 0);
    for (const double weight : weights) sums[class_of(weight)] += weight;
    // Added in the order of the search, so that rounding cannot leave it without an end.
    mass = std::min(mass, std::accumulate(sums.rbegin(), sums.rend(), 0.0));
    std::size_t crossing = kClasses - 1;
    double heavier = 0;
    for (; heavier + sums[crossing] < mass; --crossing) heavier += sums[crossing];
    thread_local std::vector<Ranked> ranked;
    ranked.clear();
    for (std::size_t i = 0; i < weights.size(); ++i) {
        if (class_of(weights[i]) == crossing) ranked.push_back({weights[i], i});
    }
    return last_member(ranked, mass - heavier);
}

// The id at this share of what the heaviest weigh that reach `mass` together. They are looked for among those that weigh at
// least 2^-8, then 2^-16, then all, of which there may be very many.
std::size_t find_in_nucleus(const Row& row, double mass, double share) {
    thread_local Candidates found;
    for (const double factor : {0x1p-8, 0x1p-16, 0.0}) {
        collect(row, static_cast<float>(static_cast<double>(row.best) + std::log(factor) * row.temperature), found);
        if (found.sum() >= mass) break;
    }
    const Ranked last = last_member(found.weights, mass);
    for (std::size_t i = 0; i < found.weights.size(); ++i) {
        const double weight = found.weights[i];
        found.weights[i] = weight < last.weight || (weight == last.weight && i > last.place) ? 0 : weight;
    }
    return found.ids[walk(found.weights.data(), found.weights.size(), 0, share * found.sum())];
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

std::int64_t draw(const float* logits, std::size_t count, double temperature, double top_p, std::uint64_t seed, std::uint64_t step) {
    const SamplingKernels& kernels = sampling_kernels();
    const float best = kernels.largest(logits, count);
    if (std::isinf(best)) return why_not(logits, count, best);
    const Row row{kernels, logits, count, best, temperature};
    const std::size_t blocks = (count + kSamplingBlock - 1) / kSamplingBlock;
    thread_local std::vector<double> sums;  // of the blocks before each, and of all
    sums.assign(blocks + 1, 0);
    for (std::size_t block = 0; block < blocks; ++block) {
        sums[block + 1] = sums[block] + kernels.weight_sum(row.block(block), row.block_size(block), best, row.rate);
    }
    if (sums[blocks] != sums[blocks]) return kNotFinite;
    const double share = uniform(seed, step);
    return static_cast<std::int64_t>(top_p < 1 ? find_in_nucleus(row, top_p * sums[blocks], share) : find(row, sums, share));
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
