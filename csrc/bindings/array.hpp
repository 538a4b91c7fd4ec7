// Tensor arguments: borrowed for the length of a call, of one type and number of dimensions, contiguous, on the CPU.
//
// nanobind's own ndarray goes through the Python method __dlpack__, about 2 us per tensor: a layer of a small network has some twenty
// of them, which is as long as its matrix products take. Tensors of torch 2.10 and later offer the same description through a C
// function (DLPack's exchange interface, below 0.1 us); others still go through ndarray. Never converts: what does not fit is refused.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>

namespace ernie45 {

template <typename T, int Dims>
class Array {
   public:
    using Owned = nanobind::ndarray<T, nanobind::ndim<Dims>, nanobind::device::cpu, nanobind::c_contig>;

    std::size_t ndim() const { return Dims; }
    std::size_t shape(std::size_t i) const { return shape_[i]; }
    T* data() const { return data_; }

    // False if the tensor is of another kind.
    bool borrow(const nanobind::dlpack::dltensor& tensor) {
        if (tensor.device.device_type != nanobind::device::cpu::value || tensor.ndim != Dims || tensor.dtype != nanobind::dtype<T>()) {
            return false;
        }
        std::int64_t stride = 1;
        bool contiguous = true, empty = false;
        for (int i = Dims - 1; i >= 0; --i) {
            const std::int64_t size = tensor.shape[i];
            contiguous = contiguous && (size == 1 || tensor.strides == nullptr || tensor.strides[i] == stride);
            empty = empty || size == 0;
            stride *= size;
            shape_[i] = static_cast<std::size_t>(size);
        }
        data_ = reinterpret_cast<T*>(static_cast<std::uint8_t*>(tensor.data) + tensor.byte_offset);
        return contiguous || empty;
    }

    void own(Owned&& array) {
        owned_ = std::move(array);
        for (std::size_t i = 0; i < Dims; ++i) shape_[i] = owned_.shape(i);
        data_ = owned_.data();
    }

   private:
    Owned owned_;  // only where the description had to be made
    std::size_t shape_[Dims] = {};
    T* data_ = nullptr;
};

// Describes an object through the exchange interface of its type. False if the type has none, or the object may not be shared: it
// wants a gradient, which a kernel would drop in silence, or is lazily conjugated. No Python error is left set.
bool describe(nanobind::handle object, nanobind::dlpack::dltensor& tensor, bool& has_interface) noexcept;

}  // namespace ernie45

namespace nanobind::detail {

template <typename T, int Dims>
struct type_caster<ernie45::Array<T, Dims>> {
    using Argument = ernie45::Array<T, Dims>;
    using Slow = make_caster<typename Argument::Owned>;
    NB_TYPE_CASTER(Argument, Slow::Name)

    template <typename Flags>  // their type differs between versions of nanobind
    bool from_python(handle source, Flags flags, cleanup_list* cleanup) noexcept {
        dlpack::dltensor tensor;
        bool has_interface = false;
        if (ernie45::describe(source, tensor, has_interface)) return value.borrow(tensor);
        if (has_interface) return false;
        Slow slow;
        if (source.is_none() || !slow.from_python(source, static_cast<Flags>(flags & ~static_cast<Flags>(cast_flags::convert)), cleanup)) {
            return false;
        }
        value.own(std::move(slow.value));
        return true;
    }
};

}  // namespace nanobind::detail
