// A plan: a bucket of tensors bound once, compared on every step, bound anew where it changed.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <vector>

#include "formula/bucket.h"
#include "formula/dtypes.h"
#include "formula/rows.h"

namespace adamal {

// Host memory from which a copy to `device` need not wait for it. A block of pinned memory is not
// handed out again by torch before the copies out of it have run. Pageable memory may be read after
// the call too, where the device reads it by itself and the driver stages nothing.
at::Tensor empty_host(at::IntArrayRef sizes, at::ScalarType type, c10::Device device);

// The table of a bucket's tensors and its work items, on one device.
class Plan {
 public:
  // `chunk` is the number of elements a work item covers.
  Plan(int format, SecondMoment second_moment, c10::Device device, int64_t chunk)
      : format_(format), second_moment_(second_moment), device_(device), chunk_(chunk) {}
  virtual ~Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // Binds the tensors of the next steps. What is compared with the last binding is what kernels
  // read, addresses and sizes: a table that compares equal is right whoever owns the tensors now.
  // `sets` has an entry for every tensor, or none. `records` are those of each tensor's items,
  // which are kept; empty: steps are not watched.
  void bind(const std::vector<TensorEntry>& tensors, const std::vector<CoupledRows>& sets = {},
            const std::vector<at::Tensor>& records = {});

  // Steps the bound tensors: tensor i by scalars[rows[i]], or not at all where grads[i] is null.
  // Where torch's CPU threads are known to be awake, they share what is not worth waking them.
  void step(const std::vector<const void*>& grads, const std::vector<uint32_t>& rows,
            const StepScalars<double>* scalars, int64_t scalar_count,
            bool threads_are_awake = false);
  // The same by scalars derived on the device, which then counts the step.
  void step(const std::vector<const void*>& grads, const std::vector<uint32_t>& rows,
            const DeviceScalars& device_scalars);
  // The gradients' sum of squares, those of tensors added one after another: a float64 scalar on
  // the device.
  at::Tensor squared_norm(const std::vector<const void*>& grads);

  // Makes ready what the next step needs besides its gradients: a step captured in a CUDA graph
  // may copy nothing.
  virtual void prepare() {}

  int64_t chunk() const { return chunk_; }
  Format format() const { return kFormats[format_]; }
  SecondMoment second_moment() const { return second_moment_; }
  c10::Device device() const { return device_; }
  const std::vector<TensorEntry>& tensors() const { return tensors_; }

 protected:
  const std::vector<CoupledRows>& sets() const { return sets_; }
  const std::vector<WorkItem>& items() const { return items_; }
  const std::vector<at::Tensor>& records() const { return records_; }
  Bucket bucket_of(const std::vector<const void*>& grads, const uint32_t* rows) const;

 private:
  // Whether the plan can step tensors whose sets couple elements.
  virtual bool can_project() const { return false; }
  virtual void on_bound() = 0;
  virtual void launch(const Bucket& bucket) = 0;
  virtual at::Tensor launch_squared_norm(const Bucket& bucket) = 0;

  int format_;
  SecondMoment second_moment_;
  c10::Device device_;
  int64_t chunk_;
  std::vector<TensorEntry> tensors_;
  std::vector<CoupledRows> sets_;
  std::vector<WorkItem> items_;
  std::vector<at::Tensor> records_;
  std::vector<ItemRecord*> record_addresses_;
};

}  // namespace adamal
