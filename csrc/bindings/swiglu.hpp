// Bindings of the activation and its backward pass.
#pragma once

#include <nanobind/nanobind.h>

namespace ernie45 {

void bind_swiglu(nanobind::module_& m);

}  // namespace ernie45
