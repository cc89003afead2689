// What a CUDA launch carries in its parameters, and how a bucket is split into launches. Host code
// without CUDA, so that it is tested without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/step.h"
#include "formula/bucket.h"

namespace adamal {

// Gradients move between steps, so their addresses travel in the launch itself: no copy to the
// device, and a CUDA graph keeps them. The tables stay on the device.
template <typename T, int kBytes, int kTensors>
struct LaunchParams {
  static constexpr int kHeaderBytes = 24;
  static constexpr int kTensorBytes = sizeof(void*) + sizeof(uint16_t);
  static constexpr int kTensorCapacity = kTensors;
  static constexpr int kRowCapacity =
      (kBytes - kHeaderBytes - kTensors * kTensorBytes) / int(sizeof(StepScalars<T>));

  const TensorEntry* tensors;  // the bucket's, as items index them
  const WorkItem* items;       // this launch's
  uint32_t first_tensor;       // the tensor of slot 0
  const void* grads[kTensors];
  StepScalars<T> scalars[kRowCapacity];
  uint16_t rows[kTensors];  // index into scalars

  ADAMAL_HD bool is_skipped() const { return false; }
  ADAMAL_HD const StepScalars<T>& scalars_of(uint32_t slot) const { return scalars[rows[slot]]; }
};

// What the first kernel of a step on the device leaves for the second.
template <typename T>
struct DeviceRows {
  int32_t* is_skipped;
  StepScalars<T>* rows;  // of each tensor

  static constexpr int64_t kHeaderBytes = 16;
  static constexpr int64_t bytes(int64_t tensors) {
    return kHeaderBytes + tensors * int64_t(sizeof(StepScalars<T>));
  }
  static DeviceRows at(void* memory) {
    return {static_cast<int32_t*>(memory),
            reinterpret_cast<StepScalars<T>*>(static_cast<char*>(memory) + kHeaderBytes)};
  }
};

// The launch of a step whose scalars lie on the device.
template <typename T, int kBytes>
struct DeviceLaunchParams {
  static constexpr int kTensorCapacity = (kBytes - 40) / int(sizeof(void*));

  const TensorEntry* tensors;
  const WorkItem* items;
  uint32_t first_tensor;
  DeviceRows<T> scalars;
  const void* grads[kTensorCapacity];

  ADAMAL_HD bool is_skipped() const { return *scalars.is_skipped != 0; }
  ADAMAL_HD const StepScalars<T>& scalars_of(uint32_t slot) const {
    return scalars.rows[first_tensor + slot];
  }
};

// The launch that derives the scalars: a thread a tensor.
template <typename T, int kBytes, int kTensors>
struct DeriveParams {
  static constexpr int kHeaderBytes = 72;
  static constexpr int kTensorCapacity = kTensors;
  static constexpr int kOptionCapacity =
      (kBytes - kHeaderBytes - kTensors * int(sizeof(uint16_t))) / int(sizeof(DeviceOptions));
  static constexpr uint16_t kAtRest = 0xffff;
  static_assert(kOptionCapacity < kAtRest);

  float* counts;  // of slot 0
  DeviceRows<T> scalars;
  int64_t* skipped_steps;  // null: another launch counts them
  StepInputs inputs;
  uint32_t first_tensor;
  uint32_t tensor_count;
  DeviceOptions options[kOptionCapacity];
  uint16_t option_of[kTensors];  // kAtRest: the tensor takes no step
};

// The launch that adds up the squares of each work item's gradient.
template <int kBytes>
struct NormParams {
  static constexpr int kTensorCapacity = (kBytes - 40) / int(sizeof(void*));

  const TensorEntry* tensors;
  const WorkItem* items;
  uint32_t first_tensor;
  double* item_sums;  // of this launch's items
  const void* grads[kTensorCapacity];
};

// A launch of few tensors need not pay for copying 32 KB of parameters. 32764 bytes is CUDA's
// limit, 4 KB was the limit before CUDA 12.1; the shares balance tensors and rows.
template <typename T>
using SmallLaunchParams = LaunchParams<T, 4096, 320>;
template <typename T>
using LargeLaunchParams = LaunchParams<T, 32764, 2560>;

template <typename T>
using SmallDeviceLaunchParams = DeviceLaunchParams<T, 4096>;
template <typename T>
using LargeDeviceLaunchParams = DeviceLaunchParams<T, 32764>;
template <typename T>
using SmallDeriveParams = DeriveParams<T, 4096, 320>;
template <typename T>
using LargeDeriveParams = DeriveParams<T, 32764, 4096>;
using SmallNormParams = NormParams<4096>;
using LargeNormParams = NormParams<32764>;

static_assert(sizeof(SmallDeviceLaunchParams<double>) <= 4096);
static_assert(sizeof(LargeDeviceLaunchParams<double>) <= 32764);
static_assert(sizeof(SmallDeriveParams<double>) <= 4096);
static_assert(sizeof(LargeDeriveParams<double>) <= 32764);
static_assert(sizeof(SmallNormParams) <= 4096);
static_assert(sizeof(LargeNormParams) <= 32764);
static_assert(sizeof(SmallLaunchParams<float>) <= 4096);
static_assert(sizeof(SmallLaunchParams<double>) <= 4096);
static_assert(sizeof(LargeLaunchParams<float>) <= 32764);
static_assert(sizeof(LargeLaunchParams<double>) <= 32764);

// Cuts a bucket into launches, in the order of its tensors: each takes as many as its parameters
// hold. The items of a tensor stay together.
template <typename T>
class LaunchSplitter {
 public:
  LaunchSplitter(const Bucket& bucket, const TensorEntry* device_tensors,
                 const WorkItem* device_items)
      : bucket_(bucket),
        device_tensors_(device_tensors),
        device_items_(device_items),
        slot_of_row_(bucket.scalar_count, kNoSlot) {}

  // Fills `params`, large or small ones, for the next launch; false when nothing is left.
  template <typename Params>
  bool next(Params* params) {
    skip_tensors_at_rest();
    if (tensor_ == bucket_.tensor_count) return false;
    params->tensors = device_tensors_;
    params->items = device_items_ + item_;
    params->first_tensor = static_cast<uint32_t>(tensor_);
    tensor_count_ = 0;
    row_count_ = 0;
    block_count_ = 0;
    used_rows_.clear();
    while (tensor_ < bucket_.tensor_count && add_tensor(params)) ++tensor_;
    item_ += block_count_;
    for (const uint32_t row : used_rows_) slot_of_row_[row] = kNoSlot;
    return true;
  }

  // Of the launch that next() filled.
  int64_t block_count() const { return block_count_; }
  int tensor_count() const { return tensor_count_; }

  template <typename Smaller>
  bool fits() const {
    return tensor_count_ <= Smaller::kTensorCapacity && row_count_ <= Smaller::kRowCapacity;
  }

  template <typename Smaller>
  Smaller shrink(const LargeLaunchParams<T>& params) const {
    Smaller smaller;
    smaller.tensors = params.tensors;
    smaller.items = params.items;
    smaller.first_tensor = params.first_tensor;
    std::memcpy(smaller.grads, params.grads, tensor_count_ * sizeof(params.grads[0]));
    std::memcpy(smaller.scalars, params.scalars, row_count_ * sizeof(params.scalars[0]));
    std::memcpy(smaller.rows, params.rows, tensor_count_ * sizeof(params.rows[0]));
    return smaller;
  }

 private:
  static constexpr uint16_t kNoSlot = 0xffff;
  static_assert(LargeLaunchParams<T>::kRowCapacity < kNoSlot);

  int64_t item_count(int64_t tensor) const {
    return (bucket_.tensors[tensor].numel + kCudaChunk<T> - 1) / kCudaChunk<T>;
  }

  void skip_tensors_at_rest() {
    while (tensor_ < bucket_.tensor_count &&
           (bucket_.grads[tensor_] == nullptr || item_count(tensor_) == 0)) {
      item_ += item_count(tensor_);
      ++tensor_;
    }
  }

  // False if the parameters have no room left for it.
  template <typename Params>
  bool add_tensor(Params* params) {
    if (tensor_count_ == Params::kTensorCapacity) return false;
    const void* grad = bucket_.grads[tensor_];
    uint16_t slot = 0;
    if (grad != nullptr) {
      const uint32_t row = bucket_.rows[tensor_];
      slot = slot_of_row_[row];
      if (slot == kNoSlot) {
        if (row_count_ == Params::kRowCapacity) return false;
        slot = static_cast<uint16_t>(row_count_++);
        params->scalars[slot] = StepScalars<T>(bucket_.scalars[row]);
        slot_of_row_[row] = slot;
        used_rows_.push_back(row);
      }
    }
    params->grads[tensor_count_] = grad;
    params->rows[tensor_count_] = slot;
    ++tensor_count_;
    block_count_ += item_count(tensor_);
    return true;
  }

  const Bucket& bucket_;
  const TensorEntry* device_tensors_;
  const WorkItem* device_items_;
  std::vector<uint16_t> slot_of_row_;  // of the bucket's row in this launch
  std::vector<uint32_t> used_rows_;
  int64_t tensor_ = 0;  // the first tensor and item no launch has taken yet
  int64_t item_ = 0;
  int tensor_count_ = 0;
  int row_count_ = 0;
  int64_t block_count_ = 0;
};

// Cuts a bucket into launches of at most as many tensors as their parameters hold gradients of.
template <typename T>
class GradientSplitter {
 public:
  explicit GradientSplitter(const Bucket& bucket) : bucket_(bucket) {}

  // Finds the tensors of the next launch, from one with work to one with work.
  bool next(int64_t capacity) {
    first_tensor_ += tensor_count_;
    first_item_ += block_count_;
    tensor_count_ = block_count_ = 0;
    for (; first_tensor_ < bucket_.tensor_count && !has_work(first_tensor_); ++first_tensor_) {
      first_item_ += items_of(first_tensor_);
    }
    int64_t blocks = 0;
    for (int64_t i = 0; i < capacity && first_tensor_ + i < bucket_.tensor_count; ++i) {
      blocks += items_of(first_tensor_ + i);
      if (!has_work(first_tensor_ + i)) continue;
      tensor_count_ = i + 1;
      block_count_ = blocks;
    }
    return tensor_count_ > 0;
  }

  int64_t tensor_count() const { return tensor_count_; }
  int64_t block_count() const { return block_count_; }
  int64_t first_item() const { return first_item_; }

  template <typename Params>
  void fill(const TensorEntry* device_tensors, const WorkItem* device_items, Params* params) const {
    params->tensors = device_tensors;
    params->items = device_items + first_item_;
    params->first_tensor = static_cast<uint32_t>(first_tensor_);
    std::memcpy(params->grads, bucket_.grads + first_tensor_, tensor_count_ * sizeof(void*));
  }

 private:
  int64_t items_of(int64_t tensor) const {
    return (bucket_.tensors[tensor].numel + kCudaChunk<T> - 1) / kCudaChunk<T>;
  }
  bool has_work(int64_t tensor) const {
    return bucket_.grads[tensor] != nullptr && bucket_.tensors[tensor].numel > 0;
  }

  const Bucket& bucket_;
  int64_t first_tensor_ = 0;
  int64_t first_item_ = 0;
  int64_t tensor_count_ = 0;
  int64_t block_count_ = 0;
};

// Cuts a bucket into the launches that derive its scalars. A tensor without elements is among
// them: its steps are counted.
template <typename T>
class DeriveSplitter {
 public:
  DeriveSplitter(const Bucket& bucket, DeviceRows<T> scalars)
      : bucket_(bucket), scalars_(scalars), slot_of_(bucket.device->option_count) {}

  // Fills the next launch; false when no tensor is left.
  template <typename Params>
  bool next(Params* params) {
    if (tensor_ == bucket_.tensor_count) return false;
    const DeviceScalars& device = *bucket_.device;
    std::fill(slot_of_.begin(), slot_of_.end(), Params::kAtRest);
    params->counts = device.counts + tensor_;
    params->scalars = scalars_;
    params->skipped_steps = tensor_ == 0 ? device.skipped_steps : nullptr;
    params->inputs = device.inputs;
    params->first_tensor = static_cast<uint32_t>(tensor_);
    params->tensor_count = 0;
    int options = 0;
    for (; tensor_ < bucket_.tensor_count; ++tensor_) {
      if (params->tensor_count == Params::kTensorCapacity) break;
      uint16_t slot = Params::kAtRest;
      if (bucket_.grads[tensor_] != nullptr) {
        uint16_t& found = slot_of_[bucket_.rows[tensor_]];
        if (found == Params::kAtRest) {
          if (options == Params::kOptionCapacity) break;
          found = static_cast<uint16_t>(options);
          params->options[options++] = device.options[bucket_.rows[tensor_]];
        }
        slot = found;
      }
      params->option_of[params->tensor_count++] = slot;
    }
    return true;
  }

 private:
  const Bucket& bucket_;
  DeviceRows<T> scalars_;
  std::vector<uint16_t> slot_of_;  // of options[i] in this launch
  int64_t tensor_ = 0;
};

// One thread of the launch that derives scalars.
template <typename T, int kBytes, int kTensors>
ADAMAL_HD inline void derive_thread(const DeriveParams<T, kBytes, kTensors>& params,
                                    uint32_t slot) {
  using Params = DeriveParams<T, kBytes, kTensors>;
  if (slot == 0) {
    const bool skip = gradient_factor(params.inputs).skip;
    *params.scalars.is_skipped = skip;
    if (skip && params.skipped_steps != nullptr) ++*params.skipped_steps;
  }
  if (slot >= params.tensor_count || params.option_of[slot] == Params::kAtRest) return;
  derive_and_count(params.options[params.option_of[slot]], params.inputs, params.counts + slot,
                   params.scalars.rows + params.first_tensor + slot);
}

}  // namespace adamal
