// Bindings of attention, norm and router.
#pragma once

#include <nanobind/nanobind.h>

namespace ernie45 {

void bind_attention(nanobind::module_& m);

}  // namespace ernie45
