#include "fast_path/sharded_class.h"

#include <structmember.h>

#include <stdexcept>
#include <utility>

namespace py = pybind11;

namespace adamal {
namespace {

Py_ssize_t slot_offset(const py::object& descriptor) {
  if (Py_TYPE(descriptor.ptr()) == &PyMemberDescr_Type) {
    const PyMemberDef& member = *reinterpret_cast<PyMemberDescrObject*>(descriptor.ptr())->d_member;
    if (member.type == T_OBJECT_EX) return member.offset;
  }
  throw std::invalid_argument("no slot: " + py::cast<std::string>(py::repr(descriptor)));
}

}  // namespace

ShardedClass::ShardedClass(const py::type& type, const py::object& local, const py::object& spec,
                           Names mesh, Names placements, py::function redistribute)
    : type_(type),
      local_(slot_offset(local)),
      spec_(slot_offset(spec)),
      mesh_(std::move(mesh)),
      placements_(std::move(placements)),
      redistribute_(std::move(redistribute)) {}

PyObject* ShardedClass::find(const c10::TensorImpl& tensor) const {
  PyObject* object = tensor.pyobj_slot()->load_pyobj();
  return object != nullptr && holds(object) ? object : nullptr;
}

bool ShardedClass::agree(PyObject* spec, PyObject* other, const Names& names) {
  if (spec == other) return true;
  for (const py::str& name : names) {
    const auto first = py::reinterpret_steal<py::object>(PyObject_GetAttr(spec, name.ptr()));
    const auto second = py::reinterpret_steal<py::object>(PyObject_GetAttr(other, name.ptr()));
    if (!first || !second) throw py::error_already_set();
    // Takes an object to equal itself, unlike py::object::equal.
    const int equal = PyObject_RichCompareBool(first.ptr(), second.ptr(), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    if (equal == 0) return false;
  }
  return true;
}

py::object ShardedClass::redistribute(PyObject* param, PyObject* grad) const {
  return redistribute_(py::reinterpret_borrow<py::object>(param),
                       py::reinterpret_borrow<py::object>(grad));
}

}  // namespace adamal
