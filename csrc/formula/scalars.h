// Scalars derived where the step runs, from counts and options that the host does not wait for.
#pragma once

#include <cstdint>

#include "formula/element.h"

namespace adamal {

// A group's options, of which some lie in memory of the step's device.
struct DeviceOptions {
  struct Address {
    const void* number;  // null: the number is in `options`
    bool is_float64;     // else float32
  };

  StepOptions options;
  Address lr;
  Address beta1;
  Address beta2;

  ADAMAL_HD StepOptions read() const {
    StepOptions found = options;
    found.lr = read(lr, found.lr);
    found.beta1 = read(beta1, found.beta1);
    found.beta2 = read(beta2, found.beta2);
    return found;
  }

 private:
  ADAMAL_HD static double read(Address address, double otherwise) {
    if (address.number == nullptr) return otherwise;
    return address.is_float64 ? *static_cast<const double*>(address.number)
                              : double(*static_cast<const float*>(address.number));
  }
};

// Derives a tensor's scalars for its next step and counts that step; false, and nothing changed,
// where the step is skipped.
template <typename T>
ADAMAL_HD inline bool derive_and_count(const DeviceOptions& options, const StepInputs& inputs,
                                       float* count, StepScalars<T>* row) {
  const GradientFactor found = gradient_factor(inputs);
  if (found.skip) return false;
  const int64_t step = static_cast<int64_t>(*count) + 1;
  *row = StepScalars<T>(derive_step_scalars(step, options.read(), found.factor));
  *count = static_cast<float>(step);
  return true;
}

// What the steps of a bucket's tensors derive their scalars from.
struct DeviceScalars {
  const DeviceOptions* options;  // host memory; tensor i has options[rows[i]]
  int64_t option_count;
  float* counts;  // of each tensor: the steps it has taken
  StepInputs inputs;
  int64_t* skipped_steps;  // null: counted elsewhere
};

}  // namespace adamal
