#include "plan_triton.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>

namespace py = pybind11;

namespace adamal {
namespace {

constexpr uintptr_t kAlignment = 16;

// What the kernel reads of a tensor in every step.
struct TensorInput {
  const void* grad;  // nullptr: no gradient in this step
  int64_t row;       // of the scalars
};
static_assert(sizeof(TensorInput) % kAlignment == 0, "the scalars that follow must be aligned");

// Host memory from which a copy to `device` need not wait for it. A block of pinned memory is not
// handed out again by torch before the copies out of it have run; pageable memory is copied in the
// call, for which that has to wait wherever the driver's own staging buffers are full.
at::Tensor empty_host(at::IntArrayRef sizes, at::ScalarType type, c10::Device device) {
  return at::empty(sizes, at::TensorOptions().dtype(type).pinned_memory(!device.is_cpu()));
}

template <typename T>
void pack_scalars(const Bucket& bucket, char* target) {
  for (int64_t i = 0; i < bucket.scalar_count; ++i) {
    const StepScalars<T> rounded(bucket.scalars[i]);
    std::memcpy(target + i * sizeof(rounded), &rounded, sizeof(rounded));
  }
}

}  // namespace

void TritonPlan::launch(const Bucket& bucket) {
  const py::gil_scoped_acquire gil;
  if (update_alignment(bucket) || !handed_over_) {
    handed_over_ = false;  // for as long as that may fail
    hand_over(bucket);
    handed_over_ = true;
  }
  launcher_.attr("launch")(pack_inputs(bucket));
}

at::Tensor TritonPlan::launch_squared_norm(const Bucket&) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "max_grad_norm is not implemented for backend='triton' yet");
}

bool TritonPlan::update_alignment(const Bucket& bucket) {
  bool changed = false;
  if (aligned_.size() != static_cast<size_t>(bucket.tensor_count)) {
    aligned_.assign(bucket.tensor_count, true);
    changed = true;
  }
  const auto is_aligned = [](auto... addresses) {
    return (... | reinterpret_cast<uintptr_t>(addresses)) % kAlignment == 0;
  };
  for (int64_t i = 0; i < bucket.tensor_count; ++i) {
    // A gradient that is gone most often comes back to where the last one was, or near it.
    if (bucket.grads[i] == nullptr && handed_over_) continue;
    const TensorEntry& e = bucket.tensors[i];
    const bool aligned =
        is_aligned(e.param, e.exp_avg, e.exp_avg_sq, e.max_exp_avg_sq, bucket.grads[i]);
    changed = changed || aligned != aligned_[i];
    aligned_[i] = aligned;
  }
  return changed;
}

void TritonPlan::hand_over(const Bucket& bucket) {
  constexpr int64_t kEntryWords = sizeof(TensorEntry) / sizeof(int64_t);
  at::Tensor entries = empty_host({bucket.tensor_count, kEntryWords}, at::kLong, device());
  std::memcpy(entries.mutable_data_ptr(), bucket.tensors,
              bucket.tensor_count * sizeof(TensorEntry));

  const auto is_aligned = [&](const WorkItem& item) { return aligned_[item.tensor]; };
  const WorkItem* const end = bucket.items + bucket.item_count;
  const int64_t aligned_count = std::count_if(bucket.items, end, is_aligned);
  at::Tensor aligned = empty_host({aligned_count, 2}, at::kInt, device());
  at::Tensor others = empty_host({bucket.item_count - aligned_count, 2}, at::kInt, device());
  static_assert(sizeof(WorkItem) == 2 * sizeof(int32_t));
  std::partition_copy(bucket.items, end, static_cast<WorkItem*>(aligned.mutable_data_ptr()),
                      static_cast<WorkItem*>(others.mutable_data_ptr()), is_aligned);
  launcher_.attr("bind")(entries, aligned, others);
}

at::Tensor TritonPlan::pack_inputs(const Bucket& bucket) const {
  const bool is_double = dtypes().param == Dtype::float64;
  const int64_t input_bytes = bucket.tensor_count * sizeof(TensorInput);
  const int64_t row_bytes = is_double ? sizeof(StepScalars<double>) : sizeof(StepScalars<float>);
  at::Tensor packed =
      empty_host({input_bytes + bucket.scalar_count * row_bytes}, at::kByte, device());
  auto* const bytes = static_cast<char*>(packed.mutable_data_ptr());
  auto* const inputs = reinterpret_cast<TensorInput*>(bytes);
  for (int64_t i = 0; i < bucket.tensor_count; ++i) {
    const void* const grad = bucket.grads[i];
    inputs[i] = {grad, grad == nullptr ? 0 : bucket.rows[i]};
  }
  if (is_double) {
    pack_scalars<double>(bucket, bytes + input_bytes);
  } else {
    pack_scalars<float>(bucket, bytes + input_bytes);
  }
  return packed;
}

}  // namespace adamal
