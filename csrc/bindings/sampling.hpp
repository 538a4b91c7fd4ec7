// Bindings of the draw, the log-probability and the random number.
#pragma once

#include <nanobind/nanobind.h>

namespace ernie45 {

void bind_sampling(nanobind::module_& m);

}  // namespace ernie45
