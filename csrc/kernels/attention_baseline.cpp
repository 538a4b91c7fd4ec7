// Attention kernels in portable C++: the definition that the other files must equal bit for bit.
#include "kernels/attention_body.hpp"

namespace ernie45 {
namespace {

void dots(const float* q, std::size_t rows, const float* k, std::size_t keys, std::size_t dim, float* tile) {
    const std::size_t whole = dim / kLanes * kLanes;
    for (std::size_t key = 0; key < keys; ++key) {
        for (std::size_t row = 0; row < rows; ++row) {
            const float *x = q + row * dim, *y = k + key * dim;
            Lanes sum = all(0);
            for (std::size_t d = 0; d < whole; d += kLanes) sum = fma(load(x + d), load(y + d), sum);
            if (whole < dim) sum = fma(load_part(x + whole, dim - whole), load_part(y + whole, dim - whole), sum);
            tile[key * kTileRows + row] = fold(sum);
        }
    }
}

void widen_bfloat16(const std::uint16_t* x, std::size_t count, float* out) {
    for (std::size_t i = 0; i < count; ++i) {
        const std::uint32_t bits = static_cast<std::uint32_t>(x[i]) << 16;
        std::memcpy(out + i, &bits, sizeof bits);
    }
}

void widen(const KvRows& rows, std::size_t index, std::size_t dim, float* out) {
    switch (rows.type) {
        case KvType::kFloat32: std::memcpy(out, rows.at[index], dim * sizeof(float)); return;
        case KvType::kBfloat16: return widen_bfloat16(static_cast<const std::uint16_t*>(rows.at[index]), dim, out);
        case KvType::kInt8: return widen_int8(static_cast<const std::int8_t*>(rows.at[index]), rows.scales[index], dim, out);
    }
}

void pack(const KvRows& keys, std::size_t count, std::size_t dim, float* packed) {
    float key[kMaxHeadDim];
    for (std::size_t i = 0; i < count; ++i) {
        widen(keys, i, dim, key);
        for (std::size_t d = 0; d < dim; ++d) packed[(i / kLanes * dim + d) * kLanes + i % kLanes] = key[d];
    }
}

void score(const float* q, std::size_t rows, const float* packed, const KvRows&, std::size_t count, std::size_t dim,
           float* scores) {
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t key = 0; key < count; key += kLanes) {
            Lanes sum = all(0);
            const float *x = q + row * kMaxHeadDim, *y = packed + key * dim;
            for (std::size_t d = 0; d < dim; ++d) sum = fma(all(x[d]), load(y + d * kLanes), sum);
            store(scores + row * kBlock + key, sum);
        }
    }
}

void weigh(const float* p, std::size_t rows, const KvRows& values, std::size_t keys, std::size_t dim, bool begin, bool, float* o) {
    if (begin) std::memset(o, 0, rows * dim * sizeof(float));
    float value[kMaxHeadDim];
    for (std::size_t key = 0; key < keys; ++key) {
        widen(values, key, dim, value);
        for (std::size_t row = 0; row < rows; ++row) {
            const Lanes weight = all(p[row * kBlock + key]);
            float* to = o + row * dim;
            for (std::size_t d = 0; d < dim; d += kLanes) store(to + d, fma(weight, load(value + d), load(to + d)));
        }
    }
}

}  // namespace

const AttentionKernels& baseline_attention() {
    static constexpr AttentionKernels kernels{widen_int8, pack, score, softmax, weigh, join, finish, dots};
    return kernels;
}

}  // namespace ernie45
