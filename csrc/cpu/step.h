// One step of one bucket on the CPU.
#pragma once

#include <cstdint>

#include "formula/bucket.h"

namespace adamal {

// Elements a work item covers on the CPU: a chunk's streams stay within a core's L2 cache and leave
// enough items to balance.
inline constexpr int64_t kCpuChunk = 16384;

// Steps the work items [first_item, last_item), serially; disjoint ranges may run in parallel.
void step_cpu(const Bucket& bucket, int64_t first_item, int64_t last_item);

// Steps elements [first, first + count) of one tensor; does not project.
void step_elements_cpu(const Bucket& bucket, uint32_t tensor, int64_t first, int64_t count);

// The squares of the gradients of work items [first_item, last_item), added up by chunk:
// kNormChunksPerItem sums an item, 0 where there is nothing. Disjoint ranges may run in parallel.
inline constexpr int64_t kNormChunksPerItem = kCpuChunk / 1024;
void squared_norm_items_cpu(const Bucket& bucket, int64_t first_item, int64_t last_item,
                            double* chunk_sums);

// Adds them up by tensor, 0 for those without elements or gradient.
void squared_norm_tensors_cpu(const Bucket& bucket, const double* chunk_sums, double* sums);

}  // namespace adamal
