// Bindings of the packed-matrix kernels: shapes and types are checked here, Python's lock is released, pointers are passed on.
// Messages begin with the operation, then what was expected, then what came.
#include "bindings/packed.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "bindings/array.hpp"
#include "kernels/isa.hpp"
#include "kernels/packed_ops.hpp"
#include "kernels/thread_pool.hpp"

namespace nb = nanobind;

namespace ernie45 {
namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using Halves = nb::ndarray<const std::uint16_t, nb::ndim<1>, nb::device::cpu, nb::c_contig>;
using Matrix = Array<const float, 2>;
using Output = Array<float, 2>;
using Vector = Array<const float, 1>;
using Ids = Array<const std::int64_t, 1>;
using Tokens = Array<const std::int32_t, 1>;
using Counts = Array<const std::int64_t, 1>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

std::string shape(std::size_t rows, std::size_t columns) {
    return "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

// A packed matrix and the arrays that it points into.
struct PackedMatrix {
    Packed view;
    Bytes weights;
    Halves scales;

    PackedMatrix(Bytes weight_bytes, Halves scale_values, std::size_t rows, std::size_t columns, int bits, std::size_t group,
                 int activation_bits)
        : weights(std::move(weight_bytes)), scales(std::move(scale_values)) {
        if (bits != 4 && bits != 8) refuse("[PackedMatrix] expected 4 or 8 bits, got " + std::to_string(bits));
        if (activation_bits != 8 && activation_bits != 16) {
            refuse("[PackedMatrix] expected activations of 8 or 16 bits, got " + std::to_string(activation_bits));
        }
        view.minima = bits == 4 && group == kHalf;
        if (rows == 0 || columns == 0 || group == 0 || (group % kGroup != 0 && !view.minima)) {
            refuse("[PackedMatrix] expected rows and columns and a group that is a multiple of 64, or 32 with 4 bits, got " +
                   shape(rows, columns) + " with group " + std::to_string(group));
        }
        view.rows = rows;
        view.columns = columns;
        view.bits = bits;
        view.wide = activation_bits == 16;
        view.groups_per_scale = view.minima ? 1 : group / kGroup;
        view.weights = weights.data();
        view.scales = scales.data();
        const std::size_t bytes = view.blocks() * view.groups() * view.group_bytes();
        const std::size_t halves = view.blocks() * view.scale_sets() * view.set_size();
        if (weights.shape(0) != bytes || scales.shape(0) != halves) {
            refuse("[PackedMatrix] " + shape(rows, columns) + " in " + std::to_string(bits) + " bits, group " +
                   std::to_string(group) + ": expected " + std::to_string(bytes) + " bytes and " + std::to_string(halves) +
                   " scales, got " + std::to_string(weights.shape(0)) + " and " + std::to_string(scales.shape(0)));
        }
    }
};

void check(const char* operation, const char* name, std::size_t rows, std::size_t columns, std::size_t got_rows,
           std::size_t got_columns) {
    if (rows == got_rows && columns == got_columns) return;
    refuse(std::string("[") + operation + "] " + name + ": expected shape " + shape(rows, columns) + ", got " +
           shape(got_rows, got_columns));
}

void linear(const PackedMatrix& matrix, const Matrix& x, const Output& y, const std::optional<Vector>& bias,
            const std::optional<Matrix>& residual) {
    const std::size_t tokens = x.shape(0), rows = matrix.view.rows;
    check("linear", "x", tokens, matrix.view.columns, tokens, x.shape(1));
    check("linear", "y", tokens, rows, y.shape(0), y.shape(1));
    if (bias) check("linear", "bias", 1, rows, 1, bias->shape(0));
    if (residual) check("linear", "residual", tokens, rows, residual->shape(0), residual->shape(1));
    const float* bias_values = bias ? bias->data() : nullptr;
    const float* residual_values = residual ? residual->data() : nullptr;
    nb::gil_scoped_release unlocked;
    packed_linear(x.data(), tokens, matrix.view, bias_values, residual_values, y.data());
}

void top(const PackedMatrix& matrix, const Matrix& x, const Output& values, const Array<std::int64_t, 2>& ids,
         const std::optional<Vector>& bias) {
    const std::size_t tokens = x.shape(0), rows = matrix.view.rows, count = values.shape(1);
    check("top", "x", tokens, matrix.view.columns, tokens, x.shape(1));
    check("top", "values", tokens, count, values.shape(0), count);
    check("top", "ids", tokens, count, ids.shape(0), ids.shape(1));
    if (bias) check("top", "bias", 1, rows, 1, bias->shape(0));
    if (count == 0 || count > rows) {
        refuse("[top] expected a count from 1 to " + std::to_string(rows) + ", got " + std::to_string(count));
    }
    const float* bias_values = bias ? bias->data() : nullptr;
    nb::gil_scoped_release unlocked;
    packed_top(x.data(), tokens, matrix.view, bias_values, count, values.data(), ids.data());
}

// A unit of the feed-forward operation; the matrices stay alive with it.
struct Ffn {
    nb::object gate_up, down;
    FfnUnit unit;

    Ffn(nb::object gate_up_object, nb::object down_object) : gate_up(gate_up_object), down(down_object) {
        const auto& first = nb::cast<const PackedMatrix&>(gate_up);
        const auto& second = nb::cast<const PackedMatrix&>(down);
        const std::size_t width = round_up(second.view.columns, kGroup);
        if (first.view.rows != 2 * width || first.view.columns != second.view.rows) {
            refuse("[Ffn] down " + shape(second.view.rows, second.view.columns) + ": expected gate and up " +
                   shape(2 * width, second.view.rows) + ", got " + shape(first.view.rows, first.view.columns));
        }
        unit.gate_up = first.view;
        unit.down = second.view;
    }
};

void check_tokens(const char* operation, const Tokens& tokens, std::size_t num_tokens) {
    for (std::size_t i = 0; i < tokens.shape(0); ++i) {
        const std::int32_t token = tokens.data()[i];
        if (token >= 0 && static_cast<std::size_t>(token) < num_tokens) continue;
        refuse(std::string("[") + operation + "] token " + std::to_string(token) + " is none of x");
    }
}

void ffn(const std::vector<const Ffn*>& units, const Matrix& x, const Output& y, const std::optional<Tokens>& tokens,
         const std::optional<Vector>& weights, const std::vector<std::int64_t>& counts, const std::optional<Matrix>& residual) {
    const std::size_t num_tokens = x.shape(0), hidden = x.shape(1);
    check("ffn", "y", num_tokens, hidden, y.shape(0), y.shape(1));
    if (residual) check("ffn", "residual", num_tokens, hidden, residual->shape(0), residual->shape(1));
    if (counts.size() != units.size()) {
        refuse("[ffn] expected a count for each of " + std::to_string(units.size()) + " units, got " + std::to_string(counts.size()));
    }
    std::vector<FfnUnit> prepared;
    std::size_t routed = 0;
    for (std::size_t u = 0; u < units.size(); ++u) {
        FfnUnit unit = units[u]->unit;
        check("ffn", "unit", hidden, unit.down.columns, unit.down.rows, unit.down.columns);
        if (counts[u] < 0) {  // all tokens, weight 1
            unit.count = num_tokens;
        } else {
            unit.count = static_cast<std::size_t>(counts[u]);
            if (!tokens || !weights || routed + unit.count > tokens->shape(0)) {
                refuse("[ffn] the counts add up to more than the tokens given");
            }
            unit.tokens = tokens->data() + routed;
            unit.weights = weights->data() + routed;
            routed += unit.count;
        }
        prepared.push_back(unit);
    }
    if (tokens.has_value() != weights.has_value()) refuse("[ffn] expected tokens and weights together");
    if (tokens && (tokens->shape(0) != routed || weights->shape(0) != routed)) {
        refuse("[ffn] expected " + std::to_string(routed) + " tokens and weights, got " + std::to_string(tokens->shape(0)) + " and " +
               std::to_string(weights->shape(0)));
    }
    if (tokens) check_tokens("ffn", *tokens, num_tokens);
    const float* residual_values = residual ? residual->data() : nullptr;
    nb::gil_scoped_release unlocked;
    packed_ffn(x.data(), num_tokens, hidden, prepared.data(), prepared.size(), residual_values, y.data());
}

// The routed experts of a layer and what serves every token; the units stay alive with it.
struct FfnPool {
    std::vector<nb::object> objects;
    nb::object shared_object;
    std::vector<FfnUnit> units;
    std::optional<FfnUnit> shared;

    FfnPool(std::vector<nb::object> unit_objects, std::optional<nb::object> shared_unit) : objects(std::move(unit_objects)) {
        for (const nb::object& object : objects) units.push_back(nb::cast<const Ffn&>(object).unit);
        if (!shared_unit) return;
        shared_object = *shared_unit;
        shared = nb::cast<const Ffn&>(shared_object).unit;
    }

    void run(const Matrix& x, const Output& y, const Counts& counts, const Tokens& tokens, const Vector& weights,
             const std::optional<Matrix>& residual) const {
        const std::size_t num_tokens = x.shape(0), hidden = x.shape(1), routed = tokens.shape(0);
        check("ffn_pool", "y", num_tokens, hidden, y.shape(0), y.shape(1));
        if (residual) check("ffn_pool", "residual", num_tokens, hidden, residual->shape(0), residual->shape(1));
        check("ffn_pool", "counts", 1, units.size(), 1, counts.shape(0));
        check("ffn_pool", "weights", 1, routed, 1, weights.shape(0));
        std::vector<FfnUnit> prepared;
        if (shared) {
            prepared.push_back(*shared);
            prepared.back().count = num_tokens;
        }
        std::size_t used = 0;
        for (std::size_t u = 0; u < units.size(); ++u) {
            const std::int64_t count = counts.data()[u];
            if (count == 0) continue;
            if (count < 0 || static_cast<std::size_t>(count) > routed - used) {
                refuse("[ffn_pool] expected counts that add up to " + std::to_string(routed) + " tokens, got " + std::to_string(count) +
                       " for expert " + std::to_string(u));
            }
            FfnUnit unit = units[u];
            unit.count = static_cast<std::size_t>(count);
            unit.tokens = tokens.data() + used;
            unit.weights = weights.data() + used;
            used += unit.count;
            prepared.push_back(unit);
        }
        if (used != routed) {
            refuse("[ffn_pool] expected counts that add up to " + std::to_string(routed) + " tokens, got " + std::to_string(used));
        }
        for (const FfnUnit& unit : prepared) check("ffn_pool", "unit", hidden, unit.down.columns, unit.down.rows, unit.down.columns);
        check_tokens("ffn_pool", tokens, num_tokens);
        const float* residual_values = residual ? residual->data() : nullptr;
        nb::gil_scoped_release unlocked;
        packed_ffn(x.data(), num_tokens, hidden, prepared.data(), prepared.size(), residual_values, y.data());
    }
};

void rows(const PackedMatrix& matrix, const Ids& ids, const Output& y) {
    check("rows", "y", ids.shape(0), matrix.view.columns, y.shape(0), y.shape(1));
    for (std::size_t i = 0; i < ids.shape(0); ++i) {
        const std::int64_t id = ids.data()[i];
        if (id < 0 || static_cast<std::size_t>(id) >= matrix.view.rows) {
            refuse("[rows] expected ids from 0 to " + std::to_string(matrix.view.rows - 1) + ", got " + std::to_string(id));
        }
    }
    nb::gil_scoped_release unlocked;
    for (std::size_t i = 0; i < ids.shape(0); ++i) {
        packed_row(matrix.view, static_cast<std::size_t>(ids.data()[i]), y.data() + i * matrix.view.columns);
    }
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAmx: return "amx";
        case Isa::kAvx512: return "avx512";
        case Isa::kAvx2: return "avx2";
        default: return "baseline";
    }
}

void choose_isa(const std::string& name) {
    for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
        if (name != isa_name(isa)) continue;
        if (!set_isa(isa)) refuse("[set_isa] this CPU does not support " + name + "; the best it has is " + isa_name(best_isa()));
        return;
    }
    refuse("[set_isa] expected baseline, avx2, avx512 or amx, got " + name);
}

void choose_threads(int count) {
    if (count < 1 || count > 1024) refuse("[set_num_threads] expected 1 to 1024, got " + std::to_string(count));
    nb::gil_scoped_release unlocked;
    set_num_threads(count);
}

}  // namespace

void bind_packed(nb::module_& m) {
    nb::class_<PackedMatrix>(m, "PackedMatrix", "A matrix of 8- or 4-bit weights in kernel layout; keeps its arrays alive.")
        .def(nb::init<Bytes, Halves, std::size_t, std::size_t, int, std::size_t, int>(), nb::arg("weights"), nb::arg("scales"),
             nb::arg("rows"), nb::arg("columns"), nb::arg("bits"), nb::arg("group"), nb::arg("activation_bits"),
             nb::sig("def __init__(self, weights: Tensor, scales: Tensor, rows: int, columns: int, bits: int, group: int, "
                     "activation_bits: int) -> None"))
        .def("linear", &linear, nb::arg("x"), nb::arg("y"), nb::arg("bias") = nb::none(), nb::arg("residual") = nb::none(),
             nb::sig("def linear(self, x: Tensor, y: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> None"),
             "y (T, rows) = x (T, columns) W^T + bias + residual, float32.")
        .def("top", &top, nb::arg("x"), nb::arg("values"), nb::arg("ids"), nb::arg("bias") = nb::none(),
             nb::sig("def top(self, x: Tensor, values: Tensor, ids: Tensor, bias: Tensor | None = None) -> None"),
             "The largest values of each row of x W^T + bias (T, k) and their columns, int64, largest first.")
        .def("rows", &rows, nb::arg("ids"), nb::arg("y"), nb::sig("def rows(self, ids: Tensor, y: Tensor) -> None"),
             "y (T, columns) = the rows `ids`, float32.");
    nb::class_<Ffn>(m, "Ffn", "Gate, up and down of one SwiGLU in kernel layout.")
        .def(nb::init<nb::object, nb::object>(), nb::arg("gate_up"), nb::arg("down"),
             nb::sig("def __init__(self, gate_up: PackedMatrix, down: PackedMatrix) -> None"));
    nb::class_<FfnPool>(m, "FfnPool", "The routed experts of a layer, and a unit that serves every token.")
        .def(nb::init<std::vector<nb::object>, std::optional<nb::object>>(), nb::arg("units"), nb::arg("shared").none(),
             nb::sig("def __init__(self, units: Sequence[Ffn], shared: Ffn | None) -> None"))
        .def("run", &FfnPool::run, nb::arg("x"), nb::arg("y"), nb::arg("counts"), nb::arg("tokens"), nb::arg("weights"),
             nb::arg("residual").none(),
             nb::sig("def run(self, x: Tensor, y: Tensor, counts: Tensor, tokens: Tensor, weights: Tensor, "
                     "residual: Tensor | None) -> None"),
             "y = residual + shared unit + weighted sum of the experts; counts, tokens and weights as route orders them.");
    m.def("ffn", &ffn, nb::arg("units"), nb::arg("x"), nb::arg("y"), nb::arg("tokens").none(), nb::arg("weights").none(),
          nb::arg("counts"), nb::arg("residual") = nb::none(),
          nb::sig("def ffn(units: Sequence[Ffn], x: Tensor, y: Tensor, tokens: Tensor | None, weights: Tensor | None, "
                  "counts: Sequence[int], residual: Tensor | None = None) -> None"),
          "y = residual + weighted sum of units; counts[u] tokens each, or -1 for all tokens with weight 1.");
    m.def("isa", [] { return isa_name(current_isa()); }, nb::sig("def isa() -> str"), "The instruction set in use.");
    m.def("compiled_isas", [] {
        std::vector<std::string> names;
        for (const Isa isa : compiled_isas()) names.emplace_back(isa_name(isa));
        return names;
    }, nb::sig("def compiled_isas() -> list[str]"), "The instruction sets that this build holds, worst first.");
    m.def("best_isa", [] { return isa_name(best_isa()); }, nb::sig("def best_isa() -> str"), "The best that this CPU supports.");
    m.def("set_isa", &choose_isa, nb::arg("name"), nb::sig("def set_isa(name: str) -> None"),
          "Use baseline, avx2, avx512 or amx from now on.");
    m.def("num_threads", &num_threads, nb::call_guard<nb::gil_scoped_release>(), nb::sig("def num_threads() -> int"),
          "Threads that take part in a kernel.");
    m.def("set_num_threads", &choose_threads, nb::arg("count"), nb::sig("def set_num_threads(count: int) -> None"),
          "Set that number; waits for a running kernel.");
    nb::module_::import_("atexit").attr("register")(nb::cpp_function([] {
        nb::gil_scoped_release unlocked;
        stop_threads();
    }));
}

}  // namespace ernie45
