// The activation compiled for AVX2.
#include "kernels/swiglu_body.hpp"

namespace ernie45 {

const SwigluKernels& avx2_swiglu() { return kSwiglu; }

}  // namespace ernie45
