// The plan whose steps run on the CPU.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <vector>

#include "cpu/projection.h"
#include "cpu/step.h"
#include "plan/plan.h"

namespace adamal {

// Steps over torch's CPU threads.
class CpuPlan : public Plan {
 public:
  CpuPlan(int format, SecondMoment second_moment)
      : Plan(format, second_moment, c10::Device(c10::kCPU), kCpuChunk) {}

 private:
  bool can_project() const override { return true; }
  void on_bound() override;
  void launch(const Bucket& bucket) override;
  void launch_by_rows(Bucket bucket);
  at::Tensor launch_squared_norm(const Bucket& bucket) override;

  std::vector<int64_t> cost_before_;  // of item i: that of all items before it
  int64_t bytes_ = 0;                 // of all that a step reads
  ProjectedStep projected_;           // of a bucket with sets
};

}  // namespace adamal
