// Whether a dict is as it was, known without looking through it where Python keeps a version.
#pragma once

#include <Python.h>

#include <cstdint>

namespace adamal {

// Until Python 3.11 every change of any dict gives that dict a version that none has had before
// (PEP 509): one of the version that is remembered holds the very objects it held then. (Setting an
// attribute of whoever has the dict for its __dict__ may let go of the old object just before
// that.) Later versions of Python have that field, if at all, to themselves (PEP 699): no dict is
// as it was.
#if PY_VERSION_HEX < 0x030C0000

class DictVersion {
 public:
  void note(PyObject* dict) { version_ = of(dict); }
  bool is_of(PyObject* dict) const { return version_ == of(dict); }

 private:
  static uint64_t of(PyObject* dict) {
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
  }

  uint64_t version_ = 0;  // which no dict has
};

#else

class DictVersion {
 public:
  void note(PyObject* /*dict*/) {}
  bool is_of(PyObject* /*dict*/) const { return false; }
};

#endif

}  // namespace adamal
