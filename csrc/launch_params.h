// What a CUDA launch carries in its parameters, and how a bucket is split into launches. Host code
// without CUDA, so that it is tested without a GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "bucket.h"
#include "step.h"

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
};

// A launch of few tensors need not pay for copying 32 KB of parameters. 32764 bytes is CUDA's
// limit, 4 KB was the limit before CUDA 12.1; the shares balance tensors and rows.
template <typename T>
using SmallLaunchParams = LaunchParams<T, 4096, 320>;
template <typename T>
using LargeLaunchParams = LaunchParams<T, 32764, 2560>;

static_assert(sizeof(SmallLaunchParams<float>) <= 4096);
static_assert(sizeof(SmallLaunchParams<double>) <= 4096);
static_assert(sizeof(LargeLaunchParams<float>) <= 32764);
static_assert(sizeof(LargeLaunchParams<double>) <= 32764);

// Cuts a bucket into launches, in the order of its tensors: each takes as many as its parameters
// hold. The items of a tensor stay together.
template <typename T>
class LaunchSplitter {
 public:
  using Params = LargeLaunchParams<T>;

  LaunchSplitter(const Bucket& bucket, const TensorEntry* device_tensors,
                 const WorkItem* device_items)
      : bucket_(bucket),
        device_tensors_(device_tensors),
        device_items_(device_items),
        slot_of_row_(bucket.scalar_count, kNoSlot) {}

  // Fills `params` for the next launch; false when nothing is left.
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

  template <typename Smaller>
  bool fits() const {
    return tensor_count_ <= Smaller::kTensorCapacity && row_count_ <= Smaller::kRowCapacity;
  }

  template <typename Smaller>
  Smaller shrink(const Params& params) const {
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
  static_assert(Params::kRowCapacity < kNoSlot);

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

}  // namespace adamal
