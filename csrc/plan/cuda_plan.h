// The plan whose steps the CUDA module launches.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/Stream.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/api.h"
#include "cuda/set_tables.h"
#include "cuda/step.h"
#include "plan/plan.h"

namespace adamal {

// Steps on the device's current stream. A copy of the tables is kept on the device.
class CudaPlan : public Plan {
 public:
  CudaPlan(int format, SecondMoment second_moment, c10::Device device, const CudaApi& api)
      : Plan(format, second_moment, device, cuda_chunk(format)), api_(api) {}

 private:
  bool can_project() const override { return true; }
  void on_bound() override { uploaded_ = false; }
  void launch(const Bucket& bucket) override;
  at::Tensor launch_squared_norm(const Bucket& bucket) override;
  void prepare() override;
  // Copies the tables where they changed; returns the stream to launch on.
  c10::Stream prepared_stream(const Bucket& bucket);
  void upload(const Bucket& bucket);
  void upload_sets(const Bucket& bucket);
  at::Tensor bytes_on_device(int64_t bytes) const;
  DeviceTables tables_of(const Bucket& bucket) const;
  void check(const char* error, const char* what) const;

  CudaApi api_;
  bool uploaded_ = false;
  // Bytes: the tensor entries, the work items, each tensor's first item and its records.
  at::Tensor table_;
  at::Tensor rows_;        // bytes: the scalars that the device derived
  at::Tensor set_memory_;  // bytes: that of set_tables.h; undefined where no set couples elements
  SetTables set_tables_{};
  std::optional<c10::Stream> allocation_stream_;
};

}  // namespace adamal
