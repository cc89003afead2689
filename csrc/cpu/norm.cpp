// The sums of squares on the CPU.
#include "formula/norm.h"

#include <algorithm>

#include "cpu/multiversioned.h"
#include "cpu/step.h"
#include "cpu/tree_sum.h"

namespace adamal {
namespace {

template <typename T, typename Grad>
ADAMAL_MULTIVERSIONED void square_all(const Grad* __restrict grad, double* __restrict squares,
                                      int64_t count) {
  for (int64_t i = 0; i < count; ++i) squares[i] = square_of<T>(grad[i]);
}

template <typename T, typename Grad>
double chunk_sum(const Grad* grad, int64_t count) {
  double values[kNormChunk<T>], other[kNormChunk<T> / 2];
  const int64_t width = power_of_two_from(count);
  square_all<T>(grad, values, count);
  std::fill(values + count, values + width, 0.0);
  return add_tree(values, other, width);
}

template <typename T, typename Grad>
void item_sums(const Bucket& bucket, int64_t first_item, int64_t last_item, double* sums) {
  for (int64_t i = first_item; i < last_item; ++i) {
    const WorkItem item = bucket.items[i];
    const auto* grad = static_cast<const Grad*>(bucket.grads[item.tensor]);
    double* const of_item = sums + i * kNormChunksPerItem;
    std::fill(of_item, of_item + kNormChunksPerItem, 0.0);
    if (grad == nullptr) continue;
    const int64_t first = item.chunk * kCpuChunk;
    const int64_t last = std::min(first + kCpuChunk, bucket.tensors[item.tensor].numel);
    for (int64_t at = first; at < last; at += kNormChunk<T>) {
      const int64_t count = std::min<int64_t>(kNormChunk<T>, last - at);
      of_item[(at - first) / kNormChunk<T>] = chunk_sum<T>(grad + at, count);
    }
  }
}

}  // namespace

void squared_norm_items_cpu(const Bucket& bucket, int64_t first_item, int64_t last_item,
                            double* chunk_sums) {
  dispatch(bucket, [&](auto kernel) {
    using Kernel = decltype(kernel);
    item_sums<typename Kernel::Compute, typename Kernel::Grad>(bucket, first_item, last_item,
                                                               chunk_sums);
  });
}

void squared_norm_tensors_cpu(const Bucket& bucket, const double* chunk_sums, double* sums) {
  // An item of float64 has as many chunks as there is room for; one of float32 half of them.
  const int64_t used = kFormats[bucket.format].compute() == Dtype::float64 ? kNormChunksPerItem
                                                                           : kNormChunksPerItem / 2;
  std::fill(sums, sums + bucket.tensor_count, 0.0);
  for (int64_t i = 0; i < bucket.item_count;) {
    const uint32_t tensor = bucket.items[i].tensor;
    double lanes[kNormLanes] = {}, other[kNormLanes / 2];
    int64_t chunk = 0;
    for (; i < bucket.item_count && bucket.items[i].tensor == tensor; ++i) {
      for (int64_t j = 0; j < used; ++j, ++chunk) {
        lanes[chunk % kNormLanes] += chunk_sums[i * kNormChunksPerItem + j];
      }
    }
    sums[tensor] = add_tree(lanes, other, kNormLanes);
  }
}

}  // namespace adamal
