// What a step by address has to know of a tensor, read from its fields: cheap enough for thousands
// of tensors a step.
#pragma once

#include <c10/core/TensorImpl.h>

#include <cstddef>
#include <cstring>

namespace adamal {

// Whether the storage of a dense tensor has not been freed or shrunk.
inline bool has_memory(const c10::TensorImpl& tensor) {
  const size_t elements = tensor.storage_offset() + tensor.numel();
  return tensor.numel() == 0 ||
         tensor.unsafe_storage().nbytes() >= elements * tensor.dtype().itemsize();
}

// Whether a parameter's gradient or moment is an ordinary tensor (not sparse, lazily conjugated or
// of a subclass) of the type, on the parameter's device, each element where the parameter's is.
inline bool belongs_to(const c10::TensorImpl& param, const c10::TensorImpl& tensor,
                       caffe2::TypeMeta type) {
  if (tensor.key_set() != param.key_set() || tensor.dtype() != type ||
      tensor.device() != param.device()) {
    return false;
  }
  const auto sizes = param.sizes(), found = tensor.sizes();
  const size_t dims = sizes.size();
  if (found.size() != dims || !has_memory(tensor)) return false;
  for (size_t i = 0; i < dims; ++i) {
    if (found[i] != sizes[i]) return false;
  }
  if (tensor.is_contiguous() && param.is_contiguous()) return true;
  const auto strides = param.strides(), found_strides = tensor.strides();
  for (size_t i = 0; i < dims; ++i) {
    if (sizes[i] != 1 && found_strides[i] != strides[i]) return false;
  }
  return true;
}

// The address of a version's counter, which the class keeps to itself: to prefetch, never to
// follow.
inline const void* counter_of(const c10::VariableVersion& version) {
  static_assert(sizeof(version) == sizeof(void*));
  const void* counter;
  std::memcpy(&counter, static_cast<const void*>(&version), sizeof(counter));
  return counter;
}

inline void prefetch_bytes(const void* address, size_t bytes) {
  constexpr size_t kLine = 64;
  for (size_t i = 0; i < bytes; i += kLine) {
    __builtin_prefetch(static_cast<const char*>(address) + i);
  }
}

}  // namespace adamal
