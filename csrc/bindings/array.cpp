#include "bindings/array.hpp"

namespace nb = nanobind;

namespace ernie45 {
namespace {

// The exchange interface of DLPack 1.x, as its header lays it out.
struct ExchangeInterface {
    std::uint32_t major, minor;
    void* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*describe)(void* object, nb::dlpack::dltensor* out);
    void* current_stream;
};

// An attribute of a type or object; null, and no error set, where there is none.
nb::object attribute(PyObject* object, PyObject* name) noexcept {
    PyObject* found = PyObject_GetAttr(object, name);
    if (found == nullptr) PyErr_Clear();
    return nb::steal(found);
}

const ExchangeInterface* exchange_interface(PyTypeObject* type) noexcept {
    static PyObject* const name = PyUnicode_InternFromString("__dlpack_c_exchange_api__");
    const nb::object capsule = attribute(reinterpret_cast<PyObject*>(type), name);
    if (!capsule.is_valid() || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
    const auto* found = static_cast<const ExchangeInterface*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    return found->major == 1 && found->describe != nullptr ? found : nullptr;
}

}  // namespace

bool describe(nb::handle object, nb::dlpack::dltensor& tensor, bool& has_interface) noexcept {
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    static PyObject* const is_conj = PyUnicode_InternFromString("is_conj");
    const ExchangeInterface* interface = exchange_interface(Py_TYPE(object.ptr()));
    has_interface = interface != nullptr;
    if (!has_interface) return false;
    if (attribute(object.ptr(), requires_grad).ptr() == Py_True) return false;
    if (interface->describe(object.ptr(), &tensor) != 0) {
        PyErr_Clear();
        return false;
    }
    if (tensor.dtype.code != static_cast<std::uint8_t>(nb::dlpack::dtype_code::Complex)) return true;
    const nb::object conjugated = nb::steal(PyObject_CallMethodObjArgs(object.ptr(), is_conj, nullptr));
    if (!conjugated.is_valid()) PyErr_Clear();
    return conjugated.ptr() == Py_False;
}

}  // namespace ernie45
