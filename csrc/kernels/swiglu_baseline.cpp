// The activation compiled for portable C++.
#include "kernels/swiglu_body.hpp"

namespace ernie45 {

const SwigluKernels& baseline_swiglu() { return kSwiglu; }

}  // namespace ernie45
