// Sampling kernels compiled for AVX2 and FMA.
#include "kernels/sampling_body.hpp"

namespace ernie45 {

const SamplingKernels& avx2_sampling() { return kSampling; }

}  // namespace ernie45
