// Bindings of attention, rotary embedding with append, norm and router: shapes and types are checked here, Python's lock is released,
// pointers are passed on. Messages begin with the operation, then what was expected, then what came.
#include "bindings/attention.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <complex>
#include <optional>
#include <string>
#include <vector>

#include "bindings/array.hpp"
#include "kernels/attention.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/router.hpp"

namespace nb = nanobind;

namespace ernie45 {
namespace {

using Any = nb::ndarray<nb::device::cpu>;

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

// The sequences of a step, checked once for all layers. The numbers are copied: nobody can change what was checked.
struct BoundSequences {
    Sequences view;
    std::vector<std::int32_t> fresh, lengths, pages;
    std::size_t num_tokens = 0;

    BoundSequences(const BoundSequences&) = delete;  // the view points into it
    BoundSequences& operator=(const BoundSequences&) = delete;

    BoundSequences(const Array<const std::int32_t, 1>& fresh_array, const Array<const std::int32_t, 1>& length_array,
                   const Array<const std::int32_t, 2>& page_array)
        : fresh(fresh_array.data(), fresh_array.data() + fresh_array.shape(0)),
          lengths(length_array.data(), length_array.data() + length_array.shape(0)),
          pages(page_array.data(), page_array.data() + page_array.shape(0) * page_array.shape(1)) {
        view.count = fresh.size();
        check("Sequences", "lengths", length_array, {view.count});
        check("Sequences", "pages", page_array, {view.count, page_array.shape(1)});
        view.fresh = fresh.data();
        view.lengths = lengths.data();
        view.pages = pages.data();
        view.pages_per_sequence = page_array.shape(1);
        for (std::size_t i = 0; i < view.count; ++i) {
            if (view.fresh[i] < 0 || view.fresh[i] > view.lengths[i]) {
                refuse("[Sequences] sequence " + std::to_string(i) + ": expected new tokens between 0 and its length " +
                       std::to_string(view.lengths[i]) + ", got " + std::to_string(view.fresh[i]));
            }
            num_tokens += static_cast<std::size_t>(view.fresh[i]);
        }
    }

    // Every page that a sequence reaches is one of its store. Entries behind its last page are not looked at.
    void check_pages(const char* operation, std::size_t sequence, const KvStore& store) const {
        const auto length = static_cast<std::size_t>(view.lengths[sequence]);
        const std::size_t needed = (length + store.slots - 1) / store.slots;
        const auto fail = [&](const std::string& what) {
            refuse(std::string("[") + operation + "] sequence " + std::to_string(sequence) + ": expected " + what);
        };
        if (needed > view.pages_per_sequence) {
            fail(std::to_string(needed) + " pages for " + std::to_string(length) + " tokens, got " +
                 std::to_string(view.pages_per_sequence));
        }
        const std::int32_t* row = view.pages + sequence * view.pages_per_sequence;
        for (std::size_t page = 0; page < needed; ++page) {
            if (row[page] >= 0 && static_cast<std::size_t>(row[page]) < store.pages) continue;
            fail("pages from 0 to " + std::to_string(store.pages - 1) + ", got " + std::to_string(row[page]));
        }
    }
};

// The stores of a call, checked: one for all sequences or one for each, of equal heads and head sizes, with every page that is asked for.
class Stores {
   public:
    Stores(const char* operation, const std::vector<const BoundStore*>& stores, const BoundSequences& sequences) {
        if (stores.size() != 1 && (stores.empty() || stores.size() != sequences.view.count)) {
            refuse(std::string("[") + operation + "] expected one store, or one for each of " + std::to_string(sequences.view.count) +
                   " sequences, got " + std::to_string(stores.size()));
        }
        for (const BoundStore* store : stores) each_.push_back(&store->view);
        view.each = each_.data();
        view.count = each_.size();
        for (const KvStore* store : each_) {
            if (store->heads == view.heads() && store->head_dim == view.head_dim()) continue;
            refuse(std::string("[") + operation + "] expected stores of equal heads and head sizes, got (" + std::to_string(view.heads()) +
                   ", " + std::to_string(view.head_dim()) + ") and (" + std::to_string(store->heads) + ", " +
                   std::to_string(store->head_dim) + ")");
        }
        for (std::size_t i = 0; i < sequences.view.count; ++i) sequences.check_pages(operation, i, view.of(i));
    }

    KvStores view;

   private:
    std::vector<const KvStore*> each_;
};

// Tensors need complex<float> as their type; the kernels take its two halves.
const float* halves(const Array<const std::complex<float>, 2>& rotation) { return reinterpret_cast<const float*>(rotation.data()); }

void check_heads(const char* operation, std::size_t heads, const KvStores& stores) {
    if (heads != 0 && heads % stores.heads() == 0) return;
    refuse(std::string("[") + operation + "] expected query heads in equal groups over " + std::to_string(stores.heads()) +
           " key heads, got " + std::to_string(heads));
}

void bound_attention(const Array<const float, 3>& q, const Array<float, 3>& out, const std::vector<const BoundStore*>& stores,
                     const BoundSequences& sequences, float scale) {
    const Stores checked("attention", stores, sequences);
    const std::size_t heads = q.shape(1), dim = checked.view.head_dim();
    check("attention", "q", q, {sequences.num_tokens, heads, dim});
    check("attention", "out", out, {sequences.num_tokens, heads, dim});
    check_heads("attention", heads, checked.view);
    nb::gil_scoped_release unlocked;
    attention(q.data(), heads, checked.view, sequences.view, scale, out.data());
}

void bound_rope_append(const Array<const float, 2>& qkv, const Array<const std::complex<float>, 2>& rotation, const Array<float, 3>& q,
                       const std::vector<const BoundStore*>& stores, const BoundSequences& sequences) {
    const Stores checked("rope_append", stores, sequences);
    const std::size_t tokens = sequences.num_tokens, dim = checked.view.head_dim(), heads = q.shape(1);
    check("rope_append", "q", q, {tokens, heads, dim});
    check("rope_append", "qkv", qkv, {tokens, (heads + 2 * checked.view.heads()) * dim});
    check("rope_append", "rotation", rotation, {tokens, dim / 2});
    nb::gil_scoped_release unlocked;
    rope_append(qkv.data(), heads, halves(rotation), checked.view, sequences.view, q.data());
}

void bound_attend(const Array<const float, 2>& qkv, const Array<const std::complex<float>, 2>& rotation, const Array<float, 2>& out,
                  const std::vector<const BoundStore*>& stores, const BoundSequences& sequences, float scale) {
    const Stores checked("attend", stores, sequences);
    const std::size_t tokens = sequences.num_tokens, dim = checked.view.head_dim(), heads = out.shape(1) / dim;
    check("attend", "out", out, {tokens, heads * dim});
    check("attend", "qkv", qkv, {tokens, (heads + 2 * checked.view.heads()) * dim});
    check("attend", "rotation", rotation, {tokens, dim / 2});
    check_heads("attend", heads, checked.view);
    nb::gil_scoped_release unlocked;
    attend(qkv.data(), heads, halves(rotation), checked.view, sequences.view, scale, out.data());
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
    nb::class_<BoundSequences>(m, "Sequences", "New tokens, lengths and pages of a step's sequences; copies its arrays.")
        .def(nb::init<const Array<const std::int32_t, 1>&, const Array<const std::int32_t, 1>&, const Array<const std::int32_t, 2>&>(),
             nb::arg("fresh"), nb::arg("lengths"), nb::arg("pages"),
             nb::sig("def __init__(self, fresh: Tensor, lengths: Tensor, pages: Tensor) -> None"));
    m.def("attention", &bound_attention, nb::arg("q"), nb::arg("out"), nb::arg("stores"), nb::arg("sequences"), nb::arg("scale"),
          nb::sig("def attention(q: Tensor, out: Tensor, stores: Sequence[KvStore], sequences: Sequences, scale: float) -> None"),
          "out (T, N, D) = causal attention of q (T, N, D) over the stores, one for all sequences or one each; float32.");
    m.def("rope_append", &bound_rope_append, nb::arg("qkv"), nb::arg("rotation"), nb::arg("q"), nb::arg("stores"), nb::arg("sequences"),
          nb::sig("def rope_append(qkv: Tensor, rotation: Tensor, q: Tensor, stores: Sequence[KvStore], sequences: Sequences) -> None"),
          "q (T, N, D) = rotated queries of qkv (T, (N + 2 G) D); rotated keys and the values go into the stores.");
    m.def("attend", &bound_attend, nb::arg("qkv"), nb::arg("rotation"), nb::arg("out"), nb::arg("stores"), nb::arg("sequences"),
          nb::arg("scale"),
          nb::sig("def attend(qkv: Tensor, rotation: Tensor, out: Tensor, stores: Sequence[KvStore], sequences: Sequences, "
                  "scale: float) -> None"),
          "rope_append and attention in one: out (T, N D).");
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
