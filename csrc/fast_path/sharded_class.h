// A Python class of tensors spread over processes, read without calling Python.
#pragma once

#include <c10/core/TensorImpl.h>
#include <pybind11/pybind11.h>

#include <vector>

namespace adamal {

// Each of its tensors keeps this process's part, a plain tensor, in one slot and in another a spec,
// which says how the whole is spread. A slot is a pointer at a fixed offset: reading it takes
// neither a reference nor a lock, so torch's threads may, while another holds the GIL for them.
class ShardedClass {
 public:
  // `local` and `spec` are the class's descriptors of those slots; `mesh` and `placements` name the
  // attributes in which specs of one mesh, and those that also spread alike, agree.
  // `redistribute(param, grad)` returns this process's part of a gradient once it is spread as its
  // parameter is, laid out in memory as the parameter's part.
  // Throws std::invalid_argument where a descriptor is not a slot's.
  ShardedClass(const pybind11::type& type, const pybind11::object& local,
               const pybind11::object& spec, std::vector<pybind11::str> mesh,
               std::vector<pybind11::str> placements, pybind11::function redistribute);

  bool holds(PyObject* object) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type_.ptr();
  }
  // Of a tensor of the class; borrowed, null where it is not set.
  PyObject* local(PyObject* tensor) const { return read(tensor, local_); }
  PyObject* spec(PyObject* tensor) const { return read(tensor, spec_); }
  // The object that Python knows a tensor by; borrowed, null if it is not of the class.
  PyObject* find(const c10::TensorImpl& tensor) const;

  // What follows calls Python, and throws what that raises.
  bool same_mesh(PyObject* spec, PyObject* other) const { return agree(spec, other, mesh_); }
  bool same_placements(PyObject* spec, PyObject* other) const {
    return agree(spec, other, placements_);
  }
  pybind11::object redistribute(PyObject* param, PyObject* grad) const;

 private:
  using Names = std::vector<pybind11::str>;

  static PyObject* read(PyObject* tensor, Py_ssize_t offset) {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + offset);
  }
  static bool agree(PyObject* spec, PyObject* other, const Names& names);

  pybind11::type type_;
  Py_ssize_t local_;
  Py_ssize_t spec_;
  Names mesh_;
  Names placements_;
  pybind11::function redistribute_;
};

}  // namespace adamal
