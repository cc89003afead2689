// The kernels of a step with sets that couple elements, in the order in which they are launched: on
// the device and, for the tests, on the host.
#pragma once

#include <cstdint>

#include "cuda/projection_blocks.h"

namespace adamal {

// Calls launch(kernel, blocks) for the host's scalars; false from it ends that.
template <typename T, typename Launch>
bool store_scalars(const Bucket& bucket, const DeviceTables& tables, DeviceRows<T> scalars,
                   const Launch& launch) {
  LaunchSplitter<T> splitter(bucket, tables.tensors, tables.items);
  StoreScalars<T> kernel;
  kernel.scalars = scalars.rows;
  while (splitter.next(&kernel.params)) {
    kernel.tensor_count = splitter.tensor_count();
    if (!launch(kernel, (kernel.tensor_count + kCudaBlockThreads - 1) / kCudaBlockThreads)) {
      return false;
    }
  }
  return true;
}

// The same for the step by scalars that are there.
template <typename Key, typename T, typename Launch>
bool step_bucket(const Bucket& bucket, const DeviceTables& tables, const SetTables& sets,
                 DeviceRows<T> scalars, const Launch& launch) {
  GradientSplitter<T> splitter(bucket);
  StepBlock<Key> kernel;
  kernel.params.scalars = scalars;
  kernel.sets = sets.entries;
  while (splitter.next(kernel.params.kTensorCapacity)) {
    splitter.fill(tables.tensors, tables.items, &kernel.params);
    if (!launch(kernel, splitter.block_count())) return false;
  }
  return true;
}

// The same for what follows the step, in order. At most `piece_blocks` share the pieces.
// `step_added_some`: whether it was that of step_bucket.
template <typename Types, typename Launch>
bool project_bucket(const TensorEntry* tensors, const SetTables& tables, int64_t piece_blocks,
                    bool step_added_some, const Launch& launch) {
  using T = typename Types::Compute;
  if (tables.tile_count > 0 &&
      !launch(ProjectTile<Types>{tensors, tables.entries, tables.tiles}, tables.tile_count)) {
    return false;
  }
  if (tables.piece_count == 0) return true;
  const LongRows rows{tensors,          tables.entries,     tables.pieces, tables.piece_count,
                      tables.long_rows, tables.is_searching};
  const int64_t over_pieces = min_of(tables.piece_count, piece_blocks);
  const int64_t over_rows = tables.long_row_count;
  if ((tables.has_sizes_to_add || !step_added_some) &&
      !launch(AddSizes<Types>{{rows}, step_added_some}, over_pieces)) {
    return false;
  }
  if (!launch(BeginSearches<T>{rows}, over_rows)) return false;
  for (int32_t round = 0; round < kSearchRounds; ++round) {
    if (!launch(Evaluate<Types>{{rows}, round}, over_pieces)) return false;
    if (!launch(ContinueSearches<T>{{rows}, round}, over_rows)) return false;
  }
  return launch(FinishSearches<Types>{rows}, over_rows) &&
         launch(ProjectPieces<Types>{rows}, over_pieces);
}

}  // namespace adamal
