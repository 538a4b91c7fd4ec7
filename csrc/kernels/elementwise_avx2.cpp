// Elementwise kernels compiled for AVX2 and FMA.
#include "kernels/elementwise_body.hpp"

namespace ernie45 {

const ElementwiseKernels& avx2_elementwise() { return kElementwise; }

}  // namespace ernie45
