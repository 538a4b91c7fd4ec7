// Elementwise kernels compiled for portable C++.
#include "kernels/elementwise_body.hpp"

namespace ernie45 {

const ElementwiseKernels& baseline_elementwise() { return kElementwise; }

}  // namespace ernie45
