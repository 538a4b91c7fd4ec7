// Bindings of attention, rotary embedding with append, norm and router: shapes and types are checked here, Python's lock is released,
// pointers are passed on. Messages begin with the operation, then what was expected, then what came.
#include "bindings/attention.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <optional>
#include <string>

#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/router.hpp"

namespace nb = nanobind;

namespace ernie45 {
namespace {

using Any = nb::ndarray<nb::device::cpu>;
template <typename T, int Dims>
using Array = nb::ndarray<T, nb::ndim<Dims>, nb::device::cpu, nb::c_contig>;

[[noreturn]] void refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

template <typename A>
std::string shape(const A& array) {
    std::string text = "(";
    for (std::size_t i = 0; i < array.ndim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(array.shape(i));
    return text + ")";
}

template <typename A>
void check(const char* operation, const char* name, const A& array, std::initializer_list<std::size_t> expected) {
    bool same = array.ndim() == expected.size();
    std::string text;
    std::size_t i = 0;
    for (const std::size_t size : expected) {
        same = same && array.shape(i) == size;
        text += (i++ == 0 ? "" : ", ") + std::to_string(size);
    }
    if (!same) refuse(std::string("[") + operation + "] " + name + ": expected shape (" + text + "), got " + shape(array));
}

// Keys and values of one layer, and the arrays that it points into.
struct BoundStore {
    KvStore view;
    Any keys, values;
    std::optional<Any> key_scales, value_scales;

    BoundStore(Any key_array, Any value_array, std::optional<Any> key_scale_array, std::optional<Any> value_scale_array)
        : keys(std::move(key_array)), values(std::move(value_array)), key_scales(std::move(key_scale_array)),
          value_scales(std::move(value_scale_array)) {
        if (keys.ndim() != 4) refuse("[KvStore] keys: expected shape (pages, heads, slots, dim), got " + shape(keys));
        view.pages = keys.shape(0);
        view.heads = keys.shape(1);
        view.slots = keys.shape(2);
        view.head_dim = keys.shape(3);
        if (view.heads == 0 || view.slots == 0 || view.head_dim == 0 || view.head_dim % 16 != 0 || view.head_dim > kMaxHeadDim) {
            refuse("[KvStore] expected heads, slots and a head size that is a multiple of 16 up to " + std::to_string(kMaxHeadDim) +
                   ", got keys " + shape(keys));
        }
        check("KvStore", "values", values, {view.pages, view.heads, view.slots, view.head_dim});
        if (keys.dtype() == nb::dtype<float>()) {
            view.type = KvType::kFloat32;
        } else if (keys.dtype() == nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1}) {
            view.type = KvType::kBfloat16;
        } else if (keys.dtype() == nb::dtype<std::int8_t>()) {
            view.type = KvType::kInt8;
        } else {
            refuse("[KvStore] keys: expected float32, bfloat16 or int8");
        }
        if (values.dtype() != keys.dtype()) refuse("[KvStore] values: expected the keys' dtype");
        set("keys", keys, key_scales, view.keys);
        set("values", values, value_scales, view.values);
    }

    void set(const char* name, const Any& array, const std::optional<Any>& scales, KvHalf& half) const {
        if (array.stride(3) != 1 || array.stride(2) != static_cast<std::int64_t>(view.head_dim)) {
            refuse(std::string("[KvStore] ") + name + ": expected slots of a head one behind the other (strides " +
                   std::to_string(view.head_dim) + ", 1), got strides " + std::to_string(array.stride(2)) + ", " +
                   std::to_string(array.stride(3)));
        }
        half.base = array.data();
        half.page_stride = array.stride(0);
        half.head_stride = array.stride(1);
        if (scales.has_value() != (view.type == KvType::kInt8)) {
            refuse(std::string("[KvStore] ") + name + ": expected scales with int8 and only with it");
        }
        if (!scales) return;
        check("KvStore", "scales", *scales, {view.pages, view.heads, view.slots});
        if (scales->dtype() != nb::dtype<float>() || scales->stride(2) != 1) {
            refuse(std::string("[KvStore] scales of ") + name + ": expected float32 with slots one behind the other");
        }
        half.scales = static_cast<float*>(scales->data());
        half.scale_page_stride = scales->stride(0);
        half.scale_head_stride = scales->stride(1);
    }
};

// The sequences of a step, checked once for all layers, and the arrays that it points into.
struct BoundSequences {
    Sequences view;
    Array<const std::int32_t, 1> fresh, lengths;
    Array<const std::int32_t, 2> pages;
    std::size_t num_tokens = 0;

    BoundSequences(Array<const std::int32_t, 1> fresh_array, Array<const std::int32_t, 1> length_array,
                   Array<const std::int32_t, 2> page_array)
        : fresh(std::move(fresh_array)), lengths(std::move(length_array)), pages(std::move(page_array)) {
        view.count = fresh.shape(0);
        check("Sequences", "lengths", lengths, {view.count});
        if (pages.shape(0) != view.count) check("Sequences", "pages", pages, {view.count, pages.shape(1)});
        view.fresh = fresh.data();
        view.lengths = lengths.data();
        view.pages = pages.data();
        view.pages_per_sequence = pages.shape(1);
        for (std::size_t i = 0; i < view.count; ++i) {
            if (view.fresh[i] < 0 || view.fresh[i] > view.lengths[i]) {
                refuse("[Sequences] sequence " + std::to_string(i) + ": expected new tokens between 0 and its length " +
                       std::to_string(view.lengths[i]) + ", got " + std::to_string(view.fresh[i]));
            }
            num_tokens += static_cast<std::size_t>(view.fresh[i]);
        }
    }

    // Every page that the sequences reach is one of the store. Entries behind a sequence's last page are not looked at.
    void check_pages(const char* operation, const KvStore& store) const {
        for (std::size_t i = 0; i < view.count; ++i) {
            const auto length = static_cast<std::size_t>(view.lengths[i]);
            const std::size_t needed = (length + store.slots - 1) / store.slots;
            const std::string where = std::string("[") + operation + "] sequence " + std::to_string(i) + ": ";
            if (needed > view.pages_per_sequence) {
                refuse(where + "expected " + std::to_string(needed) + " pages for " + std::to_string(length) + " tokens, got " +
                       std::to_string(view.pages_per_sequence));
            }
            const std::int32_t* row = view.pages + i * view.pages_per_sequence;
            for (std::size_t page = 0; page < needed; ++page) {
                if (row[page] < 0 || static_cast<std::size_t>(row[page]) >= store.pages) {
                    refuse(where + "expected pages from 0 to " + std::to_string(store.pages - 1) + ", got " + std::to_string(row[page]));
                }
            }
        }
    }
};

void bound_attention(const Array<const float, 3>& q, const Array<float, 3>& out, const BoundStore& store, const BoundSequences& sequences,
                     float scale) {
    const std::size_t heads = q.shape(1);
    check("attention", "q", q, {sequences.num_tokens, heads, store.view.head_dim});
    check("attention", "out", out, {sequences.num_tokens, heads, store.view.head_dim});
    if (heads == 0 || heads % store.view.heads != 0) {
        refuse("[attention] expected query heads in equal groups over " + std::to_string(store.view.heads) + " key heads, got " +
               std::to_string(heads));
    }
    sequences.check_pages("attention", store.view);
    nb::gil_scoped_release unlocked;
    attention(q.data(), heads, store.view, sequences.view, scale, out.data());
}

void bound_rope_append(const Array<const float, 2>& qkv, const Any& rotation, const Array<float, 3>& q, const BoundStore& store,
                       const BoundSequences& sequences) {
    const std::size_t tokens = sequences.num_tokens, dim = store.view.head_dim, heads = q.shape(1);
    check("rope_append", "q", q, {tokens, heads, dim});
    check("rope_append", "qkv", qkv, {tokens, (heads + 2 * store.view.heads) * dim});
    check("rope_append", "rotation", rotation, {tokens, dim / 2});
    const bool packed = tokens == 0 || (rotation.stride(1) == 1 && rotation.stride(0) == static_cast<std::int64_t>(dim / 2));
    if (rotation.dtype() != nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Complex), 64, 1} || !packed) {
        refuse("[rope_append] rotation: expected contiguous complex64");
    }
    sequences.check_pages("rope_append", store.view);
    nb::gil_scoped_release unlocked;
    rope_append(qkv.data(), heads, static_cast<const float*>(rotation.data()), store.view, sequences.view, q.data());
}

void bound_rms_norm(const Array<const float, 2>& x, const Array<const float, 1>& weight, float eps, const Array<float, 2>& y,
                    const std::optional<Array<const float, 2>>& residual, const std::optional<Array<float, 2>>& sum) {
    const std::size_t tokens = x.shape(0), width = x.shape(1);
    check("rms_norm", "weight", weight, {width});
    check("rms_norm", "y", y, {tokens, width});
    if (residual.has_value() != sum.has_value()) refuse("[rms_norm] expected residual and sum together");
    if (residual) {
        check("rms_norm", "residual", *residual, {tokens, width});
        check("rms_norm", "sum", *sum, {tokens, width});
    }
    const float* residual_values = residual ? residual->data() : nullptr;
    float* sum_values = sum ? sum->data() : nullptr;
    nb::gil_scoped_release unlocked;
    rms_norm(x.data(), tokens, width, weight.data(), eps, residual_values, sum_values, y.data());
}

void bound_route(const Array<const float, 2>& x, const Array<const float, 2>& gate, const std::optional<Array<const float, 1>>& bias,
                 float norm_min, const Array<float, 2>& weights, const Array<std::int32_t, 2>& ids, const Array<std::int64_t, 1>& counts,
                 const Array<std::int32_t, 1>& tokens, const Array<float, 1>& token_weights) {
    Router router;
    router.gate = gate.data();
    router.bias = bias ? bias->data() : nullptr;
    router.experts = gate.shape(0);
    router.hidden = x.shape(1);
    router.active = weights.shape(1);
    router.norm_min = norm_min;
    const std::size_t num_tokens = x.shape(0);
    check("route", "gate", gate, {router.experts, router.hidden});
    if (bias) check("route", "bias", *bias, {router.experts});
    if (router.active == 0 || router.active > router.experts) {
        refuse("[route] expected 1 to " + std::to_string(router.experts) + " experts per token, got " + std::to_string(router.active));
    }
    check("route", "weights", weights, {num_tokens, router.active});
    check("route", "ids", ids, {num_tokens, router.active});
    check("route", "counts", counts, {router.experts});
    check("route", "tokens", tokens, {num_tokens * router.active});
    check("route", "token_weights", token_weights, {num_tokens * router.active});
    const Routing routing{weights.data(), ids.data(), counts.data(), tokens.data(), token_weights.data()};
    nb::gil_scoped_release unlocked;
    route(x.data(), num_tokens, router, routing);
}

}  // namespace

void bind_attention(nb::module_& m) {
    nb::class_<BoundStore>(m, "KvStore", "Keys and values of one layer in pages; keeps its arrays alive.")
        .def(nb::init<Any, Any, std::optional<Any>, std::optional<Any>>(), nb::arg("keys"), nb::arg("values"),
             nb::arg("key_scales") = nb::none(), nb::arg("value_scales") = nb::none(),
             nb::sig("def __init__(self, keys: Tensor, values: Tensor, key_scales: Tensor | None = None, "
                     "value_scales: Tensor | None = None) -> None"));
    nb::class_<BoundSequences>(m, "Sequences", "New tokens, lengths and pages of a step's sequences; keeps its arrays alive.")
        .def(nb::init<Array<const std::int32_t, 1>, Array<const std::int32_t, 1>, Array<const std::int32_t, 2>>(), nb::arg("fresh"),
             nb::arg("lengths"), nb::arg("pages"),
             nb::sig("def __init__(self, fresh: Tensor, lengths: Tensor, pages: Tensor) -> None"));
    m.def("attention", &bound_attention, nb::arg("q"), nb::arg("out"), nb::arg("store"), nb::arg("sequences"), nb::arg("scale"),
          nb::sig("def attention(q: Tensor, out: Tensor, store: KvStore, sequences: Sequences, scale: float) -> None"),
          "out (T, N, D) = causal attention of q (T, N, D) over the store, float32.");
    m.def("rope_append", &bound_rope_append, nb::arg("qkv"), nb::arg("rotation"), nb::arg("q"), nb::arg("store"), nb::arg("sequences"),
          nb::sig("def rope_append(qkv: Tensor, rotation: Tensor, q: Tensor, store: KvStore, sequences: Sequences) -> None"),
          "q (T, N, D) = rotated queries of qkv (T, (N + 2 G) D); rotated keys and the values go into the store.");
    m.def("rms_norm", &bound_rms_norm, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("y"), nb::arg("residual") = nb::none(),
          nb::arg("sum") = nb::none(),
          nb::sig("def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor, residual: Tensor | None = None, "
                  "sum: Tensor | None = None) -> None"),
          "sum = x + residual; y = sum / rms(sum) * weight, all (T, H) float32.");
    m.def("route", &bound_route, nb::arg("x"), nb::arg("gate"), nb::arg("bias").none(), nb::arg("norm_min"), nb::arg("weights"),
          nb::arg("ids"), nb::arg("counts"), nb::arg("tokens"), nb::arg("token_weights"),
          nb::sig("def route(x: Tensor, gate: Tensor, bias: Tensor | None, norm_min: float, weights: Tensor, ids: Tensor, "
                  "counts: Tensor, tokens: Tensor, token_weights: Tensor) -> None"),
          "Experts of every token: weights, ids (T, K); counts (E), tokens and token_weights (T K) ordered by expert.");
}

}  // namespace ernie45
