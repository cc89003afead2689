#include "plan/cuda_plan.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <cstring>

namespace adamal {
namespace {

// Enqueues a copy to the beginning of device memory, on its device's current stream.
void copy_staged(const std::vector<char>& image, const at::Tensor& memory) {
  const auto bytes = static_cast<int64_t>(image.size());
  at::Tensor staged = empty_host({bytes}, at::kByte, memory.device());
  std::memcpy(staged.mutable_data_ptr(), image.data(), image.size());
  memory.narrow(0, 0, bytes).copy_(staged, /*non_blocking=*/true);
}

}  // namespace

void CudaPlan::launch(const Bucket& bucket) {
  const c10::DeviceGuard guard(device());
  const c10::Stream stream = prepared_stream(bucket);
  void* rows = nullptr;
  if (bucket.device != nullptr) {
    if (stream != *allocation_stream_) rows_.record_stream(stream);
    rows = rows_.mutable_data_ptr();
  }
  const DeviceTables tables = tables_of(bucket);
  void* const on = stream.native_handle();
  const auto step = bucket.records == nullptr ? api_.step : api_.watched_step;
  check(set_memory_.defined() ? api_.step_and_project(bucket, tables, set_tables_, on)
                              : step(bucket, tables, rows, on),
        "the step's launch");
}

at::Tensor CudaPlan::launch_squared_norm(const Bucket& bucket) {
  const c10::DeviceGuard guard(device());
  const c10::Stream stream = prepared_stream(bucket);
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device());
  const at::Tensor scratch = at::empty({bucket.item_count + bucket.tensor_count}, options);
  at::Tensor total = at::empty({}, options);
  check(api_.squared_norm(bucket, tables_of(bucket), scratch.mutable_data_ptr<double>(),
                          total.mutable_data_ptr<double>(), stream.native_handle()),
        "the norm's launch");
  return total;
}

void CudaPlan::prepare() {
  const std::vector<const void*> no_grads(tensors().size());
  prepared_stream(bucket_of(no_grads, nullptr));
}

c10::Stream CudaPlan::prepared_stream(const Bucket& bucket) {
  const c10::Stream stream = c10::impl::VirtualGuardImpl(device().type()).getStream(device());
  if (!uploaded_) {
    // A graph would read the staged memory again in every replay, when others write there.
    TORCH_CHECK(!api_.is_capturing(stream.native_handle()),
                "adamal_kernels: a CUDA graph is being captured on ", device(),
                " and the parameters or their state are not those of the last step: take a step "
                "outside the graph first");
    upload(bucket);
    allocation_stream_ = stream;
    uploaded_ = true;
  }
  // Freed memory is handed out again on the stream it was allocated on.
  if (stream != *allocation_stream_) {
    table_.record_stream(stream);
    for (const at::Tensor& records : this->records()) records.record_stream(stream);
    if (set_memory_.defined()) set_memory_.record_stream(stream);
  }
  return stream;
}

void CudaPlan::check(const char* error, const char* what) const {
  TORCH_CHECK(error == nullptr, "adamal_kernels: ", what, " on ", device(), " failed: ", error);
}

at::Tensor CudaPlan::bytes_on_device(int64_t bytes) const {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device()));
}

DeviceTables CudaPlan::tables_of(const Bucket& bucket) const {
  const auto* tensors = static_cast<const TensorEntry*>(table_.const_data_ptr());
  const auto* items = reinterpret_cast<const WorkItem*>(tensors + bucket.tensor_count);
  const auto* first_items = reinterpret_cast<const int64_t*>(items + bucket.item_count);
  const auto* records = reinterpret_cast<ItemRecord* const*>(first_items + bucket.tensor_count);
  return {tensors, items, first_items, bucket.records == nullptr ? nullptr : records};
}

void CudaPlan::upload(const Bucket& bucket) {
  std::vector<int64_t> first_items(bucket.tensor_count);
  for (int64_t i = bucket.item_count - 1; i >= 0; --i) first_items[bucket.items[i].tensor] = i;
  std::vector<char> image;
  const auto append = [&](const auto* table, int64_t count) {
    const auto* const bytes = reinterpret_cast<const char*>(table);
    image.insert(image.end(), bytes, bytes + count * sizeof(*table));
  };
  append(bucket.tensors, bucket.tensor_count);
  append(bucket.items, bucket.item_count);
  append(first_items.data(), bucket.tensor_count);
  if (bucket.records != nullptr) append(bucket.records, bucket.tensor_count);
  table_ = bytes_on_device(static_cast<int64_t>(image.size()));
  rows_ = bytes_on_device(api_.rows_bytes(bucket));
  copy_staged(image, table_);
  set_memory_.reset();
  if (bucket.sets != nullptr) upload_sets(bucket);
}

void CudaPlan::upload_sets(const Bucket& bucket) {
  const SetWork work(bucket);
  at::Tensor memory = bytes_on_device(work.bytes());
  auto* const base = static_cast<char*>(memory.mutable_data_ptr());
  copy_staged(work.image_for(base), memory);
  set_tables_ = work.tables_at(base);
  set_memory_ = memory;
}

}  // namespace adamal
