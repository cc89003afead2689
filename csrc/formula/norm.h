// The sum of squares of gradients, in the one order of adamal_kernels/core/norm.py.
//
// A tensor's squares are cut into chunks, each added by a binary tree of neighbours; lanes add the
// chunks' sums in turn, and the same tree adds the lanes. Zeros past an end change no sum.
#pragma once

#include <cstdint>

#include "formula/element.h"
#include "formula/storage.h"

namespace adamal {

// Elements the innermost tree adds: those of a CUDA work item.
template <typename T>
inline constexpr int kNormChunk = 8192 / int(sizeof(T));
inline constexpr int kNormLanes = 256;

inline int64_t power_of_two_from(int64_t count) {
  int64_t power = 1;
  while (power < count) power *= 2;
  return power;
}

// A gradient's square in float64; T is the compute type.
template <typename T, typename Grad>
ADAMAL_HD inline double square_of(Grad grad) {
  const double value = static_cast<T>(decode(grad));
  return value * value;
}

}  // namespace adamal
