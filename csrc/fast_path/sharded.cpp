// What a step by address does for parameters that are spread over processes.
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/python_variable.h>

#include "fast_path/fast_path.h"

namespace py = pybind11;

namespace adamal {

bool SteadyState::read_sharded_gradient(size_t index, const ParamLayout& layout,
                                        const c10::TensorImpl& gradient, const void** grad) {
  PyObject* const object = sharded_->find(gradient);
  const at::Tensor& param = THPVariable_Unpack(members_[index].param);
  if (object == nullptr || gradient.sizes() != param.sizes()) return false;
  Specs& specs = specs_[index];
  PyObject* const part = part_of(index, object, Which::grad);
  if (part == nullptr || specs.seen[Which::grad] != specs.agreed[Which::grad].ptr()) {
    specs.is_settled = false;  // Then it is read when it is.
    return specs.seen[Which::grad] != nullptr;
  }
  return read_gradient(index, layout, *THPVariable_Unpack(part).unsafeGetTensorImpl(), grad);
}

PyObject* SteadyState::part_of(size_t index, PyObject* tensor, int which) {
  if (!sharded_->holds(tensor)) return nullptr;
  Specs& specs = specs_[index];
  specs.seen[which] = sharded_->spec(tensor);
  if (specs.seen[which] == nullptr) return nullptr;
  if (specs.seen[which] != specs.agreed[which].ptr()) specs.is_settled = false;
  PyObject* const part = sharded_->local(tensor);
  if (which != Which::grad) {
    specs.tensors[which] = tensor;
    specs.parts[which] = part;
  }
  return part != nullptr && THPVariable_CheckExact(part) ? part : nullptr;
}

bool SteadyState::settle_specs(std::vector<py::object>* held) {
  std::vector<size_t> misplaced;
  const auto read = [&](size_t index, PyObject* part) {
    const ParamLayout layout(*footprints_[index].param.tensor);
    const Member& member = members_[index];
    return read_gradient(index, layout, *THPVariable_Unpack(part).unsafeGetTensorImpl(),
                         &plans_[member.plan].grads[member.slot]);
  };
  for (size_t i = 0; i < members_.size(); ++i) {
    Specs& specs = specs_[i];
    if (specs.is_settled) continue;
    const Member& member = members_[i];
    bool grad_is_placed_alike = false;
    if (!compare_specs(&specs, &grad_is_placed_alike)) return false;
    specs.is_settled = true;
    PyObject* const grad = gradient_object(member);
    if (grad == nullptr) continue;
    const ElementType grad_type = plans_[member.plan].grad_types[member.is_complex];
    if (THPVariable_Unpack(grad).dtype() != grad_type.type) return false;
    PyObject* const part = sharded_->local(grad);
    if (!grad_is_placed_alike || part == nullptr || !THPVariable_CheckExact(part)) {
      misplaced.push_back(i);
    } else if (!read(i, part)) {
      return false;
    }
  }
  // Every process redistributes the same gradients in this order, and none starts over after it.
  for (const size_t i : misplaced) {
    PyObject* const param = members_[i].param;
    held->push_back(sharded_->redistribute(param, gradient_object(members_[i])));
    TORCH_CHECK(THPVariable_CheckExact(held->back().ptr()) && read(i, held->back().ptr()),
                "a redistributed gradient is not laid out as its parameter");
  }
  return true;
}

PyObject* SteadyState::gradient_object(const Member& member) const {
  const at::Tensor* grad = gradient_of(*THPVariable_Unpack(member.param).unsafeGetTensorImpl());
  return grad == nullptr ? nullptr : sharded_->find(*grad->unsafeGetTensorImpl());
}

bool SteadyState::compare_specs(Specs* specs, bool* grad_is_placed_alike) const {
  *grad_is_placed_alike = true;
  py::object* const agreed = specs->agreed;
  for (int i = 0; i < Which::count; ++i) {
    const int which = (Which::param + i) % Which::count;  // the others follow the parameter
    PyObject* const spec = specs->seen[which];
    if (spec == nullptr || spec == agreed[which].ptr()) continue;
    if (agreed[Which::param]) {
      if (!sharded_->same_mesh(spec, agreed[Which::param].ptr())) return false;
      if (!sharded_->same_placements(spec, agreed[Which::param].ptr())) {
        if (which != Which::grad) return false;
        *grad_is_placed_alike = false;
        continue;
      }
    }
    agreed[which] = py::reinterpret_borrow<py::object>(spec);
  }
  return true;
}

// Between a sharded tensor and its elements lie three objects more. Each stage reads what the one
// before fetched.
void SteadyState::prefetch_sharded(size_t index, size_t end) const {
  constexpr size_t kStages = 5, kAhead = 4;
  constexpr size_t kBytes = 128;  // a Python tensor and its slots
  if (const size_t far = index + (kStages + 1) * kAhead; far < end && members_[far].is_sharded) {
    const Specs& specs = specs_[far];
    __builtin_prefetch(footprints_[far].grad);
    prefetch_bytes(specs.param_impl, sizeof(c10::TensorImpl));
    for (int i = 0; i < Which::held; ++i) {
      if (specs.tensors[i] == nullptr) continue;
      prefetch_bytes(specs.tensors[i], kBytes);
      __builtin_prefetch(specs.parts[i]);
    }
  }
  for (size_t stage = 1; stage <= kStages; ++stage) {
    const size_t ahead = index + (kStages + 1 - stage) * kAhead;
    if (ahead >= end || !members_[ahead].is_sharded) continue;
    const c10::TensorImpl& param = *THPVariable_Unpack(members_[ahead].param).unsafeGetTensorImpl();
    const at::Tensor* grad = gradient_of(param);
    if (grad == nullptr) continue;
    if (stage == 1) {
      prefetch_bytes(grad->unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
      continue;
    }
    PyObject* const object = grad->unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
    if (object == nullptr) continue;
    if (stage == 2) {
      prefetch_bytes(object, kBytes);
      continue;
    }
    PyObject* const part = sharded_->holds(object) ? sharded_->local(object) : nullptr;
    if (part == nullptr) continue;
    if (stage == 3) {
      __builtin_prefetch(part);
      continue;
    }
    if (!THPVariable_CheckExact(part)) continue;
    const c10::TensorImpl& elements = *THPVariable_Unpack(part).unsafeGetTensorImpl();
    if (stage == 4) {
      prefetch_bytes(&elements, sizeof(c10::TensorImpl));
    } else {
      __builtin_prefetch(storage_of(elements));
    }
  }
}

}  // namespace adamal
