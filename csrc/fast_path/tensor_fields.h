// What a step by address has to know of a tensor, read from its fields: cheap enough for thousands
// of tensors a step.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace adamal {

// A gradient without elements may have no address, and yet counts as one.
inline constexpr char kEmptyGradient = 0;

inline c10::StorageImpl* storage_of(const c10::TensorImpl& tensor) {
  return tensor.unsafe_storage().unsafeGetStorageImpl();
}

// Whether an allocator of torch made the storage, and no other can have its memory.
inline bool is_allocated(const c10::StorageImpl& storage, c10::DeleterFnPtr deleter) {
  return deleter != nullptr && storage.data_ptr().get_deleter() == deleter;
}

// Some addresses of objects, to be asked for many more.
class AddressSet {
 public:
  void assign(const std::vector<const void*>& addresses) {
    size_t slots = 8;
    while (slots < 4 * addresses.size()) slots *= 2;
    mask_ = slots - 1;
    slots_.assign(slots, nullptr);
    for (const void* address : addresses) *slot_of(address) = address;
  }

  bool contains(const void* address) const { return *slot_of(address) == address; }

 private:
  // Where an address is, or would be put.
  const void** slot_of(const void* address) const {
    constexpr size_t kFactor = 0x9e3779b97f4a7c15, kShift = 32;
    size_t slot = reinterpret_cast<uintptr_t>(address) * kFactor >> kShift;
    for (;; ++slot) {
      const void*& found = slots_[slot & mask_];
      if (found == nullptr || found == address) return &found;
    }
  }

  mutable std::vector<const void*> slots_ = {nullptr};
  size_t mask_ = 0;
};

// A tensor type, and the bytes of an element, which torch keeps in a table.
struct ElementType {
  caffe2::TypeMeta type;
  size_t bytes = 0;
};

// Where a parameter's elements lie in its storage: so must those of its gradient and moments.
class ParamLayout {
 public:
  explicit ParamLayout(const c10::TensorImpl& param)
      : sizes_(param.sizes().data()),
        strides_(param.strides().data()),
        dims_(param.dim()),
        numel_(param.numel()),
        key_set_(param.key_set()),
        device_(param.device()) {}

  int64_t numel() const { return numel_; }

  // Whether the storage of a dense tensor of this layout has not been freed or shrunk.
  bool has_memory(const c10::TensorImpl& tensor, size_t element_bytes) const {
    return numel_ == 0 ||
           tensor.unsafe_storage().nbytes() >= (tensor.storage_offset() + numel_) * element_bytes;
  }

  // Whether a tensor is an ordinary one (not sparse, lazily conjugated or of a subclass) of the
  // type, on the parameter's device, each element where the parameter's is.
  bool holds_for(const c10::TensorImpl& tensor, ElementType element) const {
    if (tensor.key_set() != key_set_ || tensor.dtype() != element.type ||
        tensor.device() != device_) {
      return false;
    }
    const auto sizes = tensor.sizes();
    if (static_cast<int64_t>(sizes.size()) != dims_) return false;
    const auto strides = tensor.strides();
    for (int64_t i = 0; i < dims_; ++i) {
      if (sizes[i] != sizes_[i]) return false;
      // The stride of a dimension of one element is never taken, nor any where there are none.
      if (strides[i] != strides_[i] && sizes[i] != 1 && numel_ != 0) return false;
    }
    return has_memory(tensor, element.bytes);
  }

  // The address of the first element, to be written; storages that share their memory until one
  // of them is written are parted first.
  void* mutable_address(const c10::TensorImpl& tensor, size_t element_bytes) const {
    if (numel_ == 0) return nullptr;
    return static_cast<char*>(storage_of(tensor)->mutable_data()) +
           tensor.storage_offset() * element_bytes;
  }

  const void* address(const c10::TensorImpl& tensor, size_t element_bytes) const {
    return static_cast<const char*>(storage_of(tensor)->data()) +
           tensor.storage_offset() * element_bytes;
  }

 private:
  const int64_t* sizes_;
  const int64_t* strides_;
  int64_t dims_;
  int64_t numel_;
  c10::DispatchKeySet key_set_;
  c10::Device device_;
};

// The sizes of a tensor, and then its strides.
inline std::vector<int64_t> layout_of(const c10::TensorImpl& tensor) {
  std::vector<int64_t> layout = tensor.sizes().vec();
  layout.insert(layout.end(), tensor.strides().begin(), tensor.strides().end());
  return layout;
}

inline bool has_layout(const c10::TensorImpl& tensor, const std::vector<int64_t>& layout) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  return sizes.size() + strides.size() == layout.size() &&
         std::equal(sizes.begin(), sizes.end(), layout.begin()) &&
         std::equal(strides.begin(), strides.end(), layout.begin() + sizes.size());
}

// Where a parameter keeps its gradient; null where it never had one. torch's own accessor is behind
// two calls.
inline const at::Tensor* gradient_slot(const c10::TensorImpl& param) {
  const auto* meta = static_cast<torch::autograd::AutogradMeta*>(param.autograd_meta());
  return meta == nullptr ? nullptr : &meta->grad_;
}

inline const at::Tensor* gradient_of(const c10::TensorImpl& param) {
  const at::Tensor* grad = gradient_slot(param);
  return grad != nullptr && grad->defined() ? grad : nullptr;
}

// The address of a version's counter, which the class keeps to itself: to prefetch, never to
// follow.
inline const void* counter_of(const c10::VariableVersion& version) {
  static_assert(sizeof(version) == sizeof(void*));
  const void* counter;
  std::memcpy(&counter, static_cast<const void*>(&version), sizeof(counter));
  return counter;
}

// GCC takes a function that does nothing but prefetch for one without effect, and drops its calls:
// the empty asm is an effect.
inline void prefetch_line(const void* address) {
  __builtin_prefetch(address);
  asm volatile("");
}

inline void prefetch_bytes(const void* address, size_t bytes) {
  constexpr size_t kLine = 64;
  const char* const first = static_cast<const char*>(address);
  for (size_t i = 0; i < bytes; i += kLine) prefetch_line(first + i);
  // They may begin in the middle of a line.
  prefetch_line(first + bytes - 1);
}

// Bytes [begin, end) of an object, which are those that are read: a line more is one in vain.
inline void prefetch_part(const void* object, size_t begin, size_t end) {
  prefetch_bytes(static_cast<const char*>(object) + begin, end - begin);
}

// The type of one of Python's tensors, and its address.
inline void prefetch_object(const void* tensor) {
  prefetch_part(tensor, offsetof(PyObject, ob_type),
                offsetof(THPVariable, cdata) + sizeof(THPVariable::cdata));
}

// What follows the counts of references.
inline void prefetch_tensor(const void* tensor) {
  prefetch_part(tensor, sizeof(c10::intrusive_ptr_target), sizeof(c10::TensorImpl));
}

// The same without the sizes and strides: the storage and, last of all, offset, size and type.
inline void prefetch_ends(const void* tensor) {
  constexpr size_t kFirst = sizeof(c10::intrusive_ptr_target), kLastBytes = 32;
  prefetch_part(tensor, kFirst, kFirst + sizeof(c10::Storage));
  prefetch_part(tensor, sizeof(c10::TensorImpl) - kLastBytes, sizeof(c10::TensorImpl));
}

// Up to the size and the flags after it.
inline void prefetch_storage(const void* storage) {
  constexpr size_t kEnd = 60;
  prefetch_part(storage, sizeof(c10::intrusive_ptr_target), kEnd);
}

}  // namespace adamal
