#include "plan/plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>

namespace adamal {
namespace {

// A thread's least share, about 0.1 ms: less is done before another thread, on a busy machine, has
// so much as begun.
constexpr int64_t kParallelElements = 262144;
// The same where the others have just worked, and wait for more.
constexpr int64_t kParallelElementsAwake = 32768;
// A thread's part of the last cache is less on most processors; what they say it is cannot be
// relied on in virtual machines.
constexpr int64_t kCachedBytes = 16 << 20;
// What a work item costs besides its elements, in elements: look-ups and the loop's ends.
constexpr int64_t kItemOverhead = 64;

// Calls body(first, last) for shares of pieces of work, on torch's CPU threads. They are shared out
// by cost, not by pieces: a ragged bucket would keep one thread waiting.
template <typename Body>
void for_shares(const std::vector<int64_t>& cost_before, const Body& body,
                int64_t least = kParallelElements) {
  const auto count = static_cast<int64_t>(cost_before.size()) - 1;
  at::parallel_for(0, cost_before.back(), least, [&](int64_t first, int64_t last) {
    const auto piece_at = [&](int64_t cost) {
      return std::lower_bound(cost_before.begin(), cost_before.end(), cost) - cost_before.begin();
    };
    body(piece_at(first), std::min<int64_t>(piece_at(last), count));
  });
}

int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 8;
    case Dtype::float32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
      break;
  }
  return 2;
}

void check_sets(const std::vector<TensorEntry>& tensors, const std::vector<CoupledRows>& sets) {
  TORCH_CHECK(sets.size() == tensors.size(), "a bucket of ", tensors.size(), " parameters has ",
              sets.size(), " sets");
  for (size_t i = 0; i < sets.size(); ++i) {
    TORCH_CHECK(covers(sets[i], tensors[i].numel), "the ", sets[i].rows, " rows of ",
                sets[i].length, " elements of a set do not make up the ", tensors[i].numel,
                " elements of parameter ", i);
    TORCH_CHECK(tensors[i].multipliers() != nullptr || tensors[i].numel == 0, "parameter ", i,
                " has a set and no multipliers");
  }
}

// Enqueues a copy to the beginning of device memory, on its device's current stream.
void copy_staged(const std::vector<char>& image, const at::Tensor& memory) {
  const auto bytes = static_cast<int64_t>(image.size());
  at::Tensor staged = empty_host({bytes}, at::kByte, memory.device());
  std::memcpy(staged.mutable_data_ptr(), image.data(), image.size());
  memory.narrow(0, 0, bytes).copy_(staged, /*non_blocking=*/true);
}

}  // namespace

at::Tensor empty_host(at::IntArrayRef sizes, at::ScalarType type, c10::Device device) {
  return at::empty(sizes, at::TensorOptions().dtype(type).pinned_memory(!device.is_cpu()));
}

void Plan::bind(const std::vector<TensorEntry>& tensors, const std::vector<CoupledRows>& sets,
                const std::vector<at::Tensor>& records) {
  std::vector<ItemRecord*> record_addresses;
  for (size_t i = 0; i < records.size(); ++i) {
    TORCH_CHECK(
        records.size() == tensors.size() && records[i].scalar_type() == at::kLong &&
            records[i].device() == device_ && records[i].is_contiguous() &&
            records[i].numel() == (tensors[i].numel + chunk_ - 1) / chunk_ * kItemRecordWords,
        "records must be int64, ", kItemRecordWords, " a work item, on ", device_);
    record_addresses.push_back(static_cast<ItemRecord*>(records[i].mutable_data_ptr()));
  }
  if (tensors == tensors_ && sets == sets_ && record_addresses == record_addresses_) return;
  if (!sets.empty()) {
    TORCH_CHECK(can_project(),
                "projection: this backend has no kernels for sets that couple elements; use "
                "backend='foreach'");
    check_sets(tensors, sets);
  }
  records_ = records;
  record_addresses_ = record_addresses;
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
  sets_ = sets;
  on_bound();
}

Bucket Plan::bucket_of(const std::vector<const void*>& grads, const uint32_t* rows) const {
  return {pair_,
          second_moment_,
          tensors_.data(),
          static_cast<int64_t>(tensors_.size()),
          items_.data(),
          static_cast<int64_t>(items_.size()),
          grads.data(),
          rows,
          nullptr,
          0,
          nullptr,
          sets_.empty() ? nullptr : sets_.data(),
          record_addresses_.empty() ? nullptr : record_addresses_.data()};
}

void Plan::step(const std::vector<const void*>& grads, const std::vector<uint32_t>& rows,
                const StepScalars<double>* scalars, int64_t scalar_count, bool threads_are_awake) {
  if (items_.empty()) return;
  Bucket bucket = bucket_of(grads, rows.data());
  bucket.scalars = scalars;
  bucket.scalar_count = scalar_count;
  bucket.threads_are_awake = threads_are_awake;
  launch(bucket);
}

void Plan::step(const std::vector<const void*>& grads, const std::vector<uint32_t>& rows,
                const DeviceScalars& device_scalars) {
  Bucket bucket = bucket_of(grads, rows.data());
  bucket.device = &device_scalars;
  launch(bucket);
}

at::Tensor Plan::squared_norm(const std::vector<const void*>& grads) {
  if (items_.empty()) {
    return at::zeros({}, at::TensorOptions().dtype(at::kDouble).device(device_));
  }
  return launch_squared_norm(bucket_of(grads, nullptr));
}

void CpuPlan::on_bound() {
  cost_before_.resize(items().size() + 1);
  cost_before_[0] = 0;
  const int64_t moments = second_moment() == SecondMoment::amsgrad ? 3 : 2;
  const int64_t element_bytes = bytes_of(dtypes().param) + bytes_of(dtypes().grad) +
                                moments * std::max<int64_t>(4, bytes_of(dtypes().param));
  bytes_ = 0;
  for (const TensorEntry& tensor : tensors()) bytes_ += tensor.numel * element_bytes;
  for (size_t i = 0; i < items().size(); ++i) {
    const int64_t left = tensors()[items()[i].tensor].numel - items()[i].chunk * kCpuChunk;
    cost_before_[i + 1] = cost_before_[i] + std::min(kCpuChunk, left) + kItemOverhead;
  }
  if (!sets().empty()) projected_.bind(tensors(), sets(), dtypes().param);
}

void CpuPlan::launch(const Bucket& bucket) {
  if (bucket.device == nullptr) {
    launch_by_rows(bucket);
    return;
  }
  // The twin of the CUDA step's first kernel.
  const DeviceScalars& device = *bucket.device;
  if (gradient_factor(device.inputs).skip) {
    if (device.skipped_steps != nullptr) ++*device.skipped_steps;
    return;
  }
  std::vector<StepScalars<double>> scalars(bucket.tensor_count);
  std::vector<uint32_t> rows(bucket.tensor_count);
  for (int64_t i = 0; i < bucket.tensor_count; ++i) {
    if (bucket.grads[i] == nullptr) continue;
    rows[i] = static_cast<uint32_t>(i);
    derive_and_count(device.options[bucket.rows[i]], device.inputs, device.counts + i, &scalars[i]);
  }
  Bucket by_rows = bucket;
  by_rows.rows = rows.data();
  by_rows.scalars = scalars.data();
  by_rows.scalar_count = bucket.tensor_count;
  by_rows.device = nullptr;
  launch_by_rows(by_rows);
}

void CpuPlan::launch_by_rows(Bucket bucket) {
  // A projection reads again what the step has just written.
  bucket.exceeds_caches = bucket.sets == nullptr && bytes_ > kCachedBytes * at::get_num_threads();
  const auto step_items = [&] {
    for_shares(
        cost_before_, [&](int64_t first, int64_t last) { step_cpu(bucket, first, last); },
        bucket.threads_are_awake ? kParallelElementsAwake : kParallelElements);
  };
  if (bucket.sets != nullptr) {
    if (bucket.records != nullptr) step_items();
    projected_.step(bucket, [](const std::vector<int64_t>& cost_before,
                               const ProjectedStep::Body& body) { for_shares(cost_before, body); });
    return;
  }
  step_items();
}

at::Tensor CpuPlan::launch_squared_norm(const Bucket& bucket) {
  std::vector<double> chunk_sums(bucket.item_count * kNormChunksPerItem);
  for_shares(cost_before_, [&](int64_t first, int64_t last) {
    squared_norm_items_cpu(bucket, first, last, chunk_sums.data());
  });
  std::vector<double> sums(bucket.tensor_count);
  squared_norm_tensors_cpu(bucket, chunk_sums.data(), sums.data());
  double total = 0;
  for (const double sum : sums) total += sum;
  return at::scalar_tensor(total, at::TensorOptions().dtype(at::kDouble));
}

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
