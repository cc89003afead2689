#include "steady_state.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "tensor_checks.h"

namespace py = pybind11;

namespace adamal {
namespace {

// The state's keys, interned once: a dict's own keys are nearly always the same objects.
struct StateKeys {
  enum Key { step, exp_avg, exp_avg_sq, max_exp_avg_sq, other };
  PyObject* names[other] = {
      PyUnicode_InternFromString("step"), PyUnicode_InternFromString("exp_avg"),
      PyUnicode_InternFromString("exp_avg_sq"), PyUnicode_InternFromString("max_exp_avg_sq")};

  Key find(PyObject* key) const {
    for (int i = 0; i < other; ++i) {
      if (key == names[i]) return static_cast<Key>(i);
    }
    if (!PyUnicode_CheckExact(key)) return other;
    for (int i = 0; i < other; ++i) {
      if (PyUnicode_Compare(key, names[i]) == 0) return static_cast<Key>(i);
    }
    return other;
  }
};

const StateKeys& state_keys() {
  static const StateKeys keys;
  return keys;
}

// Larger counts, and those that are no numbers, are refused by the check in Python.
constexpr float kMostSteps = 1e12f;

// A gradient without elements may have no address, and yet counts as one.
const char kEmptyGradient = 0;

at::ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return at::kFloat;
    case Dtype::float64:
      return at::kDouble;
    case Dtype::bfloat16:
      return at::kBFloat16;
    case Dtype::float16:
      return at::kHalf;
  }
  return at::ScalarType::Undefined;
}

void set_types(caffe2::TypeMeta (&types)[2], at::ScalarType real) {
  types[0] = c10::scalarTypeToTypeMeta(real);
  // bfloat16 has no complex type, and so no complex parameters.
  if (real != at::kBFloat16) types[1] = c10::scalarTypeToTypeMeta(c10::toComplexType(real));
}

// The number in `object` if it lies in [0, below), else NaN.
double number_in_range(PyObject* object, double below) {
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  double number = kNone;
  if (PyFloat_Check(object)) {
    number = PyFloat_AS_DOUBLE(object);
  } else if (PyLong_CheckExact(object)) {
    number = PyLong_AsDouble(object);
    if (PyErr_Occurred()) PyErr_Clear();  // too large: -1, out of every range
  }
  return number >= 0 && number < below ? number : kNone;
}

bool same_options(const StepOptions& a, const StepOptions& b) {
  return a.lr == b.lr && a.beta1 == b.beta1 && a.beta2 == b.beta2 && a.eps == b.eps &&
         a.weight_decay == b.weight_decay && a.lower == b.lower && a.upper == b.upper &&
         a.decoupled_weight_decay == b.decoupled_weight_decay && a.maximize == b.maximize &&
         a.bias_correction == b.bias_correction;
}

StepScalars<double> scalars_of(StepOptions options, int64_t step) {
  if (options.lr == 0) {  // such a step does not project
    options.lower = -std::numeric_limits<double>::infinity();
    options.upper = std::numeric_limits<double>::infinity();
  }
  return derive_step_scalars(step, options);
}

}  // namespace

SteadyState::SteadyState(const py::list& groups, const py::dict& state,
                         const std::vector<std::optional<Membership>>& members,
                         std::vector<BoundOptions> options,
                         std::vector<std::shared_ptr<Plan>> plans, at::Tensor steps)
    : options_(std::move(options)), steps_(std::move(steps)) {
  for (std::shared_ptr<Plan>& plan : plans) {
    PlanStep& step = plans_.emplace_back();
    const at::ScalarType param = scalar_type(plan->dtypes().param);
    set_types(step.param_types, param);
    set_types(step.grad_types, scalar_type(plan->dtypes().grad));
    set_types(step.moment_types, param == at::kDouble ? at::kDouble : at::kFloat);
    step.plan = std::move(plan);
  }

  std::unordered_map<PyObject*, int64_t> member_of;
  size_t next_options = 0;
  for (const py::handle& handle : groups) {
    const auto dict = py::reinterpret_borrow<py::dict>(handle);
    const auto params = py::reinterpret_borrow<py::list>(dict["params"]);
    Group& group = groups_.emplace_back();
    group.dict = dict;
    for (const auto& [key, value] : dict) {
      group.items.push_back({classify(key), py::reinterpret_borrow<py::object>(key),
                             py::reinterpret_borrow<py::object>(value)});
    }
    group.first_param = params_.size();
    group.param_count = params.size();
    group.first_options = next_options;
    while (next_options < options_.size() && options_[next_options].group == groups_.size() - 1) {
      ++next_options;
    }
    group.options_count = next_options - group.first_options;
    for (const py::handle& param : params) {
      const std::optional<Membership>& membership = members.at(params_.size());
      params_.push_back({py::reinterpret_borrow<py::object>(param), -1});
      if (!membership) continue;
      PlanStep& step = plans_.at(membership->plan);
      params_.back().member = member_of[param.ptr()] = static_cast<int64_t>(members_.size());
      members_.push_back({param.ptr(), static_cast<uint32_t>(membership->plan),
                          static_cast<uint32_t>(step.grads.size()),
                          static_cast<uint32_t>(membership->options),
                          THPVariable_Unpack(param.ptr()).is_complex()});
      step.grads.push_back(nullptr);
      step.rows.push_back(0);
    }
  }
  TORCH_CHECK(next_options == options_.size(), "options must be sorted by group");
  TORCH_CHECK(steps_.is_cpu() && steps_.is_contiguous() && steps_.scalar_type() == at::kFloat &&
                  steps_.numel() == static_cast<int64_t>(members_.size()),
              "steps must be one float32 for each parameter with state");
  counts_ = steps_.mutable_data_ptr<float>();
  last_rows_.resize(options_.size());
  footprints_.resize(members_.size());
  for (const auto& [key, value] : state) {
    const auto found = member_of.find(key.ptr());
    state_.push_back({key.ptr(), found == member_of.end() ? -1 : found->second});
  }
}

SteadyState::Item SteadyState::classify(const py::handle& key) {
  static const std::unordered_map<std::string, Item> items = {
      {"lr", Item::lr},
      {"betas", Item::betas},
      {"eps", Item::eps},
      {"weight_decay", Item::weight_decay},
      {"params", Item::params},
      {"amsgrad", Item::fixed},
      {"maximize", Item::fixed},
      {"foreach", Item::fixed},
      {"capturable", Item::fixed},
      {"differentiable", Item::fixed},
      {"fused", Item::fixed},
      {"decoupled_weight_decay", Item::fixed},
      {"bias_correction", Item::fixed},
      {"projection", Item::fixed},
      {"backend", Item::fixed},
  };
  if (!py::isinstance<py::str>(key)) return Item::ignored;
  const auto found = items.find(py::cast<std::string>(key));
  return found == items.end() ? Item::ignored : found->second;
}

int SteadyState::traverse(visitproc visit, void* arg) const {
  for (const Param& param : params_) Py_VISIT(param.object.ptr());
  for (const Group& group : groups_) {
    Py_VISIT(group.dict.ptr());
    for (const GroupItem& item : group.items) {
      Py_VISIT(item.key.ptr());
      Py_VISIT(item.value.ptr());
    }
  }
  return 0;
}

void SteadyState::clear() {
  // Moved out first: what is released here may call back into Python.
  const auto params = std::exchange(params_, {});
  const auto groups = std::exchange(groups_, {});
  members_.clear();
  state_.clear();
}

bool SteadyState::bind(const py::handle& state) {
  std::vector<std::vector<TensorEntry>> entries(plans_.size());
  for (size_t i = 0; i < plans_.size(); ++i) entries[i].resize(plans_[i].grads.size());
  PyObject *key, *values;
  Py_ssize_t position = 0;
  size_t bound = 0;
  for (size_t i = 0; PyDict_Next(state.ptr(), &position, &key, &values); ++i) {
    if (state_[i].member < 0) continue;
    const Member& member = members_[state_[i].member];
    const void* grad = nullptr;
    TensorEntry* entry = &entries[member.plan][member.slot];
    if (!read_member(state_[i].member, values, entry, &grad)) return false;
    ++bound;
  }
  if (bound != members_.size()) return false;
  for (size_t i = 0; i < plans_.size(); ++i) plans_[i].plan->bind(entries[i]);
  return true;
}

bool SteadyState::step(const py::handle& groups, const py::handle& state) {
  for (PlanStep& step : plans_) step.has_grads = false;
  if (!check_groups(groups.ptr()) || !check_state(state.ptr())) return false;
  find_rows();
  // The GIL is kept: only it holds the tensors whose addresses are used here.
  for (PlanStep& step : plans_) {
    if (!step.has_grads) continue;
    step.plan->step(step.grads, step.rows, scalars_.data(), static_cast<int64_t>(scalars_.size()));
  }
  for (size_t i = 0; i < members_.size(); ++i) {
    if (plans_[members_[i].plan].grads[members_[i].slot] == nullptr) continue;
    counts_[i] += 1;
    // Written by address: autograd has to be told, to find what it saved changed.
    THPVariable_Unpack(members_[i].param).unsafeGetTensorImpl()->bump_version();
  }
  return true;
}

bool SteadyState::check_groups(PyObject* groups) {
  if (!PyList_CheckExact(groups) ||
      PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) {
    return false;
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    if (PyList_GET_ITEM(groups, i) != groups_[i].dict.ptr() || !check_items(groups_[i])) {
      return false;
    }
  }
  return true;
}

bool SteadyState::check_items(Group& group) {
  PyObject* dict = group.dict.ptr();
  if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(group.items.size())) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (size_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    GroupItem& item = group.items[i];
    if (key != item.key.ptr()) return false;
    if (item.item == Item::params) {
      if (!check_params(group, value)) return false;
    } else if (value != item.value.ptr() && item.item != Item::ignored) {
      if (!take_over(group, item.item, value)) return false;
      item.value = py::reinterpret_borrow<py::object>(value);
    }
  }
  return true;
}

bool SteadyState::take_over(const Group& group, Item item, PyObject* value) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double first = 0, second = 0;
  if (item == Item::betas) {
    if (!PyTuple_CheckExact(value) || PyTuple_GET_SIZE(value) != 2) return false;
    first = number_in_range(PyTuple_GET_ITEM(value, 0), 1);
    second = number_in_range(PyTuple_GET_ITEM(value, 1), 1);
  } else {
    first = number_in_range(value, kInfinity);
  }
  if (std::isnan(first) || std::isnan(second)) return false;
  for (size_t i = group.first_options; i < group.first_options + group.options_count; ++i) {
    StepOptions& options = options_[i].step;
    switch (item) {
      case Item::lr:
        options.lr = first;
        break;
      case Item::betas:
        options.beta1 = first;
        options.beta2 = second;
        break;
      case Item::eps:
        options.eps = first;
        break;
      case Item::weight_decay:
        options.weight_decay = first;
        break;
      default:
        return false;
    }
  }
  return true;
}

bool SteadyState::check_params(const Group& group, PyObject* params) const {
  if (!PyList_CheckExact(params) ||
      PyList_GET_SIZE(params) != static_cast<Py_ssize_t>(group.param_count)) {
    return false;
  }
  for (size_t i = 0; i < group.param_count; ++i) {
    const Param& param = params_[group.first_param + i];
    if (PyList_GET_ITEM(params, i) != param.object.ptr()) return false;
    // Without state, it has never had a gradient: if it has one now, it is due its first step.
    if (param.member < 0 && THPVariable_Unpack(param.object.ptr()).grad().defined()) return false;
  }
  return true;
}

bool SteadyState::check_state(PyObject* state) {
  if (!PyDict_Check(state) || PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(state_.size())) {
    return false;
  }
  PyObject *key, *values;
  Py_ssize_t position = 0;
  for (size_t i = 0; PyDict_Next(state, &position, &key, &values); ++i) {
    prefetch(i);
    if (key != state_[i].key) return false;
    if (state_[i].member < 0) continue;
    const Member& member = members_[state_[i].member];
    PlanStep& step = plans_[member.plan];
    TensorEntry entry;
    if (!read_member(state_[i].member, values, &entry, &step.grads[member.slot]) ||
        !(entry == step.plan->tensors()[member.slot])) {
      return false;
    }
    step.has_grads = step.has_grads || step.grads[member.slot] != nullptr;
  }
  return true;
}

// In three stages, each of which reads what the one before fetched: what does not move, the
// gradient, and the gradient's storage.
void SteadyState::prefetch(size_t state_index) const {
  constexpr size_t kFarAhead = 12, kAhead = 6, kNext = 3;
  const auto member_at = [&](size_t index) {
    return index < state_.size() ? state_[index].member : -1;
  };
  if (const int64_t member = member_at(state_index + kFarAhead); member >= 0) {
    const Footprint& footprint = footprints_[member];
    prefetch_bytes(footprint.values, sizeof(PyDictObject));
    __builtin_prefetch(footprint.version_counter, 1);
    prefetch_bytes(footprint.autograd_meta, sizeof(torch::autograd::AutogradMeta));
    for (int i = 0; i < Footprint::kTensors; ++i) {
      if (footprint.tensors[i] == nullptr) continue;
      __builtin_prefetch(footprint.objects[i]);
      prefetch_bytes(footprint.tensors[i], sizeof(c10::TensorImpl));
      __builtin_prefetch(footprint.storages[i]);
    }
  }
  if (const int64_t member = member_at(state_index + kAhead); member >= 0) {
    const at::Tensor& grad =
        THPVariable_Unpack(members_[member].param).unsafeGetTensorImpl()->grad();
    if (grad.defined()) prefetch_bytes(grad.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
  }
  if (const int64_t member = member_at(state_index + kNext); member >= 0) {
    const at::Tensor& grad =
        THPVariable_Unpack(members_[member].param).unsafeGetTensorImpl()->grad();
    if (grad.defined() && grad.has_storage()) {
      __builtin_prefetch(grad.storage().unsafeGetStorageImpl());
    }
  }
}

bool SteadyState::read_member(size_t index, PyObject* values, TensorEntry* entry,
                              const void** grad) {
  const Member& member = members_[index];
  const PlanStep& step = plans_[member.plan];
  Footprint& footprint = footprints_[index];
  c10::TensorImpl& param = *THPVariable_Unpack(member.param).unsafeGetTensorImpl();
  if (param.key_set().has(c10::DispatchKey::Python) || param.is_inference() || !has_memory(param) ||
      param.dtype() != step.param_types[member.is_complex] ||
      param.device() != step.plan->device() || !param.is_non_overlapping_and_dense()) {
    return false;
  }
  *entry = {param.mutable_data(), nullptr, nullptr, nullptr,
            param.numel() * (member.is_complex ? 2 : 1)};
  footprint.values = values;
  footprint.autograd_meta = param.autograd_meta();
  footprint.version_counter = counter_of(param.version_counter());
  footprint.objects[0] = member.param;
  footprint.tensors[0] = &param;
  footprint.storages[0] = param.unsafe_storage().unsafeGetStorageImpl();

  if (!PyDict_CheckExact(values)) return false;
  const StateKeys& keys = state_keys();
  const bool amsgrad = step.plan->second_moment() == SecondMoment::amsgrad;
  const int expected = amsgrad ? 4 : 3;
  int found = 0;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (found < expected && PyDict_Next(values, &position, &key, &value)) {
    const StateKeys::Key name = keys.find(key);
    if (name == StateKeys::other || (name == StateKeys::max_exp_avg_sq && !amsgrad)) continue;
    if (!THPVariable_CheckExact(value)) return false;
    c10::TensorImpl& tensor = *THPVariable_Unpack(value).unsafeGetTensorImpl();
    ++found;
    footprint.objects[found] = value;
    footprint.tensors[found] = &tensor;
    if (name == StateKeys::step) {
      // The bounds are false for a count that is no number, too.
      const bool counts = tensor.dtype() == caffe2::TypeMeta::Make<float>() &&
                          tensor.numel() == 1 && tensor.data() == counts_ + index &&
                          counts_[index] >= 0 && counts_[index] <= kMostSteps;
      if (!counts) return false;
      continue;
    }
    if (!belongs_to(param, tensor, step.moment_types[member.is_complex])) return false;
    footprint.storages[found] = tensor.unsafe_storage().unsafeGetStorageImpl();
    void* const address = tensor.mutable_data();
    if (name == StateKeys::exp_avg) {
      entry->exp_avg = address;
    } else if (name == StateKeys::exp_avg_sq) {
      entry->exp_avg_sq = address;
    } else {
      entry->max_exp_avg_sq = address;
    }
  }
  if (found < expected) return false;

  *grad = nullptr;
  const at::Tensor& gradient = param.grad();
  if (gradient.defined()) {
    const c10::TensorImpl& tensor = *gradient.unsafeGetTensorImpl();
    if (!belongs_to(param, tensor, step.grad_types[member.is_complex])) return false;
    // Read while it is written: the check in Python says what to do.
    if (tensor.unsafe_storage().unsafeGetStorageImpl() == footprint.storages[0]) return false;
    *grad = entry->numel == 0 ? &kEmptyGradient : tensor.data();
  }
  return true;
}

void SteadyState::find_rows() {
  scalars_.clear();
  rows_.clear();
  for (LastRow& last : last_rows_) last.step = 0;
  for (size_t i = 0; i < members_.size(); ++i) {
    PlanStep& step = plans_[members_[i].plan];
    if (step.grads[members_[i].slot] == nullptr) continue;
    step.rows[members_[i].slot] = row_of(members_[i].options, static_cast<int64_t>(counts_[i]) + 1);
  }
}

uint32_t SteadyState::row_of(size_t options, int64_t step) {
  LastRow& last = last_rows_[options];
  if (last.step == step) return last.row;
  last.step = step;
  // Thousands of groups that differ in nothing share a row.
  if (options > 0 && last_rows_[options - 1].step == step &&
      same_options(options_[options - 1].step, options_[options].step)) {
    return last.row = last_rows_[options - 1].row;
  }
  const uint64_t key = static_cast<uint64_t>(options) << 40 | static_cast<uint64_t>(step);
  const auto [found, is_new] = rows_.try_emplace(key, static_cast<uint32_t>(scalars_.size()));
  if (is_new) scalars_.push_back(scalars_of(options_[options].step, step));
  return last.row = found->second;
}

}  // namespace adamal
