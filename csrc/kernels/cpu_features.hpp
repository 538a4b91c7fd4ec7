// What the CPU and its operating system offer, found at run time. Kernels are compiled per instruction set and chosen with this.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace ernie45 {

// A member is true when the instructions exist AND the operating system saves the registers that they use.
// Names are those of Linux' /proc/cpuinfo; members of other architectures stay false.
struct CpuFeatures {
    // x86
    bool sse4_2 = false;
    bool avx = false;
    bool avx2 = false;
    bool fma = false;
    bool f16c = false;
    bool avx_vnni = false;
    bool avx512f = false;
    bool avx512bw = false;
    bool avx512vl = false;
    bool avx512dq = false;
    bool avx512_vnni = false;
    bool avx512_bf16 = false;
    bool avx512_fp16 = false;
    // AMX: on Linux a process must also ask for the tile registers, with arch_prctl(ARCH_REQ_XCOMP_PERM), before it uses them.
    bool amx_tile = false;
    bool amx_int8 = false;
    bool amx_bf16 = false;
    // ARM
    bool neon = false;
    bool dotprod = false;
    bool i8mm = false;
};

// Sizes and counts are 0 where the system does not tell.
struct CpuInfo {
    std::string architecture;  // "x86_64", "aarch64", or "unknown"
    std::string model;         // the CPU's own name for itself, may be empty
    int logical_cores = 0;     // online hardware threads of the machine
    int physical_cores = 0;
    // Of one instance each, as the first core sees it: an L1d per core, an L3 per group of cores.
    std::size_t l1d_bytes = 0;
    std::size_t l2_bytes = 0;
    std::size_t l3_bytes = 0;
    std::size_t cache_line_bytes = 0;
};

// Detected on the first call, then the same object; safe from several threads.
const CpuFeatures& cpu_features();

// The same as (name, present) pairs in the order of the members.
std::vector<std::pair<const char*, bool>> feature_list(const CpuFeatures& features);

// Asks the CPU and the system on every call (on Linux it opens some files): not for inner loops.
CpuInfo cpu_info();

}  // namespace ernie45
