// Sampling kernels compiled for portable C++.
#include "kernels/sampling_body.hpp"

namespace ernie45 {

const SamplingKernels& baseline_sampling() { return kSampling; }

}  // namespace ernie45
