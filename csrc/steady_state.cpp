#include "steady_state.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cmath>
#include <limits>
#include <string>
#include <utility>

namespace py = pybind11;

namespace adamal {
namespace {

// The state's keys, interned once: a dict's own keys are nearly always the same objects.
struct StateKeys {
  PyObject* step = PyUnicode_InternFromString("step");
  PyObject* exp_avg = PyUnicode_InternFromString("exp_avg");
  PyObject* exp_avg_sq = PyUnicode_InternFromString("exp_avg_sq");
  PyObject* max_exp_avg_sq = PyUnicode_InternFromString("max_exp_avg_sq");
};

const StateKeys& state_keys() {
  static const StateKeys keys;
  return keys;
}

bool is_key(PyObject* key, PyObject* interned) {
  return key == interned || (PyUnicode_CheckExact(key) && PyUnicode_Compare(key, interned) == 0);
}

// Larger counts, and those that are no numbers, are refused by the check in Python.
constexpr float kMostSteps = 1e15f;

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

void set_types(at::ScalarType (&types)[2], at::ScalarType real) {
  types[0] = real;
  // bfloat16 has no complex type, and so no complex parameters.
  types[1] = real == at::kBFloat16 ? at::ScalarType::Undefined : c10::toComplexType(real);
}

bool has_strides_of(const at::Tensor& tensor, const at::Tensor& pattern) {
  if (tensor.is_contiguous() && pattern.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides(), expected = pattern.strides();
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] != 1 && strides[i] != expected[i]) return false;
  }
  return true;
}

// Whether a parameter's gradient or moment is an ordinary tensor (not sparse, lazily conjugated or
// of a subclass) of the type, on the parameter's device, each element where the parameter's is.
bool belongs_to(const at::Tensor& param, const at::Tensor& tensor, at::ScalarType type) {
  return tensor.key_set() == param.key_set() && tensor.scalar_type() == type &&
         tensor.device() == param.device() && tensor.sizes() == param.sizes() &&
         has_strides_of(tensor, param);
}

// The number in `object` if it lies in [0, below), else NaN.
double number_in_range(PyObject* object, double below) {
  constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
  if (!PyFloat_CheckExact(object)) return kNone;
  const double number = PyFloat_AS_DOUBLE(object);
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
  TORCH_CHECK(steps_.is_contiguous() && steps_.scalar_type() == at::kFloat &&
                  steps_.numel() == static_cast<int64_t>(members_.size()),
              "steps must be one float32 for each parameter with state");
  counts_ = steps_.mutable_data_ptr<float>();
  last_rows_.resize(options_.size());
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
    const std::optional<TensorEntry> entry = read_member(member, state_[i].member, values, &grad);
    if (!entry) return false;
    entries[member.plan][member.slot] = *entry;
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
  {
    const py::gil_scoped_release no_gil;
    for (PlanStep& step : plans_) {
      if (!step.has_grads) continue;
      step.plan->step(step.grads, step.rows, scalars_.data(),
                      static_cast<int64_t>(scalars_.size()));
    }
  }
  for (size_t i = 0; i < members_.size(); ++i) {
    if (plans_[members_[i].plan].grads[members_[i].slot] != nullptr) counts_[i] += 1;
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
    if (key != state_[i].key) return false;
    if (state_[i].member < 0) continue;
    const Member& member = members_[state_[i].member];
    PlanStep& step = plans_[member.plan];
    const std::optional<TensorEntry> entry =
        read_member(member, state_[i].member, values, &step.grads[member.slot]);
    if (!entry || !(*entry == step.plan->tensors()[member.slot])) return false;
    step.has_grads = step.has_grads || step.grads[member.slot] != nullptr;
  }
  return true;
}

std::optional<TensorEntry> SteadyState::read_member(const Member& member, size_t index,
                                                    PyObject* values, const void** grad) {
  const PlanStep& step = plans_[member.plan];
  const at::Tensor& param = THPVariable_Unpack(member.param);
  if (param.scalar_type() != step.param_types[member.is_complex] ||
      param.device() != step.plan->device() || !param.is_non_overlapping_and_dense()) {
    return std::nullopt;
  }
  TensorEntry entry{param.data_ptr(), nullptr, nullptr, nullptr,
                    param.numel() * (member.is_complex ? 2 : 1)};

  if (!PyDict_CheckExact(values)) return std::nullopt;
  const StateKeys& keys = state_keys();
  const bool amsgrad = step.plan->second_moment() == SecondMoment::amsgrad;
  int found = 0;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(values, &position, &key, &value)) {
    void** moment = nullptr;
    if (is_key(key, keys.exp_avg)) {
      moment = &entry.exp_avg;
    } else if (is_key(key, keys.exp_avg_sq)) {
      moment = &entry.exp_avg_sq;
    } else if (amsgrad && is_key(key, keys.max_exp_avg_sq)) {
      moment = &entry.max_exp_avg_sq;
    } else if (!is_key(key, keys.step)) {
      continue;
    }
    if (!THPVariable_CheckExact(value)) return std::nullopt;
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (moment == nullptr) {
      // Also false for a count that is no number.
      const bool counts = tensor.const_data_ptr() == counts_ + index && tensor.numel() == 1 &&
                          tensor.scalar_type() == at::kFloat && counts_[index] >= 0 &&
                          counts_[index] <= kMostSteps;
      if (!counts) return std::nullopt;
    } else {
      if (!belongs_to(param, tensor, step.moment_types[member.is_complex])) return std::nullopt;
      *moment = tensor.data_ptr();
    }
    ++found;
  }
  if (found != (amsgrad ? 4 : 3)) return std::nullopt;

  *grad = nullptr;
  const at::Tensor& gradient = param.grad();
  if (gradient.defined()) {
    if (!belongs_to(param, gradient, step.grad_types[member.is_complex])) return std::nullopt;
    *grad = entry.numel == 0 ? &kEmptyGradient : gradient.const_data_ptr();
  }
  return entry;
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
