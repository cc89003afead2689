// What a step by address reads of every parameter, some of them ahead of what it checks: elements,
// gradient and state.
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <atomic>

#include "fast_path/fast_path.h"

namespace adamal {
namespace {

// Of a small dict's keys: a header, a table of indices and three entries.
constexpr size_t kKeysBytes = 96;

// Larger counts, and those that are no numbers, are refused by the check in Python.
constexpr float kMostSteps = 1e12f;

}  // namespace

int SteadyState::Which::find(PyObject* key) {
  // Interned once: a dict's own keys are nearly always the same objects.
#define ADAMAL_KEY(key, ...) PyUnicode_InternFromString(#key),
  static PyObject* const names[of_state] = {ADAMAL_BUFFERS(ADAMAL_KEY)
                                                PyUnicode_InternFromString("step")};
#undef ADAMAL_KEY
  for (int i = 0; i < of_state; ++i) {
    if (key == names[i]) return i;
  }
  if (!PyUnicode_CheckExact(key)) return of_state;
  for (int i = 0; i < of_state; ++i) {
    if (PyUnicode_Compare(key, names[i]) == 0) return i;
  }
  return of_state;
}

bool SteadyState::check_members(PyObject* groups, PyObject* state) {
  std::atomic<bool> unchanged = true;
  const auto read = [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      prefetch(i, first, last);
      if (!specs_.empty()) prefetch_sharded(i, last);
      const Member& member = members_[i];
      PlanStep& step = plans_[member.plan];
      TensorEntry entry;
      if (!read_member(i, &entry, &step.grads[member.slot]) ||
          !(entry == step.plan->tensors()[member.slot])) {
        unchanged = false;
        return;
      }
    }
  };
  // Many groups are shared out by themselves; few are checked while the other threads are woken.
  const bool shares_groups = groups_.are_many();
  if (shares_groups && !groups_.check(groups)) return false;
  const auto prepare = [&] {
    return (shares_groups || groups_.check(groups)) && find_values(state);
  };
  return shares_.walk(members_.size(), kLeastMembers, prepare, read) && unchanged;
}

bool SteadyState::find_values(PyObject* state) {
  if (!PyDict_Check(state)) return false;
  if (state_version_.is_of(state)) return true;
  if (PyDict_GET_SIZE(state) != static_cast<Py_ssize_t>(state_.size())) return false;
  PyObject *key, *values;
  Py_ssize_t position = 0;
  state_version_.watch(state);
  for (size_t i = 0; PyDict_Next(state, &position, &key, &values); ++i) {
    if (key != state_[i].key) return false;
    const int64_t member = state_[i].member;
    if (member < 0) continue;
    values_[member] = values;
    if (PyDict_CheckExact(values)) footprints_[member].version.watch(values);
  }
  state_version_.note(state);
  return true;
}

// In three stages, each of which reads what the one before fetched: what does not move, the
// gradient and the keys of a changed state, and the gradient's storage. A member is some forty
// cache lines, more than a core fetches at a time: a stage is one member ahead of the next.
void SteadyState::prefetch(size_t index, size_t first, size_t end) const {
  constexpr size_t kFarAhead = 3, kAhead = 2, kNext = 1;
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
  const auto prefetch_from = [](PyObject* object, const Footprint::Place& place) {
    if (place.tensor == nullptr) return;
    prefetch_object(object);
    if (place.storage == nullptr) {
      prefetch_ends(place.tensor);
    } else {
      prefetch_tensor(place.tensor);
      prefetch_storage(place.storage);
    }
  };
  prefetch_from(members_[index].param, footprint.param);
  for (int i = 0; i < Which::of_state; ++i) {
    prefetch_from(footprint.objects[i], footprint.state[i]);
  }
}

void SteadyState::prefetch_gradient(size_t index) const {
  PyObject* const values = values_[index];
  if (PyDict_CheckExact(values) && !footprints_[index].version.is_of(values)) {
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

bool SteadyState::read_member(size_t index, TensorEntry* entry, const void** grad) {
  const Member& member = members_[index];
  const PlanStep& step = plans_[member.plan];
  Footprint& footprint = footprints_[index];
  PyObject* part = member.param;
  if (member.is_sharded) {
    specs_[index].is_settled = true;
    specs_[index].param_impl = THPVariable_Unpack(member.param).unsafeGetTensorImpl();
    part = part_of(index, member.param, Which::param);
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
  const void* const slot = gradient_slot(owner);
  if (footprint.grad != slot) footprint.grad = slot;
  const void* const counter = counter_of(param.version_counter());
  if (footprint.version_counter != counter) footprint.version_counter = counter;
  if (!footprint.param.note({&param, storage_of(param)}) && !written_.empty()) return false;

  PyObject* const values = values_[index];
  if (!PyDict_CheckExact(values)) return false;
  if (!footprint.version.is_of(values) && !find_objects(index, values)) return false;
  const c10::TensorImpl* const count = state_tensor(index, Which::step);
  if (count == nullptr || !is_count(member, *count)) return false;
  *entry = {
      layout.mutable_address(param, param_type.bytes), layout.numel() << member.is_complex, {}};
  const ElementType* const types = step.buffer_types[member.is_complex];
  const auto read_elements = [&](int which) {
    const c10::TensorImpl* const tensor = state_tensor(index, which);
    const ElementType& type = types[which];
    if (tensor == nullptr || !layout.holds_for(*tensor, type)) return false;
    entry->buffers[which] = layout.mutable_address(*tensor, type.bytes);
    return true;
  };
  const auto read_buffer = [&](auto which) {
    constexpr Buffer kBuffer = kBuffers[which];
    if (kBuffer.needs != BufferNeeds::nothing && (step.state_keys >> which & 1) == 0) return true;
    if constexpr (kBuffer.shape == BufferShape::rows) return read_rows(index, which, entry);
    return read_elements(which);
  };
  if (!for_buffers(read_buffer)) return false;

  *grad = nullptr;
  if (const at::Tensor* gradient = gradient_of(owner)) {
    const c10::TensorImpl& tensor = *gradient->unsafeGetTensorImpl();
    return member.is_sharded ? read_sharded_gradient(index, layout, tensor, grad)
                             : read_gradient(index, layout, tensor, grad);
  }
  if (member.is_sharded) specs_[index].seen[Which::grad] = nullptr;
  return true;
}

bool SteadyState::find_objects(size_t index, PyObject* values) {
  Footprint& footprint = footprints_[index];
  footprint.version.forget();
  unsigned missing = plans_[members_[index].plan].state_keys;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (missing != 0 && PyDict_Next(values, &position, &key, &value)) {
    const int which = Which::find(key);
    if ((missing >> which & 1) == 0) continue;
    missing &= ~(1u << which);
    footprint.objects[which] = value;
  }
  if (missing != 0) return false;
  footprint.version.note(values);
  return true;
}

c10::TensorImpl* SteadyState::state_tensor(size_t index, int which) {
  Footprint& footprint = footprints_[index];
  PyObject* object = footprint.objects[which];
  if (members_[index].is_sharded && which != Which::step) {
    object = part_of(index, object, which);
    if (object == nullptr) return nullptr;
  }
  if (!THPVariable_CheckExact(object)) return nullptr;
  c10::TensorImpl* const tensor = THPVariable_Unpack(object).unsafeGetTensorImpl();
  // All counts are of one storage, which stays in the caches.
  const c10::StorageImpl* const storage = which == Which::step ? nullptr : storage_of(*tensor);
  const bool is_same = footprint.state[which].note({tensor, storage});
  return is_same || written_.empty() ? tensor : nullptr;
}

bool SteadyState::is_count(const Member& member, const c10::TensorImpl& tensor) {
  const PlanStep& step = plans_[member.plan];
  if ((storage_of(tensor) != step.steps_storage ||
       tensor.storage_offset() != static_cast<int64_t>(member.slot) ||
       tensor.dtype() != caffe2::TypeMeta::Make<float>() || tensor.numel() != 1) &&
      !is_own_count(member, tensor)) {
    return false;
  }
  // The bounds are false for a count that is no number, too.
  return !step.host_counts ||
         (step.counts[member.slot] >= 0 && step.counts[member.slot] <= kMostSteps);
}

bool SteadyState::is_own_count(const Member& member, const c10::TensorImpl& tensor) {
  PlanStep& step = plans_[member.plan];
  if (step.own_counts.empty()) return false;
  const at::Tensor& own = step.own_counts[member.slot];
  if (own.unsafeGetTensorImpl() != &tensor || !own.is_cpu() || own.scalar_type() != at::kFloat ||
      own.numel() != 1 || own.storage().nbytes() < (own.storage_offset() + 1) * sizeof(float)) {
    return false;
  }
  step.counts[member.slot] = *own.const_data_ptr<float>();
  return true;
}

bool SteadyState::read_rows(size_t index, int which, TensorEntry* entry) {
  const c10::TensorImpl* const found = state_tensor(index, which);
  if (found == nullptr) return false;
  const c10::TensorImpl& tensor = *found;
  const Member& member = members_[index];
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
  auto* const storage = static_cast<double*>(storage_of(tensor)->mutable_data());
  entry->buffers[which] = storage + tensor.storage_offset();
  return true;
}

}  // namespace adamal
