// Attention kernels in portable C++: the definition that the other files must equal bit for bit.
#include "kernels/attention_body.hpp"

namespace ernie45 {
namespace {

void dots(const float* q, std::size_t rows, const float* k, std::size_t keys, std::size_t dim, float* scores) {
    const std::size_t whole = dim / kLanes * kLanes;
    for (std::size_t key = 0; key < keys; ++key) {
        for (std::size_t row = 0; row < rows; ++row) {
            const float *x = q + row * dim, *y = k + key * dim;
            Lanes sum = all(0);
            for (std::size_t d = 0; d < whole; d += kLanes) sum = fma(load(x + d), load(y + d), sum);
            if (whole < dim) sum = fma(load_part(x + whole, dim - whole), load_part(y + whole, dim - whole), sum);
            scores[key * kTileRows + row] = fold(sum);
        }
    }
}

void weigh(const float* p, std::size_t rows, const float* v, std::size_t keys, std::size_t dim, float* o) {
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t d = row * dim; d < (row + 1) * dim; d += kLanes) {
            Lanes sum = load(o + d);
            for (std::size_t key = 0; key < keys; ++key) {
                sum = fma(all(p[key * kTileRows + row]), load(v + key * dim + d - row * dim), sum);
            }
            store(o + d, sum);
        }
    }
}

}  // namespace

const AttentionKernels& baseline_attention() {
    static constexpr AttentionKernels kernels{widen_bfloat16, widen_int8, dots, softmax, weigh, join, finish};
    return kernels;
}

}  // namespace ernie45
