// A step on the CPU, shared out as threads might share it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/step.h"
#include "owned_bucket.h"
#include "shuffled.h"

namespace adamal::harness {

// Random ranges of items, in random order.
inline void run_step_cpu(OwnedBucket& bucket) {
  std::mt19937_64 random(bucket.seed);
  std::vector<int64_t> ends{0};
  while (ends.back() < bucket.view.item_count) {
    ends.push_back(std::min<int64_t>(bucket.view.item_count, ends.back() + 1 + random() % 4));
  }
  for (const int64_t i : shuffled(static_cast<int64_t>(ends.size()) - 1, random)) {
    step_cpu(bucket.view, ends[i], ends[i + 1]);
  }
}

}  // namespace adamal::harness
