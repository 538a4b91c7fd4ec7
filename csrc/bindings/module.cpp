// Python module ernie45.kernels._native: checks and converts, nothing else. The typed signatures are repeated for type checkers
// in ernie45/kernels/_native.pyi; tests/kernels/test_native.py holds the two together.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "bindings/attention.hpp"
#include "bindings/packed.hpp"
#include "bindings/sampling.hpp"
#include "bindings/swiglu.hpp"
#include "kernels/cpu_features.hpp"

namespace nb = nanobind;

namespace {

#if defined(Py_LIMITED_API)
constexpr const char* kAbi = "abi3";
#else
constexpr const char* kAbi = "cpython-" NB_TOSTRING(PY_MAJOR_VERSION) "." NB_TOSTRING(PY_MINOR_VERSION);
#endif

// 0 means unknown in C++; Python says None.
template <typename T>
nb::object known(T value) {
    return value == T{0} ? nb::none() : nb::object(nb::int_(value));
}

nb::dict cpu_features() {
    nb::dict result;
    for (const auto& [name, present] : ernie45::feature_list(ernie45::cpu_features())) result[name] = nb::bool_(present);
    return result;
}

nb::dict cpu_info() {
    const ernie45::CpuInfo info = ernie45::cpu_info();
    nb::dict result;
    result["architecture"] = info.architecture;
    result["model"] = info.model.empty() ? nb::none() : nb::object(nb::cast(info.model));
    result["logical_cores"] = known(info.logical_cores);
    result["physical_cores"] = known(info.physical_cores);
    result["l1d_bytes"] = known(info.l1d_bytes);
    result["l2_bytes"] = known(info.l2_bytes);
    result["l3_bytes"] = known(info.l3_bytes);
    result["cache_line_bytes"] = known(info.cache_line_bytes);
    return result;
}

nb::dict build_info() {
    nb::dict result;
    result["version"] = ERNIE45_VERSION;
    result["compiler"] = ERNIE45_COMPILER;
    result["flags"] = ERNIE45_FLAGS;
    result["build_type"] = ERNIE45_BUILD_TYPE;
    result["abi"] = kAbi;
    result["python"] = ERNIE45_PYTHON;
    result["nanobind"] = ERNIE45_NANOBIND;
    return result;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Compiled part of ernie45.kernels.";
    m.def("cpu_features", &cpu_features, nb::sig("def cpu_features() -> dict[str, bool]"),
          "Instruction-set extensions by their Linux name: true when both the CPU and the operating system support them.");
    m.def("cpu_info", &cpu_info, nb::sig("def cpu_info() -> dict[str, str | int | None]"),
          "Architecture, model, core counts, size of one cache of each level in bytes; None where the system does not tell.");
    m.def("build_info", &build_info, nb::sig("def build_info() -> dict[str, str]"),
          "How this module was compiled: package version, compiler, flags, build type, ABI, Python and nanobind versions.");
    ernie45::bind_packed(m);
    ernie45::bind_attention(m);
    ernie45::bind_sampling(m);
    ernie45::bind_swiglu(m);
}
