// The activation compiled for AVX-512.
#include "kernels/swiglu_body.hpp"

namespace ernie45 {

const SwigluKernels& avx512_swiglu() { return kSwiglu; }

}  // namespace ernie45
