// Bindings of the sampler's kernels: what they are given is checked here. Python's lock is kept: they take some ten microseconds, and who
// gives it away may wait for milliseconds until another thread returns it.
#include "bindings/sampling.hpp"

#include <cmath>
#include <string>

#include "bindings/array.hpp"
#include "kernels/sampling.hpp"

namespace nb = nanobind;

namespace ernie45 {
namespace {

using Logits = Array<const float, 1>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

std::int64_t bound_draw(const Logits& logits, double temperature, std::uint64_t seed, std::uint64_t step, double top_p) {
    if (logits.shape(0) == 0) refuse("[draw] expected at least one logit, got none");
    if (!(temperature >= kLeastTemperature) || std::isinf(temperature)) {
        refuse("[draw] expected a finite temperature from 1e-6, got " + std::to_string(temperature));
    }
    if (!(top_p > 0) || top_p > 1) refuse("[draw] expected top_p above 0, up to 1, got " + std::to_string(top_p));
    return draw(logits.data(), logits.shape(0), temperature, top_p, seed, step);
}

double bound_logprob(const Logits& logits, std::size_t token) {
    if (token >= logits.shape(0)) {
        refuse("[logprob] expected a token below " + std::to_string(logits.shape(0)) + ", the number of logits, got " +
               std::to_string(token));
    }
    return logprob(logits.data(), logits.shape(0), token);
}

}  // namespace

void bind_sampling(nb::module_& m) {
    m.def("draw", &bound_draw, nb::arg("logits"), nb::arg("temperature"), nb::arg("seed"), nb::arg("step"),
          nb::arg("top_p") = 1.0, nb::sig("def draw(logits: Tensor, temperature: float, seed: int, step: int, top_p: float = 1.0) -> int"),
          "The id drawn from the top_p of logits (V), float32, at uniform(seed, step); -1: all are -inf, -2: some are NaN or inf.");
    m.def("logprob", &bound_logprob, nb::arg("logits"), nb::arg("token"), nb::sig("def logprob(logits: Tensor, token: int) -> float"),
          "Log-probability of a token under logits (V), float32.");
    m.def("uniform", &uniform, nb::arg("seed"), nb::arg("step"), nb::sig("def uniform(seed: int, step: int) -> float"),
          "A number in [0, 1) from Philox with the seed as key and the step as counter.");
}

}  // namespace ernie45
