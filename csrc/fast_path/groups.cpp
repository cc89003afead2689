#include "fast_path/groups.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <limits>
#include <string>
#include <unordered_map>
#include <utility>

#include "fast_path/tensor_fields.h"

namespace py = pybind11;

namespace adamal {
namespace {

// Of a group's keys: a header, a table of indices and the entries.
constexpr size_t kKeysBytes = 320;

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }

bool is_floating_number(const at::Tensor& tensor) {
  return tensor.numel() == 1 &&
         (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble);
}

// Whether an option's value can change without being another object: a tensor's, an array's or a
// list's can, and what an unknown class does is not known.
bool is_mutable(PyObject* value) {
  if (PyTuple_Check(value)) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(value); ++i) {
      if (is_mutable(PyTuple_GET_ITEM(value, i))) return true;
    }
    return false;
  }
  if (PyFloat_CheckExact(value) || PyLong_Check(value)) return false;
  static PyObject* const numpy_scalar =
      py::object(py::module_::import("numpy").attr("generic")).release().ptr();
  return !PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(numpy_scalar));
}

// As float() converts it; NaN for what it does not, and for what is spelled out.
double converted(PyObject* object) {
  double number = std::numeric_limits<double>::quiet_NaN();
  if (PyBool_Check(object) || !PyNumber_Check(object)) return number;
  if (PyObject* const as_float = PyNumber_Float(object)) {
    number = PyFloat_AS_DOUBLE(as_float);
    Py_DECREF(as_float);
  } else {
    PyErr_Clear();  // The check in Python says what is wrong with it.
  }
  return number;
}

// The number in `object` if it lies in [0, below), else NaN.
double number_in_range(PyObject* object, double below) {
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  double number = kNone;
  if (PyFloat_CheckExact(object)) {
    number = PyFloat_AS_DOUBLE(object);
  } else if (is_tensor(object)) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (tensor.is_cpu() && is_floating_number(tensor)) number = tensor.item<double>();
  } else {
    number = converted(object);
  }
  return number >= 0 && number < below ? number : kNone;
}

// The items of a sequence of two; null ones where it is none.
std::pair<py::object, py::object> items_of_pair(PyObject* value) {
  const auto item = [value](size_t i) {
    return py::reinterpret_steal<py::object>(PyObject_GetItem(value, py::int_(i).ptr()));
  };
  std::pair<py::object, py::object> items;
  // A tensor has items, and is no sequence for Python.
  const bool is_sequence = is_tensor(value) ? THPVariable_Unpack(value).dim() == 1
                                            : PySequence_Check(value) && !PyBytes_Check(value);
  if (is_sequence && PyObject_Size(value) == 2) items = {item(0), item(1)};
  if (PyErr_Occurred()) PyErr_Clear();
  return items;
}

bool same_address(const DeviceOptions::Address& a, const DeviceOptions::Address& b) {
  return a.number == b.number && a.is_float64 == b.is_float64;
}

// Takes a number over, or the address of one in the step's device's memory; false if it is neither.
bool read_scalar(PyObject* object, double below, std::optional<c10::Device> device, double* number,
                 DeviceOptions::Address* address) {
  *address = {};
  if (device && is_tensor(object) && !THPVariable_Unpack(object).is_cpu()) {
    const at::Tensor& tensor = THPVariable_Unpack(object);
    if (tensor.device() != *device || !is_floating_number(tensor)) return false;
    *address = {tensor.const_data_ptr(), tensor.scalar_type() == at::kDouble};
    return true;
  }
  *number = number_in_range(object, below);
  return !std::isnan(*number);
}

}  // namespace

bool same_options(const DeviceOptions& first, const DeviceOptions& second) {
  const StepOptions &a = first.options, &b = second.options;
  return a.lr == b.lr && a.beta1 == b.beta1 && a.beta2 == b.beta2 && a.eps == b.eps &&
         a.weight_decay == b.weight_decay && a.lower == b.lower && a.upper == b.upper &&
         a.decoupled_weight_decay == b.decoupled_weight_decay && a.maximize == b.maximize &&
         a.bias_correction == b.bias_correction && same_address(first.lr, second.lr) &&
         same_address(first.beta1, second.beta1) && same_address(first.beta2, second.beta2);
}

SteadyGroups::SteadyGroups(const py::list& groups, const std::vector<bool>& has_state,
                           std::vector<BoundOptions> options)
    : options_(std::move(options)) {
  size_t next_options = 0;
  for (const py::handle& handle : groups) {
    const auto dict = py::reinterpret_borrow<py::dict>(handle);
    const auto params = py::reinterpret_borrow<py::list>(dict["params"]);
    Group& group = groups_.emplace_back();
    group.dict = dict;
    group.version.watch(dict.ptr());
    for (const auto& [key, value] : dict) {
      const Kind kind = classify(key);
      group.items.push_back({py::reinterpret_borrow<py::object>(key),
                             py::reinterpret_borrow<py::object>(value), kind,
                             is_number(kind) && is_mutable(value.ptr())});
    }
    group.first_param = params_.size();
    group.param_count = params.size();
    group.first_options = next_options;
    while (next_options < options_.size() && options_[next_options].group == groups_.size() - 1) {
      ++next_options;
    }
    group.options_count = next_options - group.first_options;
    for (const py::handle& param : params) {
      params_.push_back({py::reinterpret_borrow<py::object>(param), has_state.at(params_.size())});
    }
  }
  TORCH_CHECK(next_options == options_.size(), "options must be sorted by group");
  first_like_.resize(options_.size());
  unchanged_.resize(groups_.size());
  find_alike();
}

SteadyGroups::Kind SteadyGroups::classify(const py::handle& key) {
  static const std::unordered_map<std::string, Kind> kinds = {
      {"lr", Kind::lr},
      {"betas", Kind::betas},
      {"eps", Kind::eps},
      {"weight_decay", Kind::weight_decay},
      {"params", Kind::params},
      {"amsgrad", Kind::fixed},
      {"maximize", Kind::fixed},
      {"foreach", Kind::fixed},
      {"capturable", Kind::fixed},
      {"differentiable", Kind::fixed},
      {"fused", Kind::fixed},
      {"decoupled_weight_decay", Kind::fixed},
      {"bias_correction", Kind::fixed},
      {"projection", Kind::fixed},
      {"backend", Kind::fixed},
  };
  if (!py::isinstance<py::str>(key)) return Kind::ignored;
  const auto found = kinds.find(py::cast<std::string>(key));
  return found == kinds.end() ? Kind::ignored : found->second;
}

int SteadyGroups::traverse(visitproc visit, void* arg) const {
  for (const Param& param : params_) Py_VISIT(param.object.ptr());
  for (const Group& group : groups_) {
    Py_VISIT(group.dict.ptr());
    for (const Item& item : group.items) {
      Py_VISIT(item.key.ptr());
      Py_VISIT(item.value.ptr());
    }
  }
  return 0;
}

void SteadyGroups::clear() {
  // Moved out first: what is released here may call back into Python.
  const auto params = std::exchange(params_, {});
  const auto groups = std::exchange(groups_, {});
}

bool SteadyGroups::check(PyObject* groups) {
  if (!PyList_CheckExact(groups) ||
      PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) {
    return false;
  }
  shares_.walk(groups_.size(), kLeastGroups, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      prefetch(i, last);
      unchanged_[i] = is_unchanged(groups_[i]);
    }
  });
  bool has_changed = false;
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (PyList_GET_ITEM(groups, i) != groups_[i].dict.ptr()) return false;
    if (unchanged_[i]) continue;
    if (!check_items(groups_[i])) return false;
    has_changed = true;
  }
  if (has_changed) find_alike();
  return true;
}

void SteadyGroups::find_alike() {
  for (size_t i = 1; i < options_.size(); ++i) {
    const BoundOptions& first = options_[first_like_[i - 1]];
    const bool is_alike = first.device.has_value() == options_[i].device.has_value() &&
                          same_options(first.step, options_[i].step);
    first_like_[i] = is_alike ? first_like_[i - 1] : i;
  }
}

// In two stages, the second of which reads what the first fetched.
void SteadyGroups::prefetch(size_t index, size_t end) const {
  constexpr size_t kFarAhead = 4, kAhead = 2;
  if (index + kFarAhead < end) {
    const Group& group = groups_[index + kFarAhead];
    prefetch_bytes(group.dict.ptr(), sizeof(PyDictObject));
    prefetch_bytes(group.params, sizeof(PyListObject));
  }
  if (index + kAhead < end) {
    const Group& group = groups_[index + kAhead];
    PyObject* const dict = group.dict.ptr();
    if (!group.version.is_of(dict)) {
      prefetch_bytes(reinterpret_cast<PyDictObject*>(dict)->ma_keys, kKeysBytes);
    }
  }
}

bool SteadyGroups::is_unchanged(Group& group) const {
  PyObject* const dict = group.dict.ptr();
  if (group.version.is_of(dict)) return check_params(group, group.params);
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(group.items.size())) return false;
  PyObject *key, *value, *params = nullptr;
  Py_ssize_t position = 0;
  for (size_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    const Item& item = group.items[i];
    if (key != item.key.ptr()) return false;
    if (item.kind == Kind::params) {
      params = value;
    } else if (item.kind != Kind::ignored && (value != item.value.ptr() || item.is_read_anew)) {
      return false;
    }
  }
  // Last: where something else has changed, they are not walked twice.
  if (params == nullptr || !check_params(group, params)) return false;
  group.params = params;
  group.version.note(dict);
  return true;
}

bool SteadyGroups::check_items(Group& group) {
  PyObject* dict = group.dict.ptr();
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(group.items.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (size_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    Item& item = group.items[i];
    if (key != item.key.ptr()) return false;
    if (item.kind == Kind::params) {
      if (!check_params(group, value)) return false;
    } else if (item.kind != Kind::ignored && (value != item.value.ptr() || item.is_read_anew)) {
      // Held, for reading it may call into Python.
      const auto held = py::reinterpret_borrow<py::object>(value);
      if (!take_over(group, item.kind, value)) return false;
      item.value = held;
      item.is_read_anew = is_mutable(value);
    }
  }
  return true;
}

bool SteadyGroups::check_params(const Group& group, PyObject* params) const {
  if (!PyList_CheckExact(params) ||
      PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(group.param_count)) {
    return false;
  }
  for (size_t i = 0; i < group.param_count; ++i) {
    const Param& param = params_[group.first_param + i];
    if (PyList_GET_ITEM(params, i) != param.object.ptr()) return false;
    // Without state, it has never had a gradient: if it has one now, it is due its first step.
    if (!param.has_state &&
        gradient_of(*THPVariable_Unpack(param.object.ptr()).unsafeGetTensorImpl()) != nullptr) {
      return false;
    }
  }
  return true;
}

bool SteadyGroups::take_over(const Group& group, Kind kind, PyObject* value) {
  if (group.options_count == 0) {  // Nothing to step, and yet the option has to be a sound one.
    BoundOptions unused{0, std::nullopt, {}};
    if (is_tensor(value)) unused.device = THPVariable_Unpack(value).device();
    return take_over(unused, kind, value);
  }
  for (size_t i = group.first_options; i < group.first_options + group.options_count; ++i) {
    if (!take_over(options_[i], kind, value)) return false;
  }
  return true;
}

bool SteadyGroups::take_over(BoundOptions& options, Kind kind, PyObject* value) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  DeviceOptions& step = options.step;
  DeviceOptions::Address none;
  switch (kind) {
    case Kind::lr:
      return read_scalar(value, kInfinity, options.device, &step.options.lr, &step.lr);
    case Kind::betas: {
      const auto [beta1, beta2] = items_of_pair(value);
      return beta1 && beta2 &&
             read_scalar(beta1.ptr(), 1, options.device, &step.options.beta1, &step.beta1) &&
             read_scalar(beta2.ptr(), 1, options.device, &step.options.beta2, &step.beta2);
    }
    case Kind::eps:
      return !is_tensor(value) &&
             read_scalar(value, kInfinity, std::nullopt, &step.options.eps, &none);
    case Kind::weight_decay:
      return !is_tensor(value) &&
             read_scalar(value, kInfinity, std::nullopt, &step.options.weight_decay, &none);
    default:
      return false;
  }
}

}  // namespace adamal
