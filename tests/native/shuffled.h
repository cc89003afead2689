// The order in which the harness runs what may run in any.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

namespace adamal::harness {

template <typename Int>
std::vector<Int> shuffled(Int count, std::mt19937_64& random) {
  std::vector<Int> order(count);
  std::iota(order.begin(), order.end(), Int(0));
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

}  // namespace adamal::harness
