#include "plan/plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

namespace adamal {
namespace {

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
  return {format_,
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

}  // namespace adamal
