#include "plan/triton_plan.h"

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
  int64_t row;       // of the scalars or options
};
static_assert(sizeof(TensorInput) % kAlignment == 0, "the scalars that follow must be aligned");

// What the scalars of a step on the device are derived from. The twin of
// adamal_kernels.backends.triton.tables.ScalarSource and OptionEntry, which the kernel reads as
// words of 8 bytes.
struct ScalarSource {
  int64_t tensor_count;
  float* counts;
  const float* grad_scale;
  const float* found_inf;
  const double* grad_norm;
  double max_grad_norm;
  int64_t* skipped_steps;
};
static_assert(sizeof(ScalarSource) == 7 * 8);

struct OptionEntry {
  struct Address {
    const void* number;
    int64_t is_float64;
  };

  double lr, beta1, beta2, eps, weight_decay, lower, upper;
  int64_t decoupled_weight_decay, maximize, bias_correction;
  Address lr_address, beta1_address, beta2_address;
};
static_assert(sizeof(OptionEntry) == 16 * 8);

OptionEntry entry_of(const DeviceOptions& options) {
  const StepOptions& o = options.options;
  const auto address_of = [](const DeviceOptions::Address& address) {
    return OptionEntry::Address{address.number, address.is_float64};
  };
  return {o.lr,
          o.beta1,
          o.beta2,
          o.eps,
          o.weight_decay,
          o.lower,
          o.upper,
          o.decoupled_weight_decay,
          o.maximize,
          o.bias_correction,
          address_of(options.lr),
          address_of(options.beta1),
          address_of(options.beta2)};
}

// A tensor's set and rows, which the kernels read as words of 8 bytes. The twin of
// adamal_kernels.backends.triton.tables.SetEntry and what follows it.
struct SetWords {
  struct Runs {
    int64_t sizes[CoupledRows::kMostRuns];
    int64_t strides[CoupledRows::kMostRuns];
  };

  int64_t kind;
  double size, tolerance;
  int64_t rows, length, kept_count, reduced_count;
  Runs kept, reduced;
};
static_assert(sizeof(SetWords) == (7 + 4 * CoupledRows::kMostRuns) * 8);

SetWords::Runs runs_of(int count, const int64_t* sizes, const int64_t* strides) {
  SetWords::Runs runs;
  for (int i = 0; i < CoupledRows::kMostRuns; ++i) {
    runs.sizes[i] = i < count ? sizes[i] : 1;
    runs.strides[i] = i < count ? strides[i] : 0;
  }
  return runs;
}

SetWords entry_of(const CoupledRows& rows) {
  return {static_cast<int64_t>(rows.set.kind),
          rows.set.size,
          rows.set.tolerance,
          rows.rows,
          rows.length,
          rows.kept_count,
          rows.reduced_count,
          runs_of(rows.kept_count, rows.kept_sizes, rows.kept_strides),
          runs_of(rows.reduced_count, rows.reduced_sizes, rows.reduced_strides)};
}

template <typename T>
void pack_scalars(const Bucket& bucket, char* target) {
  for (int64_t i = 0; i < bucket.scalar_count; ++i) {
    const StepScalars<T> rounded(bucket.scalars[i]);
    std::memcpy(target + i * sizeof(rounded), &rounded, sizeof(rounded));
  }
}

void pack_device_scalars(const Bucket& bucket, char* target) {
  const DeviceScalars& device = *bucket.device;
  const StepInputs& inputs = device.inputs;
  const ScalarSource source{bucket.tensor_count, device.counts,    inputs.grad_scale,
                            inputs.found_inf,    inputs.grad_norm, inputs.max_grad_norm,
                            device.skipped_steps};
  std::memcpy(target, &source, sizeof(source));
  for (int64_t i = 0; i < device.option_count; ++i) {
    const OptionEntry entry = entry_of(device.options[i]);
    std::memcpy(target + sizeof(source) + i * sizeof(entry), &entry, sizeof(entry));
  }
}

}  // namespace

void TritonPlan::launch(const Bucket& bucket) {
  const py::gil_scoped_acquire gil;
  hand_over_changes(bucket);
  launcher_.attr("launch")(pack(bucket));
}

at::Tensor TritonPlan::launch_squared_norm(const Bucket& bucket) {
  const py::gil_scoped_acquire gil;
  hand_over_changes(bucket);
  return launcher_.attr("squared_norm")(pack(bucket)).cast<at::Tensor>();
}

void TritonPlan::hand_over_changes(const Bucket& bucket) {
  if (!update_alignment(bucket) && handed_over_) return;
  handed_over_ = false;  // for as long as that may fail
  hand_over(bucket);
  handed_over_ = true;
}

bool TritonPlan::update_alignment(const Bucket& bucket) {
  bool changed = false;
  if (aligned_.size() != static_cast<size_t>(bucket.tensor_count)) {
    aligned_.assign(bucket.tensor_count, true);
    changed = true;
  }
  for (int64_t i = 0; i < bucket.tensor_count; ++i) {
    // A gradient that is gone most often comes back to where the last one was, or near it.
    if (bucket.grads[i] == nullptr && handed_over_) continue;
    const TensorEntry& e = bucket.tensors[i];
    auto bits = reinterpret_cast<uintptr_t>(e.param) | reinterpret_cast<uintptr_t>(bucket.grads[i]);
    for (int which = 0; which < Buffer::count; ++which) {
      if (kBuffers[which].shape == BufferShape::rows) continue;  // read one by one
      bits |= reinterpret_cast<uintptr_t>(e.buffers[which]);
    }
    const bool aligned = bits % kAlignment == 0;
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
  constexpr int64_t kWords = sizeof(SetWords) / sizeof(int64_t);
  at::Tensor set_table =
      empty_host({static_cast<int64_t>(sets().size()), kWords}, at::kLong, device());
  auto* const set_entries = static_cast<SetWords*>(set_table.mutable_data_ptr());
  std::transform(sets().begin(), sets().end(), set_entries,
                 [](const CoupledRows& rows) { return entry_of(rows); });
  launcher_.attr("bind")(entries, aligned, others, set_table, records());
}

at::Tensor TritonPlan::pack(const Bucket& bucket) const {
  const bool is_double = format().compute() == Dtype::float64;
  const int64_t input_bytes = bucket.tensor_count * sizeof(TensorInput);
  const int64_t row_bytes = is_double ? sizeof(StepScalars<double>) : sizeof(StepScalars<float>);
  const int64_t scalar_bytes =
      bucket.device == nullptr
          ? bucket.scalar_count * row_bytes
          : sizeof(ScalarSource) + bucket.device->option_count * sizeof(OptionEntry);
  at::Tensor packed = empty_host({input_bytes + scalar_bytes}, at::kByte, device());
  auto* const bytes = static_cast<char*>(packed.mutable_data_ptr());
  auto* const inputs = reinterpret_cast<TensorInput*>(bytes);
  for (int64_t i = 0; i < bucket.tensor_count; ++i) {
    const void* const grad = bucket.grads[i];
    inputs[i] = {grad, grad == nullptr || bucket.rows == nullptr ? 0 : bucket.rows[i]};
  }
  char* const scalars = bytes + input_bytes;
  if (bucket.device != nullptr) {
    pack_device_scalars(bucket, scalars);
  } else if (is_double) {
    pack_scalars<double>(bucket, scalars);
  } else {
    pack_scalars<float>(bucket, scalars);
  }
  return packed;
}

}  // namespace adamal
