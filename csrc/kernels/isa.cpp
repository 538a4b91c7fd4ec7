#include "kernels/isa.hpp"

#include <atomic>

#if defined(ERNIE45_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/cpu_features.hpp"

namespace ernie45 {
namespace {

#if defined(ERNIE45_AMX)
// Linux gives the tile registers only to processes that ask. Source: kernel documentation, x86/xstate.
bool may_use_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
}
#endif

bool has(Isa isa) {
    switch (isa) {
        case Isa::kBaseline: return true;
#if defined(__x86_64__)
        case Isa::kAvx2: {
            const CpuFeatures cpu = cpu_features();
            return cpu.avx2 && cpu.fma && cpu.f16c;
        }
        case Isa::kAvx512: {
            const CpuFeatures cpu = cpu_features();
            return has(Isa::kAvx2) && cpu.avx512f && cpu.avx512bw && cpu.avx512vl && cpu.avx512dq && cpu.avx512_vnni;
        }
#endif
#if defined(ERNIE45_AMX)
        case Isa::kAmx: {
            const CpuFeatures cpu = cpu_features();
            return has(Isa::kAvx512) && cpu.amx_tile && cpu.amx_int8 && may_use_tiles();
        }
#endif
        default: return false;
    }
}

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

}  // namespace

std::vector<Isa> compiled_isas() {
    std::vector<Isa> isas{Isa::kBaseline};
#if defined(__x86_64__)
    isas.insert(isas.end(), {Isa::kAvx2, Isa::kAvx512});
#if defined(ERNIE45_AMX)
    isas.push_back(Isa::kAmx);
#endif
#endif
    return isas;
}

Isa best_isa() {
    static const Isa best = [] {
        Isa found = Isa::kBaseline;
        for (const Isa isa : compiled_isas()) {
            if (has(isa)) found = isa;
        }
        return found;
    }();
    return best;
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
    if (!has(isa)) return false;
    chosen().store(isa, std::memory_order_relaxed);
    return true;
}

const BlockKernels& block_kernels() {
#if defined(__x86_64__)
    switch (current_isa()) {
#if defined(ERNIE45_AMX)
        case Isa::kAmx: return amx_blocks();
#endif
        case Isa::kAvx512: return avx512_blocks();
        case Isa::kAvx2: return avx2_blocks();
        default: break;
    }
#endif
    return baseline_blocks();
}

}  // namespace ernie45
