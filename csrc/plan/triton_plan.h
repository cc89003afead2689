// The plan whose kernels Python launches: one call a step, whatever the number of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "plan/plan.h"

namespace adamal {

// Steps through an adamal_kernels.backends.triton.launcher.Launcher. It is handed the tables when
// they change, and in every step the gradients' addresses and rows, and the scalars or what the
// device derives them from, as one buffer.
// The twin of adamal_kernels.backends.triton.plan.PythonPlan.
class TritonPlan : public Plan {
 public:
  TritonPlan(int format, SecondMoment second_moment, c10::Device device, int64_t block,
             pybind11::object launcher)
      : Plan(format, second_moment, device, block), launcher_(std::move(launcher)) {}

 private:
  bool can_project() const override { return true; }
  void on_bound() override { handed_over_ = false; }
  void launch(const Bucket& bucket) override;
  at::Tensor launch_squared_norm(const Bucket& bucket) override;
  // Finds out which tensors may take wide accesses; whether that differs from the last step.
  bool update_alignment(const Bucket& bucket);
  void hand_over_changes(const Bucket& bucket);
  void hand_over(const Bucket& bucket);
  at::Tensor pack(const Bucket& bucket) const;

  pybind11::object launcher_;
  std::vector<bool> aligned_;  // by tensor: all of its streams start at multiples of 16 bytes
  bool handed_over_ = false;
};

}  // namespace adamal
