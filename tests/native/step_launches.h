// A launch of the CUDA step, its blocks and threads one after another.
#pragma once

#include <cstdint>
#include <memory>
#include <random>

#include "cuda/step.h"
#include "cuda/walk.h"
#include "shuffled.h"

namespace adamal::harness {

template <typename Key, typename Params>
void run_launch(const Params& params, int64_t block_count, std::mt19937_64& random) {
  // A copy of exactly the launch's size, as the device would get it.
  const auto copy = std::make_unique<Params>(params);
  for (const int64_t block : shuffled(block_count, random)) {
    for (const int thread : shuffled(kCudaBlockThreads, random)) {
      step_block<Key>(*copy, block, thread);
    }
  }
}

}  // namespace adamal::harness
