#include "plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>

namespace adamal {
namespace {

// A thread's least share, about 0.1 ms: less is done before another thread, on a busy machine, has
// so much as begun.
constexpr int64_t kParallelElements = 262144;
// What a work item costs besides its elements, in elements: look-ups and the loop's ends.
constexpr int64_t kItemOverhead = 64;

}  // namespace

void Plan::bind(const std::vector<TensorEntry>& tensors) {
  if (tensors == tensors_) return;
  items_.clear();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t chunks = (tensors[i].numel + chunk_ - 1) / chunk_;
    TORCH_CHECK(chunks <= UINT32_MAX, "a parameter of ", tensors[i].numel,
                " elements is more than a plan can hold");
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      items_.push_back({static_cast<uint32_t>(i), static_cast<uint32_t>(chunk)});
    }
  }
  tensors_ = tensors;
  on_bound();
}

void Plan::step(const std::vector<const void*>& grads, const std::vector<uint32_t>& rows,
                const StepScalars<double>* scalars, int64_t scalar_count) {
  if (items_.empty()) return;
  launch({pair_, second_moment_, tensors_.data(), static_cast<int64_t>(tensors_.size()),
          items_.data(), static_cast<int64_t>(items_.size()), grads.data(), rows.data(), scalars,
          scalar_count});
}

void CpuPlan::on_bound() {
  cost_before_.resize(items().size() + 1);
  cost_before_[0] = 0;
  for (size_t i = 0; i < items().size(); ++i) {
    const int64_t left = tensors()[items()[i].tensor].numel - items()[i].chunk * kCpuChunk;
    cost_before_[i + 1] = cost_before_[i] + std::min(kCpuChunk, left) + kItemOverhead;
  }
}

void CpuPlan::launch(const Bucket& bucket) {
  // Shared out by cost, not by items: a ragged bucket would keep one thread waiting.
  at::parallel_for(0, cost_before_.back(), kParallelElements, [&](int64_t first, int64_t last) {
    const auto item_at = [&](int64_t cost) {
      return std::lower_bound(cost_before_.begin(), cost_before_.end(), cost) -
             cost_before_.begin();
    };
    step_cpu(bucket, item_at(first), std::min<int64_t>(item_at(last), bucket.item_count));
  });
}

void CudaPlan::launch(const Bucket& bucket) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device().type()).getStream(device());
  if (!uploaded_) upload(bucket, stream);
  // Freed memory is handed out again on the stream it was allocated on.
  if (stream != *allocation_stream_) table_.record_stream(stream);
  const auto* tensors = static_cast<const TensorEntry*>(table_.const_data_ptr());
  const auto* items = reinterpret_cast<const WorkItem*>(tensors + bucket.tensor_count);
  const char* error = api_.step(bucket, tensors, items, device().index(), stream.native_handle());
  TORCH_CHECK(error == nullptr, "adamal_kernels: the step's launch on ", device(),
              " failed: ", error);
}

void CudaPlan::upload(const Bucket& bucket, c10::Stream stream) {
  const size_t tensor_bytes = bucket.tensor_count * sizeof(TensorEntry);
  const size_t item_bytes = bucket.item_count * sizeof(WorkItem);
  table_ = at::empty({static_cast<int64_t>(tensor_bytes + item_bytes)},
                     at::TensorOptions().dtype(at::kByte).device(device()));
  allocation_stream_ = stream;
  auto* table = static_cast<char*>(table_.mutable_data_ptr());
  const auto copy = [&](char* target, const void* source, size_t bytes) {
    const char* error =
        api_.upload(target, source, bytes, device().index(), stream.native_handle());
    TORCH_CHECK(error == nullptr, "adamal_kernels: copying the tensor table to ", device(),
                " failed: ", error);
  };
  copy(table, bucket.tensors, tensor_bytes);
  copy(table + tensor_bytes, bucket.items, item_bytes);
  uploaded_ = true;
}

}  // namespace adamal
