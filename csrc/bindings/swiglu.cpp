// Bindings of the activation: shapes and types are checked here, Python's lock is released, pointers are passed on. Messages begin
// with the operation, then what was expected, then what came.
#include "bindings/swiglu.hpp"

#include <nanobind/stl/optional.h>

#include <optional>
#include <string>

#include "bindings/array.hpp"
#include "kernels/swiglu.hpp"

namespace nb = nanobind;

namespace ernie45 {
namespace {

using Matrix = Array<const float, 2>;
using Output = Array<float, 2>;

template <typename A>
void check_rows(const char* operation, const char* name, const A& array, std::size_t rows, std::size_t columns) {
    if (array.shape(0) == rows && array.shape(1) == columns) return;
    const auto text = [](std::size_t a, std::size_t b) { return "(" + std::to_string(a) + ", " + std::to_string(b) + ")"; };
    throw nb::value_error((std::string("[") + operation + "] " + name + ": expected shape " + text(rows, columns) + ", got " +
                           text(array.shape(0), array.shape(1)))
                              .c_str());
}

template <typename T>
T* per_token(const char* name, const std::optional<Array<T, 1>>& array, std::size_t tokens) {
    if (!array) return nullptr;
    if (array->shape(0) == tokens) return array->data();
    throw nb::value_error((std::string("[swiglu_backward] ") + name + ": expected one for each of " + std::to_string(tokens) +
                           " tokens, got " + std::to_string(array->shape(0)))
                              .c_str());
}

void bound_swiglu(const Matrix& products, const Output& hidden) {
    const std::size_t tokens = hidden.shape(0), width = hidden.shape(1);
    check_rows("swiglu", "products", products, tokens, 2 * width);
    nb::gil_scoped_release unlocked;
    swiglu(products.data(), tokens, width, hidden.data());
}

void bound_swiglu_backward(const Matrix& products, const Output& gradient, const Output& d_products,
                           const std::optional<Array<const float, 1>>& weights, const std::optional<Array<float, 1>>& dots) {
    const std::size_t tokens = gradient.shape(0), width = gradient.shape(1);
    check_rows("swiglu_backward", "products", products, tokens, 2 * width);
    check_rows("swiglu_backward", "d_products", d_products, tokens, 2 * width);
    const SwigluGradient arrays{products.data(), gradient.data(), d_products.data(), per_token("weights", weights, tokens),
                                per_token("dots", dots, tokens)};
    nb::gil_scoped_release unlocked;
    swiglu_backward(arrays, tokens, width);
}

}  // namespace

void bind_swiglu(nb::module_& m) {
    m.def("swiglu", &bound_swiglu, nb::arg("products"), nb::arg("hidden"), nb::sig("def swiglu(products: Tensor, hidden: Tensor) -> None"),
          "hidden (T, I) = silu(gate) * up of products (T, 2 I), gate first; float32.");
    m.def("swiglu_backward", &bound_swiglu_backward, nb::arg("products"), nb::arg("gradient"), nb::arg("d_products"),
          nb::arg("weights") = nb::none(), nb::arg("dots") = nb::none(),
          nb::sig("def swiglu_backward(products: Tensor, gradient: Tensor, d_products: Tensor, weights: Tensor | None = None, "
                  "dots: Tensor | None = None) -> None"),
          "d_products (T, 2 I) from products and the gradient of hidden (T, I) times weights (T); the gradient becomes hidden times "
          "weights, dots (T) hidden . gradient.");
}

}  // namespace ernie45
