// What threads of the CUDA norm do of its sum, in the order of formula/norm.h.
#pragma once

#include <cstdint>

#include "cuda/step.h"
#include "cuda/walk.h"
#include "formula/element.h"
#include "formula/norm.h"

namespace adamal {

// What a thread of the CUDA norm adds by itself before it meets the others: the elements of one
// 16-byte access, a subtree of the chunk's. Threads share `leaves` and wait for one another before
// every level of the rest.
template <typename T, typename Grad>
struct NormTree {
  static constexpr int kWidth = kAccessBytes / int(sizeof(Grad));
  static constexpr int kLeaves = kNormChunk<T> / kWidth;
  static_assert(kLeaves % kCudaBlockThreads == 0);

  // Writes a thread's leaves; `count` of the chunk's elements exist.
  ADAMAL_HD static ADAMAL_INLINE void add_leaves(const Grad* grad, int count, int thread,
                                                 double* leaves) {
    constexpr int kOfThread = kLeaves / kCudaBlockThreads;
    const bool whole =
        count == kNormChunk<T> && reinterpret_cast<uintptr_t>(grad) % kAccessBytes == 0;
    Pack<Grad, kWidth> packs[kOfThread];
    ADAMAL_UNROLL
    for (int i = 0; i < kOfThread; ++i) {
      const int first = (thread + i * kCudaBlockThreads) * kWidth;
      if (whole) {
        packs[i].load(grad + first);
        continue;
      }
      ADAMAL_UNROLL
      for (int j = 0; j < kWidth; ++j) {
        packs[i].lane[j] = first + j < count ? grad[first + j] : Grad{};
      }
    }
    ADAMAL_UNROLL
    for (int i = 0; i < kOfThread; ++i) {
      double values[kWidth];
      ADAMAL_UNROLL
      for (int j = 0; j < kWidth; ++j) values[j] = square_of<T>(packs[i].lane[j]);
      ADAMAL_UNROLL
      for (int width = kWidth / 2; width > 0; width /= 2) {
        ADAMAL_UNROLL
        for (int j = 0; j < width; ++j) values[j] = values[2 * j] + values[2 * j + 1];
      }
      leaves[thread + i * kCudaBlockThreads] = values[0];
    }
  }
};

// A thread's part of one level of a tree over `count` values, `stride` apart.
template <typename Value>
ADAMAL_HD inline void add_level(Value* values, int count, int stride, int thread) {
  for (int i = thread * 2 * stride; i + stride < count; i += kCudaBlockThreads * 2 * stride) {
    values[i] = values[i] + values[i + stride];
  }
}

// A lane's sum of the chunks of one tensor.
ADAMAL_HD inline double add_lane(const double* chunk_sums, int64_t chunks, int lane) {
  double sum = 0;
  for (int64_t i = lane; i < chunks; i += kNormLanes) sum = sum + chunk_sums[i];
  return sum;
}

}  // namespace adamal
