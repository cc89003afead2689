// Sums in the order of formula/norm.h on the CPU: trees of whole vectors, which compilers
// vectorise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "cpu/multiversioned.h"
#include "formula/norm.h"

namespace adamal {

// static: a clone for each vector width is no function that several files can share.
static ADAMAL_MULTIVERSIONED void add_pairs(const double* __restrict values,
                                            double* __restrict sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sums[i] = values[2 * i] + values[2 * i + 1];
}

// Adds `count` values, a power of two, by the tree; both arrays are written.
inline double add_tree(double* values, double* other, int64_t count) {
  for (; count > 1; count /= 2) {
    add_pairs(values, other, count / 2);
    std::swap(values, other);
  }
  return values[0];
}

// The lanes of one row's sum, to which its chunks' sums are added in turn.
class LaneSums {
 public:
  void add(double chunk_sum) {
    double* const lane = lanes_ + chunks_ % kNormLanes;
    *lane = (chunks_ < kNormLanes ? 0.0 : *lane) + chunk_sum;
    ++chunks_;
  }

  // The sum; begins anew. Lanes that no chunk came to are zeros, which change nothing.
  double take() {
    double other[kNormLanes / 2];
    const int64_t used = std::min<int64_t>(chunks_, kNormLanes);
    const int64_t width = power_of_two_from(used);
    std::fill(lanes_ + used, lanes_ + width, 0.0);
    chunks_ = 0;
    return add_tree(lanes_, other, width);
  }

 private:
  double lanes_[kNormLanes];
  int64_t chunks_ = 0;
};

}  // namespace adamal
