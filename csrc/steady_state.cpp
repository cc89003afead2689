#include "steady_state.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <utility>

namespace py = pybind11;

namespace adamal {
namespace {

// The state's keys, interned once: a dict's own keys are nearly always the same objects.
struct StateKeys {
  enum Key { step, exp_avg, exp_avg_sq, max_exp_avg_sq, multiplier, other };
  PyObject* names[other] = {
      PyUnicode_InternFromString("step"), PyUnicode_InternFromString("exp_avg"),
      PyUnicode_InternFromString("exp_avg_sq"), PyUnicode_InternFromString("max_exp_avg_sq"),
      PyUnicode_InternFromString("multiplier")};

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

// A thread's least share of the members: about 0.1 ms.
constexpr size_t kLeastMembers = 512;

// Of a small dict's keys: a header, a table of indices and three entries.
constexpr size_t kKeysBytes = 96;

// Larger counts, and those that are no numbers, are refused by the check in Python.
constexpr float kMostSteps = 1e12f;

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

ElementType element_type(at::ScalarType type) {
  const caffe2::TypeMeta meta = c10::scalarTypeToTypeMeta(type);
  return {meta, meta.itemsize()};
}

void set_types(ElementType (&types)[2], at::ScalarType real) {
  types[0] = element_type(real);
  // bfloat16 has no complex type, and so no complex parameters.
  if (real != at::kBFloat16) types[1] = element_type(c10::toComplexType(real));
}

std::vector<bool> have_state(const std::vector<std::optional<Membership>>& members) {
  std::vector<bool> have;
  for (const std::optional<Membership>& member : members) have.push_back(member.has_value());
  return have;
}

std::vector<int64_t> layout_of(const c10::TensorImpl& tensor) {
  std::vector<int64_t> layout = tensor.sizes().vec();
  layout.insert(layout.end(), tensor.strides().begin(), tensor.strides().end());
  return layout;
}

bool has_layout(const c10::TensorImpl& tensor, const std::vector<int64_t>& layout) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return sizes.size() + strides.size() == layout.size() &&
         std::equal(sizes.begin(), sizes.end(), layout.begin()) &&
         std::equal(strides.begin(), strides.end(), layout.begin() + sizes.size());
}

double number_of(const std::optional<at::Tensor>& tensor) { return tensor->item<double>(); }

// The twin of hyperparameters.StepInputs.factor_on_host.
GradientFactor factor_on_host(const SteadyState::Inputs& inputs) {
  StepInputs found{nullptr, nullptr, nullptr, inputs.max_grad_norm};
  float grad_scale, found_inf;
  double grad_norm;
  if (inputs.grad_scale) {
    grad_scale = static_cast<float>(number_of(inputs.grad_scale));
    found.grad_scale = &grad_scale;
  }
  if (inputs.found_inf) {
    found_inf = static_cast<float>(number_of(inputs.found_inf));
    found.found_inf = &found_inf;
  }
  if (inputs.grad_norm) {
    grad_norm = number_of(inputs.grad_norm);
    found.grad_norm = &grad_norm;
  }
  return gradient_factor(found);
}

}  // namespace

SteadyState::SteadyState(const py::list& groups, const py::dict& state,
                         const std::vector<std::optional<Membership>>& members,
                         std::vector<BoundOptions> options,
                         std::vector<std::shared_ptr<Plan>> plans,
                         const std::vector<at::Tensor>& steps, const std::vector<bool>& on_device,
                         std::shared_ptr<ShardedClass> sharded,
                         std::vector<std::vector<CoupledRows>> sets)
    : groups_(groups, have_state(members), std::move(options)), sharded_(std::move(sharded)) {
  for (size_t i = 0; i < plans.size(); ++i) {
    PlanStep& step = plans_.emplace_back();
    const at::ScalarType param = scalar_type(plans[i]->dtypes().param);
    set_types(step.param_types, param);
    set_types(step.grad_types, scalar_type(plans[i]->dtypes().grad));
    set_types(step.moment_types, param == at::kDouble ? at::kDouble : at::kFloat);
    step.plan = std::move(plans[i]);
    step.steps = steps.at(i);
    step.steps_storage = step.steps.storage().unsafeGetStorageImpl();
    step.counts = step.steps.mutable_data_ptr<float>();
    step.on_device = on_device.at(i);
    step.host_counts = step.steps.is_cpu();
    step.sets = std::move(sets.at(i));
    step.has_sets = !step.sets.empty();
    const bool amsgrad = step.plan->second_moment() == SecondMoment::amsgrad;
    step.more_keys = amsgrad << StateKeys::max_exp_avg_sq | step.has_sets << StateKeys::multiplier;
    step.state_tensors = 3 + amsgrad + step.has_sets;
  }

  std::unordered_map<PyObject*, int64_t> member_of;
  auto membership = members.begin();
  for (const py::handle& group : groups) {
    for (const py::handle& param : group["params"]) {
      const std::optional<Membership>& found = *membership++;
      if (!found) continue;
      PlanStep& step = plans_.at(found->plan);
      const bool is_sharded = sharded_ != nullptr && sharded_->holds(param.ptr());
      const at::Tensor& tensor =
          THPVariable_Unpack(is_sharded ? sharded_->local(param.ptr()) : param.ptr());
      member_of[param.ptr()] = static_cast<int64_t>(members_.size());
      members_.push_back({param.ptr(), static_cast<uint32_t>(found->plan),
                          static_cast<uint32_t>(step.grads.size()),
                          static_cast<uint32_t>(found->options), tensor.is_complex(), is_sharded,
                          tensor.key_set()});
      if (step.has_sets) {
        TORCH_CHECK(!is_sharded, "a set whose elements are spread over processes is not bound");
        step.layouts.push_back(layout_of(*tensor.unsafeGetTensorImpl()));
      }
      step.grads.push_back(nullptr);
      step.rows.push_back(0);
    }
  }
  for (const PlanStep& step : plans_) {
    const c10::Device device = step.on_device ? step.plan->device() : c10::Device(c10::kCPU);
    TORCH_CHECK(step.steps.device() == device && step.steps.is_contiguous() &&
                    step.steps.numel() == static_cast<int64_t>(step.grads.size()),
                "steps must be one float32 for each parameter of a plan, on ", device);
    TORCH_CHECK(!step.has_sets || step.sets.size() == step.grads.size(), "a plan of ",
                step.grads.size(), " parameters has ", step.sets.size(), " sets");
  }
  last_rows_.resize(groups_.options().size());
  values_.resize(members_.size());
  footprints_.resize(members_.size());
  if (sharded_ != nullptr) specs_.resize(members_.size());
  for (const auto& [key, value] : state) {
    const auto found = member_of.find(key.ptr());
    state_.push_back({key.ptr(), found == member_of.end() ? -1 : found->second});
  }
}

void SteadyState::clear() {
  members_.clear();
  values_.clear();
  specs_.clear();
  state_.clear();
  groups_.clear();
}

bool SteadyState::bind(const py::handle& state,
                       const std::vector<std::vector<at::Tensor>>& records) {
  for (const Member& member : members_) {
    const bool is_inference = THPVariable_Unpack(member.param).is_inference();
    if (member.key_set.has(c10::DispatchKey::Python) || is_inference) return false;
  }
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
    bool grad_is_placed_alike = false;
    if (member.is_sharded && !compare_specs(&specs_[state_[i].member], &grad_is_placed_alike)) {
      return false;
    }
    ++bound;
  }
  if (bound != members_.size()) return false;
  for (size_t i = 0; i < plans_.size(); ++i) {
    plans_[i].plan->bind(entries[i], plans_[i].sets, records.at(i));
  }
  for (PlanStep& step : plans_) step.plan->prepare();
  return true;
}

bool SteadyState::step(const py::handle& groups, const py::handle& state, Inputs inputs,
                       const NormOfSums& norm_of_sums) {
  for (PlanStep& step : plans_) {
    step.has_grads = false;
    // Another tensor of the same storage may have resized it.
    if (step.steps.const_data_ptr() != step.counts ||
        step.steps.storage().nbytes() < step.steps.nbytes()) {
      return false;
    }
  }
  if (!groups_.check(groups.ptr()) || !check_state(state.ptr())) return false;
  std::vector<py::object> redistributed;
  if (!specs_.empty() && !settle_specs(&redistributed)) return false;
  for (const Member& member : members_) {
    PlanStep& step = plans_[member.plan];
    step.has_grads = step.has_grads || step.grads[member.slot] != nullptr;
  }
  if (!can_use(inputs)) return false;
  // Waiting for other processes they fall asleep.
  const bool threads_are_awake =
      shares_.are_awake() && redistributed.empty() && !std::isfinite(inputs.max_grad_norm);
  // The GIL is kept: only it holds the tensors whose addresses are used here.
  if (std::isfinite(inputs.max_grad_norm)) {
    std::vector<at::Tensor> sums;
    for (PlanStep& step : plans_) sums.push_back(step.plan->squared_norm(step.grads));
    inputs.grad_norm = norm_of_sums(sums, inputs.grad_scale);
  }
  const bool host_steps = find_rows(inputs);
  int64_t* skipped_steps =
      inputs.skipped_steps ? inputs.skipped_steps->mutable_data_ptr<int64_t>() : nullptr;
  bool any_on_device = false;
  for (PlanStep& step : plans_) {
    if (!step.has_grads) continue;
    if (step.on_device) {
      step_on_device(step, inputs, any_on_device ? nullptr : skipped_steps);
      any_on_device = true;
    } else if (host_steps) {
      step.plan->step(step.grads, step.rows, scalars_.data(), static_cast<int64_t>(scalars_.size()),
                      threads_are_awake);
    }
  }
  if (!host_steps && !any_on_device && skipped_steps != nullptr) ++*skipped_steps;
  shares_.walk(members_.size(), kLeastMembers, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      const Member& member = members_[i];
      PlanStep& step = plans_[member.plan];
      if (step.grads[member.slot] == nullptr || (!step.on_device && !host_steps)) continue;
      if (!step.on_device) step.counts[member.slot] += 1;
      // Written by address: autograd has to be told, to find what it saved changed.
      THPVariable_Unpack(member.param).unsafeGetTensorImpl()->bump_version();
      if (member.is_sharded) {
        THPVariable_Unpack(sharded_->local(member.param)).unsafeGetTensorImpl()->bump_version();
      }
    }
  });
  return true;
}

bool SteadyState::can_use(const Inputs& inputs) const {
  const bool may_skip = inputs.found_inf || std::isfinite(inputs.max_grad_norm);
  if (!may_skip && !inputs.grad_scale) return true;
  c10::Device counted_on(c10::kCPU);
  bool found = false;
  for (const PlanStep& step : plans_) {
    // Its scalars would have to wait for the device.
    if (!step.on_device && !step.plan->device().is_cpu()) return false;
    if (step.on_device && step.has_grads && !found) {
      counted_on = step.plan->device();
      found = true;
    }
  }
  return !may_skip || (inputs.skipped_steps && inputs.skipped_steps->device() == counted_on);
}

void SteadyState::step_on_device(const PlanStep& step, const Inputs& inputs,
                                 int64_t* skipped_steps) {
  const c10::Device device = step.plan->device();
  const auto moved = [&](const std::optional<at::Tensor>& tensor, at::ScalarType type) {
    return tensor ? tensor->to(device, type, /*non_blocking=*/true) : at::Tensor();
  };
  const at::Tensor grad_scale = moved(inputs.grad_scale, at::kFloat);
  const at::Tensor found_inf = moved(inputs.found_inf, at::kFloat);
  const at::Tensor grad_norm = moved(inputs.grad_norm, at::kDouble);
  const auto address = [](const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr() : nullptr;
  };
  const StepInputs on_device{static_cast<const float*>(address(grad_scale)),
                             static_cast<const float*>(address(found_inf)),
                             static_cast<const double*>(address(grad_norm)), inputs.max_grad_norm};
  step.plan->step(step.grads, step.rows,
                  DeviceScalars{step.options.data(), static_cast<int64_t>(step.options.size()),
                                step.counts, on_device, skipped_steps});
}

bool SteadyState::check_state(PyObject* state) {
  if (!PyDict_Check(state) || PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(state_.size())) {
    return false;
  }
  const auto find_values = [&] {
    PyObject *key, *values;
    Py_ssize_t position = 0;
    for (size_t i = 0; PyDict_Next(state, &position, &key, &values); ++i) {
      if (key != state_[i].key) return false;
      if (state_[i].member >= 0) values_[state_[i].member] = values;
    }
    return true;
  };
  std::atomic<bool> unchanged = true;
  const auto read = [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      prefetch(i, first, last);
      if (!specs_.empty()) prefetch_sharded(i, last);
      const Member& member = members_[i];
      PlanStep& step = plans_[member.plan];
      TensorEntry entry;
      if (!read_member(i, values_[i], &entry, &step.grads[member.slot]) ||
          !(entry == step.plan->tensors()[member.slot])) {
        unchanged = false;
        return;
      }
    }
  };
  return shares_.walk(members_.size(), kLeastMembers, find_values, read) && unchanged;
}

// In three stages, each of which reads what the one before fetched: what does not move, the
// gradient and the state's keys, and the gradient's storage. A member is some forty cache lines,
// more than a core fetches at a time: a few members ahead are enough.
void SteadyState::prefetch(size_t index, size_t first, size_t end) const {
  constexpr size_t kFarAhead = 6, kAhead = 4, kNext = 2;
  // The first of a part come in one go.
  const size_t fetched = index == first ? first : std::min(index + kFarAhead, end);
  for (size_t i = fetched; i < std::min(index + kFarAhead + 1, end); ++i) prefetch_fixed(i);
  if (index + kAhead < end) prefetch_gradient(index + kAhead);
  if (index + kNext < end) prefetch_gradient_storage(index + kNext);
}

void SteadyState::prefetch_fixed(size_t index) const {
  const Footprint& footprint = footprints_[index];
  prefetch_part(values_[index], offsetof(PyObject, ob_type), sizeof(PyDictObject));
  __builtin_prefetch(footprint.version_counter, 1);
  __builtin_prefetch(footprint.grad);
  for (int i = 0; i < Footprint::kTensors; ++i) {
    const Footprint::Place& place = footprint.places[i];
    if (place.tensor == nullptr) continue;
    prefetch_object(place.object);
    if (place.storage == nullptr) {
      prefetch_ends(place.tensor);
    } else {
      prefetch_tensor(place.tensor);
      prefetch_storage(place.storage);
    }
  }
}

void SteadyState::prefetch_gradient(size_t index) const {
  if (PyObject* const values = values_[index]; PyDict_CheckExact(values)) {
    prefetch_bytes(reinterpret_cast<PyDictObject*>(values)->ma_keys, kKeysBytes);
  }
  const c10::TensorImpl& param = *THPVariable_Unpack(members_[index].param).unsafeGetTensorImpl();
  if (const at::Tensor* grad = gradient_of(param)) {
    prefetch_tensor(grad->unsafeGetTensorImpl());
  }
}

void SteadyState::prefetch_gradient_storage(size_t index) const {
  const c10::TensorImpl& param = *THPVariable_Unpack(members_[index].param).unsafeGetTensorImpl();
  if (const at::Tensor* grad = gradient_of(param)) {
    prefetch_storage(storage_of(*grad->unsafeGetTensorImpl()));
  }
}

bool SteadyState::read_member(size_t index, PyObject* values, TensorEntry* entry,
                              const void** grad) {
  const Member& member = members_[index];
  const PlanStep& step = plans_[member.plan];
  Footprint& footprint = footprints_[index];
  PyObject* part = member.param;
  if (member.is_sharded) {
    specs_[index].is_settled = true;
    specs_[index].param_impl = THPVariable_Unpack(member.param).unsafeGetTensorImpl();
    part = part_of(index, member.param, Specs::param);
    if (part == nullptr) return false;
  }
  // The parameter has the gradient, its part the elements.
  const c10::TensorImpl& owner = *THPVariable_Unpack(member.param).unsafeGetTensorImpl();
  c10::TensorImpl& param = *THPVariable_Unpack(part).unsafeGetTensorImpl();
  const ElementType param_type = step.param_types[member.is_complex];
  if (param.key_set() != member.key_set || param.dtype() != param_type.type ||
      param.device() != step.plan->device() || !param.is_non_overlapping_and_dense()) {
    return false;
  }
  const ParamLayout layout(param);
  if (!layout.has_memory(param, param_type.bytes)) return false;
  if (step.has_sets && !has_layout(param, step.layouts[member.slot])) return false;
  *entry = {layout.mutable_address(param, param_type.bytes),
            nullptr,
            nullptr,
            nullptr,
            layout.numel() << member.is_complex,
            nullptr};
  const void* const slot = gradient_slot(owner);
  if (footprint.grad != slot) footprint.grad = slot;
  const void* const counter = counter_of(param.version_counter());
  if (footprint.version_counter != counter) footprint.version_counter = counter;
  footprint.places[0].note({member.param, &param, storage_of(param)});

  if (!PyDict_CheckExact(values)) return false;
  const StateKeys& keys = state_keys();
  const int expected = step.state_tensors;
  int found = 0;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (found < expected && PyDict_Next(values, &position, &key, &value)) {
    const StateKeys::Key name = keys.find(key);
    if (name > StateKeys::exp_avg_sq && (step.more_keys >> name & 1) == 0) continue;
    if (member.is_sharded && name != StateKeys::step) {
      value = part_of(index, value, static_cast<Specs::Which>(name));
      if (value == nullptr) return false;
    }
    if (!THPVariable_CheckExact(value)) return false;
    c10::TensorImpl& tensor = *THPVariable_Unpack(value).unsafeGetTensorImpl();
    ++found;
    if (name == StateKeys::step) {
      // The bounds are false for a count that is no number, too.
      const bool is_ours = storage_of(tensor) == step.steps_storage &&
                           tensor.storage_offset() == static_cast<int64_t>(member.slot) &&
                           tensor.dtype() == caffe2::TypeMeta::Make<float>() && tensor.numel() == 1;
      if (!is_ours) return false;
      const bool counts = !step.host_counts ||
                          (step.counts[member.slot] >= 0 && step.counts[member.slot] <= kMostSteps);
      if (!counts) return false;
      // All counts are of one storage, which stays in the caches.
      footprint.places[found].note({value, &tensor, nullptr});
      continue;
    }
    footprint.places[found].note({value, &tensor, storage_of(tensor)});
    if (name == StateKeys::multiplier) {
      if (!read_multipliers(member, tensor, entry)) return false;
      continue;
    }
    const ElementType moment_type = step.moment_types[member.is_complex];
    if (!layout.holds_for(tensor, moment_type)) return false;
    void* const address = layout.mutable_address(tensor, moment_type.bytes);
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
  if (const at::Tensor* gradient = gradient_of(owner)) {
    const c10::TensorImpl& tensor = *gradient->unsafeGetTensorImpl();
    return member.is_sharded ? read_sharded_gradient(index, layout, tensor, grad)
                             : read_gradient(index, layout, tensor, grad);
  }
  if (member.is_sharded) specs_[index].seen[Specs::grad] = nullptr;
  return true;
}

bool SteadyState::read_multipliers(const Member& member, const c10::TensorImpl& tensor,
                                   TensorEntry* entry) const {
  const PlanStep& step = plans_[member.plan];
  const int64_t rows = step.sets[member.slot].rows;
  constexpr auto kBytes = static_cast<int64_t>(sizeof(double));
  if (tensor.key_set() != member.key_set || tensor.dtype() != caffe2::TypeMeta::Make<double>() ||
      tensor.device() != step.plan->device() || tensor.numel() != rows ||
      !tensor.is_non_overlapping_and_dense()) {
    return false;
  }
  if (rows == 0) return true;
  const auto bytes = static_cast<int64_t>(tensor.unsafe_storage().nbytes());
  if (bytes < (tensor.storage_offset() + rows) * kBytes) return false;
  void* const storage = storage_of(tensor)->mutable_data();
  entry->multipliers = static_cast<double*>(storage) + tensor.storage_offset();
  return true;
}

bool SteadyState::find_rows(const Inputs& inputs) {
  scalars_.clear();
  rows_.clear();
  for (LastRow& last : last_rows_) last.step = 0;
  GradientFactor found{1.0, false};
  for (PlanStep& step : plans_) step.options.clear();
  for (const PlanStep& step : plans_) {
    if (!step.on_device && step.has_grads) {
      found = factor_on_host(inputs);
      break;
    }
  }
  for (const Member& member : members_) {
    PlanStep& step = plans_[member.plan];
    if (step.grads[member.slot] == nullptr) continue;
    step.rows[member.slot] =
        step.on_device ? device_row_of(&step, member.options)
                       : row_of(member.options, static_cast<int64_t>(step.counts[member.slot]) + 1,
                                found.factor);
  }
  return !found.skip;
}

uint32_t SteadyState::row_of(size_t options, int64_t step, double grad_factor) {
  LastRow& last = last_rows_[options];
  if (last.step == step) return last.row;
  last.step = step;
  // Thousands of groups that differ in nothing share a row.
  if (groups_.repeats(options) && last_rows_[options - 1].step == step) {
    return last.row = last_rows_[options - 1].row;
  }
  const uint64_t key = static_cast<uint64_t>(options) << 40 | static_cast<uint64_t>(step);
  const auto [found, is_new] = rows_.try_emplace(key, static_cast<uint32_t>(scalars_.size()));
  if (is_new) {
    scalars_.push_back(
        derive_step_scalars(step, groups_.options()[options].step.options, grad_factor));
  }
  return last.row = found->second;
}

uint32_t SteadyState::device_row_of(PlanStep* step, size_t options) {
  const DeviceOptions& wanted = groups_.options()[options].step;
  LastRow& last = last_rows_[options];
  if (last.step == 0) {
    last.step = 1;
    if (step->options.empty() || !same_options(step->options.back(), wanted)) {
      step->options.push_back(wanted);
    }
    last.row = static_cast<uint32_t>(step->options.size() - 1);
  }
  return last.row;
}

}  // namespace adamal
