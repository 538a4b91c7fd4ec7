// Bindings of the packed-matrix kernels, the thread pool and the choice of instruction set.
#pragma once

#include <nanobind/nanobind.h>

namespace ernie45 {

void bind_packed(nanobind::module_& m);

}  // namespace ernie45
