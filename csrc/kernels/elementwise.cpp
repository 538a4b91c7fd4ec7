#include "kernels/elementwise.hpp"

#include <cstring>
#include <vector>

#include "kernels/isa.hpp"
#include "kernels/thread_pool.hpp"

namespace ernie45 {
namespace {

// Values that one thread works through before a second is worth waking.
constexpr std::size_t kAlone = 32 * 1024;

template <typename Body>
void for_tokens(std::size_t tokens, std::size_t width, const Body& body) {
    if (tokens * width < kAlone) {
        for (std::size_t token = 0; token < tokens; ++token) body(token);
    } else {
        parallel_for(tokens, body);
    }
}

// One token's head into its slot.
void put(const ElementwiseKernels& kernels, const float* x, const KvStore& store, const KvHalf& half, std::ptrdiff_t page,
         std::ptrdiff_t head, std::ptrdiff_t slot) {
    const std::size_t dim = store.head_dim;
    const std::ptrdiff_t at = page * half.page_stride + head * half.head_stride + slot * static_cast<std::ptrdiff_t>(dim);
    switch (store.type) {
        case KvType::kFloat32: std::memcpy(static_cast<float*>(half.base) + at, x, dim * sizeof(float)); break;
        case KvType::kBfloat16: kernels.to_bfloat16(x, dim, static_cast<std::uint16_t*>(half.base) + at); break;
        case KvType::kInt8:
            kernels.to_int8(x, dim, static_cast<std::int8_t*>(half.base) + at,
                            half.scales + page * half.scale_page_stride + head * half.scale_head_stride + slot);
            break;
    }
}

// Where a new token goes.
struct Place {
    const KvStore* store;
    std::ptrdiff_t page, slot;
};

void find_places(const KvStores& stores, const Sequences& sequences, std::vector<Place>& places) {
    places.clear();
    for (std::size_t sequence = 0; sequence < sequences.count; ++sequence) {
        const KvStore& store = stores.of(sequence);
        const std::int32_t* pages = sequences.pages + sequence * sequences.pages_per_sequence;
        const auto length = static_cast<std::size_t>(sequences.lengths[sequence]);
        for (std::size_t at = length - static_cast<std::size_t>(sequences.fresh[sequence]); at < length; ++at) {
            places.push_back({&store, pages[at / store.slots], static_cast<std::ptrdiff_t>(at % store.slots)});
        }
    }
}

}  // namespace

const ElementwiseKernels& elementwise_kernels() {
#if defined(__x86_64__)
    switch (current_isa()) {
        case Isa::kAmx:
        case Isa::kAvx512: return avx512_elementwise();
        case Isa::kAvx2: return avx2_elementwise();
        default: break;
    }
#endif
    return baseline_elementwise();
}

void rms_norm(const float* x, std::size_t tokens, std::size_t width, const float* weight, float eps, const float* residual,
              float* sum, float* y) {
    const ElementwiseKernels& kernels = elementwise_kernels();
    for_tokens(tokens, width, [&](std::size_t token) {
        const std::size_t at = token * width;
        if (residual == nullptr) {
            kernels.norm_row(x + at, width, weight, eps, nullptr, nullptr, y + at);
        } else {
            kernels.norm_row(x + at, width, weight, eps, residual + at, sum + at, y + at);
        }
    });
}

void rope_append(const float* qkv, std::size_t query_heads, const float* rotation, const KvStores& stores, const Sequences& sequences,
                 float* q) {
    const ElementwiseKernels& kernels = elementwise_kernels();
    const std::size_t dim = stores.head_dim(), heads = stores.heads(), width = (query_heads + 2 * heads) * dim;
    thread_local std::vector<Place> found;
    std::vector<Place>& places = found;  // the workers read the caller's
    find_places(stores, sequences, places);
    for_tokens(places.size(), width, [&](std::size_t token) {
        const float *row = qkv + token * width, *turn = rotation + token * dim;
        for (std::size_t head = 0; head < query_heads; ++head) {
            kernels.rotate(row + head * dim, turn, dim, q + (token * query_heads + head) * dim);
        }
        const Place& place = places[token];
        const KvStore& store = *place.store;
        for (std::size_t head = 0; head < heads; ++head) {
            const auto h = static_cast<std::ptrdiff_t>(head);
            float key[kMaxHeadDim];
            kernels.rotate(row + (query_heads + head) * dim, turn, dim, key);
            put(kernels, key, store, store.keys, place.page, h, place.slot);
            put(kernels, row + (query_heads + heads + head) * dim, store, store.values, place.page, h, place.slot);
        }
    });
}

}  // namespace ernie45
