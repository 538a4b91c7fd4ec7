// Elementwise kernels compiled for AVX-512.
#include "kernels/elementwise_body.hpp"

namespace ernie45 {

const ElementwiseKernels& avx512_elementwise() { return kElementwise; }

}  // namespace ernie45
