// What the scalars of a step are derived from, read from the harness's input.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "formula/scalars.h"
#include "owned_bucket.h"

namespace adamal::harness {

struct OwnedDevice {
  DeviceScalars view;
  bool is_small;
  std::vector<DeviceOptions> options;
  std::vector<double> numbers;  // that addresses point to
  std::vector<float> counts;
  float grad_scale, found_inf;
  std::vector<double> norms;
  int64_t skipped_steps = 0;

  OwnedDevice(Input& input, int64_t tensor_count)
      : is_small(input.integer() != 0), options(input.integer()) {
    numbers.reserve(3 * options.size());
    for (DeviceOptions& o : options) {
      const auto number = input.array<double>(7);
      const auto flag = input.array<int64_t>(4);
      o.options = {number[0], number[1], number[2],    number[3],    number[4],
                   number[5], number[6], flag[0] != 0, flag[1] != 0, flag[2] != 0};
      if (flag[3] == 0) continue;
      for (auto [address, value] :
           {std::pair{&o.lr, &o.options.lr}, std::pair{&o.beta1, &o.options.beta1},
            std::pair{&o.beta2, &o.options.beta2}}) {
        numbers.push_back(std::exchange(*value, -1.0));
        *address = {&numbers.back(), true};
      }
    }
    counts = input.array<float>(tensor_count);
    const auto given = input.array<int64_t>(3);
    grad_scale = input.array<float>(1)[0];
    found_inf = input.array<float>(1)[0];
    norms = input.array<double>(2);
    view = {options.data(),
            static_cast<int64_t>(options.size()),
            counts.data(),
            {given[0] ? &grad_scale : nullptr, given[1] ? &found_inf : nullptr,
             given[2] ? &norms[0] : nullptr, norms[1]},
            &skipped_steps};
  }
  OwnedDevice(const OwnedDevice&) = delete;
  OwnedDevice& operator=(const OwnedDevice&) = delete;

  void write(Output& output) {
    output.array(counts);
    output.integer(skipped_steps);
  }
};

}  // namespace adamal::harness
