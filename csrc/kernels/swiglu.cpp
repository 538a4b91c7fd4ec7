#include "kernels/swiglu.hpp"

#include "kernels/isa.hpp"

namespace ernie45 {
namespace {

const SwigluKernels& kernels() {
#if defined(__x86_64__)
    switch (current_isa()) {
        case Isa::kAmx:
        case Isa::kAvx512: return avx512_swiglu();
        case Isa::kAvx2: return avx2_swiglu();
        default: break;
    }
#endif
    return baseline_swiglu();
}

}  // namespace

void swiglu(const float* products, std::size_t tokens, std::size_t width, float* hidden) {
    const SwigluKernels& chosen = kernels();
    for (std::size_t token = 0; token < tokens; ++token) chosen.forward_row(products + 2 * token * width, width, hidden + token * width);
}

void swiglu_backward(const SwigluGradient& arrays, std::size_t tokens, std::size_t width) {
    const SwigluKernels& chosen = kernels();
    for (std::size_t token = 0; token < tokens; ++token) {
        const std::size_t at = token * width;
        const float weight = arrays.weights == nullptr ? 1.0f : arrays.weights[token];
        const float dot = chosen.backward_row(arrays.products + 2 * at, width, weight, arrays.gradient + at, arrays.d_products + 2 * at);
        if (arrays.dots != nullptr) arrays.dots[token] = dot;
    }
}

}  // namespace ernie45
