#include "fast_path/fast_path.h"

#include <c10/util/Exception.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

namespace py = pybind11;

namespace adamal {
namespace {

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

double number_of(const std::optional<at::Tensor>& tensor) { return tensor->item<double>(); }

// The twin of scalars.StepInputs.factor_on_host.
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
    const Format format = plans[i]->format();
    set_types(step.param_types, scalar_type(format.param));
    set_types(step.grad_types, scalar_type(format.grad));
    for (int which = 0; which < Buffer::count; ++which) {
      ElementType types[2];
      set_types(types, scalar_type(buffer_dtype(which, format)));
      for (int is_complex : {0, 1}) step.buffer_types[is_complex][which] = types[is_complex];
    }
    step.deleter = c10::GetAllocator(plans[i]->device().type())->raw_deleter();
    step.plan = std::move(plans[i]);
    step.steps = steps.at(i);
    step.steps_storage = step.steps.storage().unsafeGetStorageImpl();
    step.counts = step.steps.mutable_data_ptr<float>();
    step.on_device = on_device.at(i);
    step.host_counts = step.steps.is_cpu();
    step.sets = std::move(sets.at(i));
    step.has_sets = !step.sets.empty();
    step.state_keys = 1u << Which::step;
    for (int which = 0; which < Buffer::count; ++which) {
      const bool exists = kBuffers[which].exists(step.plan->second_moment(), step.has_sets);
      step.state_keys |= static_cast<unsigned>(exists) << which;
    }
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
                          static_cast<uint32_t>(step.grads.size()), tensor.is_complex(), is_sharded,
                          tensor.key_set()});
      if (step.has_sets) {
        TORCH_CHECK(!is_sharded, "a set whose elements are spread over processes is not bound");
        step.layouts.push_back(layout_of(*tensor.unsafeGetTensorImpl()));
      }
      step.options_of.push_back(static_cast<uint32_t>(found->options));
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
  footprints_.clear();
  state_.clear();
  state_version_.forget();
  // Moved out first: what is released here may call back into Python.
  const auto specs = std::exchange(specs_, {});
  const auto plans = std::exchange(plans_, {});
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
  if (!find_values(state.ptr())) return false;
  for (size_t i = 0; i < members_.size(); ++i) {
    const Member& member = members_[i];
    const void* grad = nullptr;
    TensorEntry* entry = &entries[member.plan][member.slot];
    if (values_[i] == nullptr) return false;
    find_own_count(i);
    if (!read_member(i, entry, &grad)) return false;
    bool grad_is_placed_alike = false;
    if (member.is_sharded && !compare_specs(&specs_[i], &grad_is_placed_alike)) return false;
  }
  for (size_t i = 0; i < plans_.size(); ++i) {
    plans_[i].plan->bind(entries[i], plans_[i].sets, records.at(i));
  }
  list_written();
  for (PlanStep& step : plans_) step.plan->prepare();
  return true;
}

void SteadyState::list_written() {
  const auto add = [this](const void* first, size_t bytes) {
    const auto* const begin = static_cast<const char*>(first);
    if (begin != nullptr && bytes != 0) written_.push_back({begin, begin + bytes});
  };
  for (const PlanStep& step : plans_) {
    const std::vector<TensorEntry>& entries = step.plan->tensors();
    for (size_t slot = 0; slot < entries.size(); ++slot) {
      const TensorEntry& entry = entries[slot];
      add(entry.param, entry.numel * step.param_types[0].bytes);
      for (int which = 0; which < Buffer::count; ++which) {
        const bool is_of_rows = kBuffers[which].shape == BufferShape::rows;
        const int64_t rows = step.has_sets ? step.sets[slot].rows : 0;
        add(entry.buffers[which],
            (is_of_rows ? rows : entry.numel) * step.buffer_types[0][which].bytes);
      }
    }
    add(step.steps.const_data_ptr(), step.steps.nbytes());
    for (const at::Tensor& own : step.own_counts) {
      if (own.defined()) add(own.const_data_ptr(), own.nbytes());
    }
  }
  std::sort(written_.begin(), written_.end(),
            [](const Span& a, const Span& b) { return a.begin < b.begin; });
  std::vector<const void*> storages;
  are_owned_ = true;
  for (size_t i = 0; i < members_.size(); ++i) {
    const auto add_storage = [&](const c10::StorageImpl* storage) {
      if (storage == nullptr) return;
      storages.push_back(storage);
      are_owned_ &= is_allocated(*storage, plans_[members_[i].plan].deleter);
    };
    Footprint& footprint = footprints_[i];
    add_storage(footprint.param.storage);
    for (const Footprint::Place& place : footprint.state) add_storage(place.storage);
    footprint.gap = {};  // found while nothing was known to be written
  }
  for (const PlanStep& step : plans_) {
    storages.push_back(step.steps_storage);
    for (const at::Tensor& own : step.own_counts) {
      if (own.defined()) storages.push_back(own.storage().unsafeGetStorageImpl());
    }
  }
  written_storages_.assign(storages);
}

SteadyState::Span SteadyState::gap_about(const char* address) const {
  const auto above =
      std::upper_bound(written_.begin(), written_.end(), address,
                       [](const char* value, const Span& span) { return value < span.begin; });
  const char* const begin = above == written_.begin() ? nullptr : std::prev(above)->end;
  if (begin > address) return {};
  constexpr auto kLast = std::numeric_limits<uintptr_t>::max();
  const char* const end =
      above == written_.end() ? reinterpret_cast<const char*>(kLast) : above->begin;
  return {begin, end};
}

void SteadyState::find_own_count(size_t index) {
  PyObject* const values = values_[index];
  if (!PyDict_CheckExact(values) || !find_objects(index, values)) return;
  PyObject* const object = footprints_[index].objects[Which::step];
  if (!THPVariable_CheckExact(object)) return;
  const at::Tensor& count = THPVariable_Unpack(object);
  PlanStep& step = plans_[members_[index].plan];
  if (storage_of(*count.unsafeGetTensorImpl()) == step.steps_storage) return;
  step.own_counts.resize(step.grads.size());
  step.own_counts[members_[index].slot] = count;
}

bool SteadyState::step(const py::handle& groups, const py::handle& state, Inputs inputs,
                       const NormOfSums& norm_of_sums) {
  for (PlanStep& step : plans_) {
    // Another tensor of the same storage may have resized it.
    if (step.steps.const_data_ptr() != step.counts ||
        step.steps.storage().nbytes() < step.steps.nbytes()) {
      return false;
    }
  }
  if (!check_members(groups.ptr(), state.ptr())) return false;
  std::vector<py::object> redistributed;
  if (!specs_.empty() && !settle_specs(&redistributed)) return false;
  for (PlanStep& step : plans_) {
    step.has_grads = std::any_of(step.grads.begin(), step.grads.end(),
                                 [](const void* grad) { return grad != nullptr; });
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
      footprints_[i].param.tensor->bump_version();
      if (member.is_sharded) {
        THPVariable_Unpack(member.param).unsafeGetTensorImpl()->bump_version();
      }
    }
  });
  if (host_steps || any_on_device) write_own_counts(host_steps);
  return true;
}

void SteadyState::write_own_counts(bool host_steps) {
  for (PlanStep& step : plans_) {
    for (size_t slot = 0; slot < step.own_counts.size(); ++slot) {
      const at::Tensor& own = step.own_counts[slot];
      if (!own.defined() || step.grads[slot] == nullptr) continue;
      float* const count = own.mutable_data_ptr<float>();
      if (step.on_device) {
        *count = step.counts[slot];  // unless the step was skipped, one more
      } else if (host_steps) {
        *count += 1;  // others may have counted since it was read
      }
    }
  }
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
  for (PlanStep& step : plans_) {
    // Neighbours mostly share a row.
    uint32_t row = 0, last_options = UINT32_MAX;
    float last_count = 0;
    for (size_t slot = 0; slot < step.grads.size(); ++slot) {
      if (step.grads[slot] == nullptr) continue;
      const uint32_t options = step.options_of[slot];
      const float count = step.on_device ? 0 : step.counts[slot];
      if (options != last_options || count != last_count) {
        row = step.on_device ? device_row_of(&step, options)
                             : row_of(options, static_cast<int64_t>(count) + 1, found.factor);
        last_options = options;
        last_count = count;
      }
      step.rows[slot] = row;
    }
  }
  return !found.skip;
}

uint32_t SteadyState::row_of(size_t options, int64_t step, double grad_factor) {
  // Thousands of groups that differ in nothing share a row.
  options = groups_.first_like(options);
  LastRow& last = last_rows_[options];
  if (last.step == step) return last.row;
  last.step = step;
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
