// The CUDA projections onto sets that couple elements: what a block of each kernel does, on the
// device and, for the tests, on the host.
//
// A block's threads go together from phase to phase, and keep in shared memory what outlives one.
// Within a phase any order of threads gives the same result, and within a kernel any order of
// blocks: none waits for another, kernels follow one another in the stream, and sums are those of
// formula/norm.h. A kernel that finds nothing to do returns.
#pragma once

#include <cstdint>

#include "cuda/launches.h"
#include "cuda/set_tables.h"
#include "cuda/step.h"
#include "cuda/stepped_row.h"
#include "cuda/walk.h"
#include "formula/bucket.h"
#include "formula/sets.h"

namespace adamal {

// Leaves the host's scalars where those that the device derives would be: a thread a tensor.
template <typename T>
struct StoreScalars {
  static constexpr int kResident = 1;
  struct Shared {};

  SmallLaunchParams<T> params;
  int32_t tensor_count;
  StepScalars<T>* scalars;  // of each tensor

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared&) const {
    block.phase([&](int thread) {
      const int64_t slot = block.index() * kCudaBlockThreads + thread;
      if (slot >= tensor_count || params.grads[slot] == nullptr) return;
      scalars[params.first_tensor + slot] = params.scalars_of(uint32_t(slot));
    });
  }
};

// The step of a bucket with sets, a block a work item. It adds the sizes of what it has stored of a
// long row, still in cache.
template <typename Key>
struct StepBlock {
  using T = typename Key::Compute;
  static_assert(kNormChunk<T> == kCudaChunk<T>);
  static constexpr int kResident = kStepResidentBlocks<Key>;
  struct Shared {
    double leaves[kCudaBlockThreads];
  };

  SmallDeviceLaunchParams<T> params;
  const SetEntry* sets;

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared& shared) const {
    const int64_t index = block.index();
    block.phase([&](int thread) { step_block<Key>(params, index, thread); });
    const WorkItem item = params.items[index];
    const SetEntry& entry = sets[item.tensor];
    // Zeros where nothing was stepped, too.
    if (!entry.sizes_come_with_step || !projects(scalars_of<T>(entry))) return;
    block.phase([&](int thread) {
      const SteppedRow<typename Key::Rows> row(entry.rows, params.tensors[item.tensor], 0);
      const int64_t first = item.chunk * kCudaChunk<T> + thread * kPieceLeaf<T>;
      shared.leaves[thread] = row.template size_of_leaf<kPieceLeaf<T>>(first);
    });
    add_leaves(block, shared.leaves, 1, kCudaBlockThreads);
    block.phase([&](int thread) {
      if (thread == 0) entry.sums[item.chunk].first = shared.leaves[0];
    });
  }
};

// Projects a tile of short rows, from the sizes to the stores.
template <typename Types>
struct ProjectTile {
  using T = typename Types::Compute;
  static constexpr int kResident = 1;
  struct Shared {
    SetTerms leaves[kTileLeaves];
    RowSearch searches[kCudaBlockThreads];
    int32_t last_round;  // in which a row was still searching
  };

  const TensorEntry* tensors;
  const SetEntry* sets;
  const WorkItem* tiles;

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared& shared) const {
    const WorkItem item = tiles[block.index()];
    const SetEntry& entry = sets[item.tensor];
    const CoupledRows& rows = entry.rows;
    const RowTile tile = entry.tile;
    const StepScalars<T> scalars = scalars_of<T>(entry);
    if (!projects(scalars)) return;
    const TensorEntry& tensor = tensors[item.tensor];
    const int64_t first_row = int64_t(item.chunk) * tile.rows;
    const int row_count = int(min_of(rows.rows - first_row, int64_t(tile.rows)));
    double* const multipliers = tensor.multipliers() + first_row;

    // Calls body(row, place, first element) for a thread's leaves; a row's number is the tile's.
    const auto for_leaves = [&](int thread, const auto& body) {
      const int row = tile.row_of(thread);
      const int lane = tile.lane_of(thread);
      if (row >= row_count || lane >= tile.lanes) return;
      const SteppedRow<Types> stepped(rows, tensor, first_row + row);
      for (int leaf = lane; leaf < tile.leaves; leaf += tile.lanes) {
        body(stepped, row, row * tile.leaves + leaf, int64_t(leaf) * kTileLeaf);
      }
    };

    block.phase([&](int thread) {
      if (thread == 0) shared.last_round = 0;
      for_leaves(thread, [&](const auto& stepped, int, int place, int64_t first) {
        shared.leaves[place] = {stepped.template size_of_leaf<kTileLeaf>(first), 0};
      });
    });
    add_leaves(block, shared.leaves, row_count, tile.leaves);
    block.phase([&](int row) {
      if (row >= row_count) return;
      const double size_sum = shared.leaves[row * tile.leaves].first;
      shared.searches[row] = begin_search(rows.set, size_sum, multipliers[row]);
      if (shared.searches[row].state == SearchState::searching) shared.last_round = 1;
    });
    // A thread is a phase behind the others at most: what it reads here changes after the next.
    for (int32_t round = 1; shared.last_round == round; ++round) {
      block.phase([&](int thread) {
        for_leaves(thread, [&](const auto& stepped, int row, int place, int64_t first) {
          const RowSearch& search = shared.searches[row];
          if (search.state != SearchState::searching) return;
          shared.leaves[place] =
              stepped.template terms_of_leaf<kTileLeaf>(first, scalars, search.multiplier);
        });
      });
      add_leaves(block, shared.leaves, row_count, tile.leaves);
      block.phase([&](int row) {
        if (row >= row_count || shared.searches[row].state != SearchState::searching) return;
        continue_search(rows.set, shared.leaves[row * tile.leaves], &shared.searches[row]);
        if (shared.searches[row].state == SearchState::searching) shared.last_round = round + 1;
      });
    }
    block.phase([&](int thread) {
      if (thread < row_count) multipliers[thread] = shared.searches[thread].multiplier;
      for_leaves(thread, [&](const auto& stepped, int row, int, int64_t first) {
        const RowSearch& search = shared.searches[row];
        if (search.state != SearchState::found) return;
        stepped.template project_leaf<kTileLeaf>(first, scalars, search);
      });
    });
  }
};

// What the kernels for long rows work on. Those over pieces take them in turns, so that few blocks
// find out that nothing is to be done.
struct LongRows {
  const TensorEntry* tensors;
  const SetEntry* sets;
  const WorkItem* pieces;
  int64_t piece_count;
  const WorkItem* rows;
  int32_t* is_searching;  // by round: whether there are rows that take part in it
};

// Adds up one piece, by leaves that leaf(row, first element) adds, into its sum.
template <typename Types, typename Block, typename Leaf>
ADAMAL_HD ADAMAL_INLINE void add_piece(const Block& block, const SetEntry& entry,
                                       const TensorEntry& tensor, int64_t piece, SetTerms* leaves,
                                       const Leaf& leaf) {
  using T = typename Types::Compute;
  block.phase([&](int thread) {
    const SteppedRow<Types> row(entry.rows, tensor, piece % entry.rows.rows);
    const int64_t first = piece / entry.rows.rows * kNormChunk<T> + thread * kPieceLeaf<T>;
    leaves[thread] = leaf(row, first);
  });
  add_leaves(block, leaves, 1, kCudaBlockThreads);
  block.phase([&](int thread) {
    if (thread == 0) entry.sums[piece] = leaves[0];
  });
}

template <typename T>
ADAMAL_HD inline int64_t chunks_of(const CoupledRows& rows) {
  return (rows.length + kNormChunk<T> - 1) / kNormChunk<T>;
}

// Adds up a row's pieces: a thread a lane.
template <typename T, typename Block>
ADAMAL_HD ADAMAL_INLINE void add_row(const Block& block, const SetEntry& entry, int64_t row,
                                     SetTerms* lanes) {
  static_assert(kNormLanes == kCudaBlockThreads);
  block.phase([&](int lane) {
    SetTerms sum{0, 0};
    for (int64_t i = lane; i < chunks_of<T>(entry.rows); i += kNormLanes) {
      sum = sum + entry.sums[i * entry.rows.rows + row];
    }
    lanes[lane] = sum;
  });
  add_leaves(block, lanes, 1, kNormLanes);
}

// The sizes of long rows that the step has not added.
template <typename Types>
struct AddSizes : LongRows {
  using T = typename Types::Compute;
  static constexpr int kResident = 1;
  struct Shared {
    SetTerms leaves[kCudaBlockThreads];
  };

  bool step_added_some;

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared& shared) const {
    for (int64_t i = block.index(); i < piece_count; i += block.count()) {
      const WorkItem item = pieces[i];
      const SetEntry& entry = sets[item.tensor];
      if ((step_added_some && entry.sizes_come_with_step) || !projects(scalars_of<T>(entry)))
        continue;
      add_piece<Types>(block, entry, tensors[item.tensor], item.chunk, shared.leaves,
                       [](const SteppedRow<Types>& row, int64_t first) {
                         return SetTerms{row.template size_of_leaf<kPieceLeaf<T>>(first), 0};
                       });
    }
  }
};

// Begins the searches: a block a row.
template <typename T>
struct BeginSearches : LongRows {
  static constexpr int kResident = 1;
  struct Shared {
    SetTerms lanes[kNormLanes];
  };

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared& shared) const {
    const WorkItem item = rows[block.index()];
    const SetEntry& entry = sets[item.tensor];
    RowSearch& search = entry.searches[item.chunk];
    if (!projects(scalars_of<T>(entry))) {
      block.phase([&](int thread) {
        if (thread == 0) search.state = SearchState::left_alone;
      });
      return;
    }
    add_row<T>(block, entry, item.chunk, shared.lanes);
    block.phase([&](int thread) {
      if (thread != 0) return;
      search = begin_search(entry.rows.set, shared.lanes[0].first,
                            tensors[item.tensor].multipliers()[item.chunk]);
      if (search.state == SearchState::searching) is_searching[0] = 1;
    });
  }
};

// Adds the terms of rows that are searching, at their multipliers.
template <typename Types>
struct Evaluate : LongRows {
  using T = typename Types::Compute;
  static constexpr int kResident = 1;
  struct Shared {
    SetTerms leaves[kCudaBlockThreads];
  };

  int32_t round;

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared& shared) const {
    if (is_searching[round] == 0) return;
    for (int64_t i = block.index(); i < piece_count; i += block.count()) {
      const WorkItem item = pieces[i];
      const SetEntry& entry = sets[item.tensor];
      const RowSearch& search = entry.searches[item.chunk % entry.rows.rows];
      if (search.state != SearchState::searching) continue;
      add_piece<Types>(block, entry, tensors[item.tensor], item.chunk, shared.leaves,
                       [&](const SteppedRow<Types>& row, int64_t first) {
                         return row.template terms_of_leaf<kPieceLeaf<T>>(
                             first, scalars_of<T>(entry), search.multiplier);
                       });
    }
  }
};

// Continues the searches by what has been added: a block a row.
template <typename T>
struct ContinueSearches : LongRows {
  static constexpr int kResident = 1;
  struct Shared {
    SetTerms lanes[kNormLanes];
  };

  int32_t round;

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared& shared) const {
    if (is_searching[round] == 0) return;
    const WorkItem item = rows[block.index()];
    const SetEntry& entry = sets[item.tensor];
    RowSearch& search = entry.searches[item.chunk];
    if (search.state != SearchState::searching) return;
    add_row<T>(block, entry, item.chunk, shared.lanes);
    block.phase([&](int thread) {
      if (thread != 0) return;
      continue_search(entry.rows.set, shared.lanes[0], &search);
      if (search.state == SearchState::searching) is_searching[round + 1] = 1;
    });
  }
};

// Ends the searches, a block a row, and keeps the multipliers for the next step.
template <typename Types>
struct FinishSearches : LongRows {
  using T = typename Types::Compute;
  static constexpr int kResident = 1;
  struct Shared {
    SetTerms leaves[kCudaBlockThreads];
    RowSearch search;
  };

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared& shared) const {
    const WorkItem item = rows[block.index()];
    const SetEntry& entry = sets[item.tensor];
    if (!projects(scalars_of<T>(entry))) return;
    const TensorEntry& tensor = tensors[item.tensor];
    block.phase([&](int thread) {
      if (thread == 0) shared.search = entry.searches[item.chunk];
    });
    while (shared.search.state == SearchState::searching) {
      for (int64_t chunk = 0; chunk < chunks_of<T>(entry.rows); ++chunk) {
        add_piece<Types>(block, entry, tensor, chunk * entry.rows.rows + item.chunk, shared.leaves,
                         [&](const SteppedRow<Types>& row, int64_t first) {
                           return row.template terms_of_leaf<kPieceLeaf<T>>(
                               first, scalars_of<T>(entry), shared.search.multiplier);
                         });
      }
      add_row<T>(block, entry, item.chunk, shared.leaves);
      block.phase([&](int thread) {
        if (thread == 0) continue_search(entry.rows.set, shared.leaves[0], &shared.search);
      });
    }
    block.phase([&](int thread) {
      if (thread != 0) return;
      entry.searches[item.chunk] = shared.search;
      tensor.multipliers()[item.chunk] = shared.search.multiplier;
    });
  }
};

// Projects the rows for which a search was needed.
template <typename Types>
struct ProjectPieces : LongRows {
  using T = typename Types::Compute;
  static constexpr int kResident = 1;
  struct Shared {};

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared&) const {
    if (is_searching[0] == 0) return;
    for (int64_t i = block.index(); i < piece_count; i += block.count()) {
      const WorkItem item = pieces[i];
      const SetEntry& entry = sets[item.tensor];
      const int64_t index = item.chunk % entry.rows.rows;
      if (entry.searches[index].state != SearchState::found) continue;
      block.phase([&](int thread) {
        const SteppedRow<Types> row(entry.rows, tensors[item.tensor], index);
        const int64_t chunk = item.chunk / entry.rows.rows;
        row.template project_leaf<kPieceLeaf<T>>(chunk * kNormChunk<T> + thread * kPieceLeaf<T>,
                                                 scalars_of<T>(entry), entry.searches[index]);
      });
    }
  }
};

}  // namespace adamal
