// CPU detection. x86: CPUID says what the chip has, XGETBV (register XCR0) which register files the operating system saves.
// Source: Intel SDM volume 2A, CPUID, and volume 1, chapter 13 (XSAVE-managed state); the AMD manuals agree on these bits.
// AArch64: the hardware-capability words that Linux hands to every process.
#include "kernels/cpu_features.hpp"

#if defined(__x86_64__) || defined(__i386__)
#define ERNIE45_X86 1
#include <cpuid.h>

#include <cstdint>
#include <cstring>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__linux__)
#include <fstream>
#include <set>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace ernie45 {
namespace {

#if defined(ERNIE45_X86)

struct Registers {
    std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero when the CPU does not know the leaf.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

bool bit(std::uint32_t word, int position) { return ((word >> position) & 1U) != 0; }

// XCR0. Written as assembly because the intrinsic would need -mxsave for this file. Only valid when OSXSAVE is set.
std::uint32_t saved_state_components() {
    std::uint32_t low = 0;
    std::uint32_t high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

CpuFeatures detect() {
    // XCR0 bits: 1 XMM, 2 upper YMM, 5 mask registers, 6 upper ZMM 0-15, 7 ZMM 16-31, 17 tile configuration, 18 tile data.
    constexpr std::uint32_t kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;

    const Registers leaf1 = cpuid(1, 0);
    const Registers leaf7 = cpuid(7, 0);
    const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};
    const bool os_uses_xsave = bit(leaf1.ecx, 27);
    const std::uint32_t saved = os_uses_xsave ? saved_state_components() : 0;
    const bool ymm = (saved & kYmm) == kYmm;
    const bool zmm = (saved & kZmm) == kZmm;
    const bool tiles = (saved & kTiles) == kTiles;

    CpuFeatures f;
    f.sse4_2 = bit(leaf1.ecx, 20);
    f.avx = ymm && bit(leaf1.ecx, 28);
    f.fma = ymm && bit(leaf1.ecx, 12);
    f.f16c = ymm && bit(leaf1.ecx, 29);
    f.avx2 = ymm && bit(leaf7.ebx, 5);
    f.avx_vnni = ymm && bit(leaf7_1.eax, 4);
    f.avx512f = zmm && bit(leaf7.ebx, 16);
    f.avx512dq = zmm && bit(leaf7.ebx, 17);
    f.avx512bw = zmm && bit(leaf7.ebx, 30);
    f.avx512vl = zmm && bit(leaf7.ebx, 31);
    f.avx512_vnni = zmm && bit(leaf7.ecx, 11);
    f.avx512_bf16 = zmm && bit(leaf7_1.eax, 5);
    f.avx512_fp16 = zmm && bit(leaf7.edx, 23);
    f.amx_bf16 = tiles && bit(leaf7.edx, 22);
    f.amx_tile = tiles && bit(leaf7.edx, 24);
    f.amx_int8 = tiles && bit(leaf7.edx, 25);
    return f;
}

// Leaves 0x80000002 to 0x80000004 hold 48 characters, padded with NUL and sometimes led by spaces.
std::string model_name() {
    char text[49] = {};
    for (std::uint32_t i = 0; i < 3; ++i) {
        const Registers r = cpuid(0x80000002U + i, 0);
        const std::uint32_t words[4] = {r.eax, r.ebx, r.ecx, r.edx};
        std::memcpy(text + 16 * i, words, sizeof words);
    }
    const std::string name(text);
    const std::size_t first = name.find_first_not_of(' ');
    if (first == std::string::npos) return {};
    return name.substr(first, name.find_last_not_of(' ') - first + 1);
}

// One entry per cache in the same form: leaf 0x8000001D of AMD (announced by TOPOEXT), leaf 4 of the others. Not sysconf: its L3
// on AMD is the whole socket's in older C libraries.
void read_caches(CpuInfo& info) {
    const bool amd_leaf = bit(cpuid(0x80000001U, 0).ecx, 22);
    for (std::uint32_t i = 0; i < 16; ++i) {
        const Registers r = cpuid(amd_leaf ? 0x8000001DU : 4U, i);
        const std::uint32_t type = r.eax & 31U;  // 0 ends the list, 1 data, 2 instructions, 3 both
        if (type == 0) break;
        if (type == 2) continue;
        const std::size_t line = (r.ebx & 0xFFFU) + 1;
        const std::size_t partitions = ((r.ebx >> 12) & 0x3FFU) + 1;
        const std::size_t ways = (r.ebx >> 22) + 1;
        const std::size_t size = line * partitions * ways * (std::size_t{r.ecx} + 1);
        switch ((r.eax >> 5) & 7U) {
            case 1: info.l1d_bytes = size; info.cache_line_bytes = line; break;
            case 2: info.l2_bytes = size; break;
            case 3: info.l3_bytes = size; break;
            default: break;
        }
    }
}

#elif defined(__aarch64__)

CpuFeatures detect() {
    CpuFeatures f;
    f.neon = true;  // part of the base architecture
#if defined(__linux__)
    // Linux, Documentation/arch/arm64/elf_hwcaps.rst: HWCAP_ASIMDDP is bit 20, HWCAP2_I8MM bit 13.
    f.dotprod = ((getauxval(AT_HWCAP) >> 20) & 1UL) != 0;
    f.i8mm = ((getauxval(AT_HWCAP2) >> 13) & 1UL) != 0;
#endif
    return f;
}

std::string model_name() { return {}; }

#else

CpuFeatures detect() { return {}; }

std::string model_name() { return {}; }

#endif

const char* architecture() {
#if defined(__x86_64__)
    return "x86_64";
#elif defined(__i386__)
    return "i386";
#elif defined(__aarch64__)
    return "aarch64";
#else
    return "unknown";
#endif
}

#if defined(__unix__) || defined(__APPLE__)
// sysconf answers -1 for what it does not know.
template <typename T>
T system_value(int name) {
    const long value = sysconf(name);
    return value > 0 ? static_cast<T>(value) : T{0};
}
#endif

#if defined(__linux__)
int topology_id(int cpu, const char* name) {
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/" + name);
    int id = -1;
    return file >> id ? id : -1;
}

// Distinct (package, core) pairs; hardware threads of one core share both.
int count_physical_cores() {
    std::set<std::pair<int, int>> cores;
    const int configured = system_value<int>(_SC_NPROCESSORS_CONF);
    for (int cpu = 0; cpu < configured; ++cpu) {
        const int core = topology_id(cpu, "core_id");  // absent for a CPU that is offline
        if (core >= 0) cores.emplace(topology_id(cpu, "physical_package_id"), core);
    }
    return static_cast<int>(cores.size());
}
#endif

}  // namespace

const CpuFeatures& cpu_features() {
    static const CpuFeatures features = detect();
    return features;
}

std::vector<std::pair<const char*, bool>> feature_list(const CpuFeatures& f) {
    return {
        {"sse4_2", f.sse4_2},
        {"avx", f.avx},
        {"avx2", f.avx2},
        {"fma", f.fma},
        {"f16c", f.f16c},
        {"avx_vnni", f.avx_vnni},
        {"avx512f", f.avx512f},
        {"avx512bw", f.avx512bw},
        {"avx512vl", f.avx512vl},
        {"avx512dq", f.avx512dq},
        {"avx512_vnni", f.avx512_vnni},
        {"avx512_bf16", f.avx512_bf16},
        {"avx512_fp16", f.avx512_fp16},
        {"amx_tile", f.amx_tile},
        {"amx_int8", f.amx_int8},
        {"amx_bf16", f.amx_bf16},
        {"neon", f.neon},
        {"dotprod", f.dotprod},
        {"i8mm", f.i8mm},
    };
}

CpuInfo cpu_info() {
    CpuInfo info;
    info.architecture = architecture();
    info.model = model_name();
#if defined(__unix__) || defined(__APPLE__)
    info.logical_cores = system_value<int>(_SC_NPROCESSORS_ONLN);
#endif
#if defined(ERNIE45_X86)
    read_caches(info);
#elif defined(_SC_LEVEL1_DCACHE_SIZE)  // glibc
    info.l1d_bytes = system_value<std::size_t>(_SC_LEVEL1_DCACHE_SIZE);
    info.l2_bytes = system_value<std::size_t>(_SC_LEVEL2_CACHE_SIZE);
    info.l3_bytes = system_value<std::size_t>(_SC_LEVEL3_CACHE_SIZE);
    info.cache_line_bytes = system_value<std::size_t>(_SC_LEVEL1_DCACHE_LINESIZE);
#endif
#if defined(__linux__)
    info.physical_cores = count_physical_cores();
#endif
    return info;
}

}  // namespace ernie45
