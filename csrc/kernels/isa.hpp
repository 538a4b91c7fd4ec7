// Which instruction set the kernels use: chosen once from what the CPU offers, or forced by name.
#pragma once

#include <vector>

#include "kernels/packed.hpp"

namespace ernie45 {

enum class Isa { kBaseline, kAvx2, kAvx512, kAmx };  // each includes those before it

// What this build holds, worst first; a CPU that supports one supports those before it.
std::vector<Isa> compiled_isas();
// The best of them that CPU and operating system support.
Isa best_isa();
// The one in use; starts as the best.
Isa current_isa();
// False, and no change, if the CPU lacks it.
bool set_isa(Isa isa);

const BlockKernels& block_kernels();

}  // namespace ernie45
