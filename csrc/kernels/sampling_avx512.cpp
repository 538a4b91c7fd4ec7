// Sampling kernels compiled for AVX-512.
#include "kernels/sampling_body.hpp"

namespace ernie45 {

const SamplingKernels& avx512_sampling() { return kSampling; }

}  // namespace ernie45
