// The CUDA projections onto sets that couple elements: what a block of each kernel does, on the
// device and, for the tests, on the host.
//
// A block's threads go together from phase to phase, and keep in shared memory what outlives one.
// Within a phase any order of threads gives the same result, and within a kernel any order of
// blocks: none waits for another, kernels follow one another in the stream, and sums are those of
// gradient_norm.h. A kernel that finds nothing to do returns.
#pragma once

#include <cstdint>

#include "bucket.h"
#include "coupled_rows.h"
#include "coupled_sets.h"
#include "gradient_norm.h"
#include "launch_params.h"
#include "multi_tensor.h"
#include "set_tables.h"
#include "step.h"
#include "storage.h"

namespace adamal {

ADAMAL_HD inline SetTerms operator+(SetTerms a, SetTerms b) {
  return {a.first + b.first, a.second + b.second};
}

// Elements [first, first + kWidth) of a row, as far as they exist.
template <int kWidth>
class Leaf {
 public:
  ADAMAL_HD ADAMAL_INLINE Leaf(const CoupledRows& rows, int64_t first)
      : count_(int(min_of(rows.length - first, int64_t(kWidth)))),
        is_contiguous_(rows.is_contiguous() && count_ == kWidth) {
    if (rows.reduced_count == 1) {
      ADAMAL_UNROLL
      for (int j = 0; j < kWidth; ++j) offset_[j] = (first + j) * rows.reduced_strides[0];
      return;
    }
    // Divisions: a loop that is not unrolled, and so may not index registers.
    ADAMAL_ROLL
    for (int j = 0; j < count_; ++j) {
      const int64_t offset = rows.element_offset(first + j);
      ADAMAL_UNROLL
      for (int k = 0; k < kWidth; ++k) offset_[k] = k == j ? offset : offset_[k];
    }
  }

  ADAMAL_HD bool has(int j) const { return j < count_; }

  // From a stream's place of the row's first element; what does not exist is 0.
  template <typename Storage>
  ADAMAL_HD ADAMAL_INLINE Pack<Storage, kWidth> load(const Storage* row) const {
    Pack<Storage, kWidth> values;
    if (fits_accesses(row)) {
      values.load(row + offset_[0]);
      return values;
    }
    ADAMAL_UNROLL
    for (int j = 0; j < kWidth; ++j) values.lane[j] = has(j) ? row[offset_[j]] : Storage{};
    return values;
  }

  template <typename Storage>
  ADAMAL_HD ADAMAL_INLINE void store(const Pack<Storage, kWidth>& values, Storage* row) const {
    if (fits_accesses(row)) {
      values.store(row + offset_[0]);
      return;
    }
    ADAMAL_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      if (has(j)) row[offset_[j]] = values.lane[j];
    }
  }

 private:
  template <typename Storage>
  ADAMAL_HD bool fits_accesses(const Storage* row) const {
    return is_contiguous_ && reinterpret_cast<uintptr_t>(row + offset_[0]) % kAccessBytes == 0;
  }

  int count_;  // not positive where the leaf lies past the row's end
  bool is_contiguous_;
  int64_t offset_[kWidth] = {};
};

// The sum of term(0), ..., term(kWidth - 1) by a tree of neighbours.
template <typename Value, int kWidth, typename Term>
ADAMAL_HD ADAMAL_INLINE Value add_leaf(const Term& term) {
  Value values[kWidth];
  ADAMAL_UNROLL
  for (int j = 0; j < kWidth; ++j) values[j] = term(j);
  ADAMAL_UNROLL
  for (int width = kWidth / 2; width > 0; width /= 2) {
    ADAMAL_UNROLL
    for (int j = 0; j < width; ++j) values[j] = values[2 * j] + values[2 * j + 1];
  }
  return values[0];
}

// Adds up the leaves of every row, `of_row` next to one another (a power of two), into its first.
template <typename Block, typename Value>
ADAMAL_HD ADAMAL_INLINE void add_leaves(const Block& block, Value* leaves, int rows, int of_row) {
  for (int stride = 1; stride < of_row; stride *= 2) {
    block.phase([&](int thread) { add_level(leaves, rows * of_row, stride, thread); });
  }
}

// One row of a tensor, after the step has stored it.
template <typename ParamType>
class SteppedRow {
 public:
  using Param = ParamType;
  using T = ComputeType<Param>;

  ADAMAL_HD SteppedRow(const CoupledRows& rows, const TensorEntry& tensor, int64_t row)
      : rows_(rows) {
    const int64_t offset = rows.row_offset(row);
    const void* denominator_sq =
        tensor.max_exp_avg_sq == nullptr ? tensor.exp_avg_sq : tensor.max_exp_avg_sq;
    param_ = static_cast<Param*>(tensor.param) + offset;
    denominator_sq_ = static_cast<const T*>(denominator_sq) + offset;
#ifdef __CUDA_ARCH__
    __builtin_assume(__isGlobal(param_));
    __builtin_assume(__isGlobal(denominator_sq_));
#endif
  }

  // The size terms of a leaf, added up.
  template <int kWidth>
  ADAMAL_HD ADAMAL_INLINE double size_of_leaf(int64_t first) const {
    const Leaf<kWidth> leaf(rows_, first);
    const auto param = leaf.load(param_);
    return add_leaf<double, kWidth>(
        [&](int j) { return leaf.has(j) ? size_term(rows_.set.kind, value_of(param, j)) : 0.0; });
  }

  // The terms of a leaf at a multiplier, added up.
  template <int kWidth>
  ADAMAL_HD ADAMAL_INLINE SetTerms terms_of_leaf(int64_t first, const StepScalars<T>& scalars,
                                                 double multiplier) const {
    const Leaf<kWidth> leaf(rows_, first);
    const auto param = leaf.load(param_);
    const auto denominator_sq = leaf.load(denominator_sq_);
    return add_leaf<SetTerms, kWidth>([&](int j) {
      if (!leaf.has(j)) return SetTerms{0, 0};
      return set_terms(rows_.set.kind, value_of(param, j),
                       metric_of(denominator_sq.lane[j], scalars), multiplier);
    });
  }

  // Projects a leaf by what the search has found.
  template <int kWidth>
  ADAMAL_HD ADAMAL_INLINE void project_leaf(int64_t first, const StepScalars<T>& scalars,
                                            const RowSearch& search) const {
    const Leaf<kWidth> leaf(rows_, first);
    auto param = leaf.load(param_);
    const auto denominator_sq = leaf.load(denominator_sq_);
    ADAMAL_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      const double moved =
          projected(rows_.set.kind, value_of(param, j), metric_of(denominator_sq.lane[j], scalars),
                    search.multiplier, search.scale);
      param.lane[j] = encode<Param>(static_cast<T>(moved));
    }
    leaf.store(param, param_);
  }

 private:
  template <typename Pack>
  ADAMAL_HD static ADAMAL_INLINE double value_of(const Pack& param, int j) {
    return static_cast<T>(decode(param.lane[j]));
  }

  const CoupledRows& rows_;
  Param* param_;
  const T* denominator_sq_;
};

template <typename T>
ADAMAL_HD inline const StepScalars<T>& scalars_of(const SetEntry& entry) {
  return *static_cast<const StepScalars<T>*>(entry.scalars);
}

// Elements of a piece that one thread adds by itself.
template <typename T>
inline constexpr int kPieceLeaf = kNormChunk<T> / kCudaBlockThreads;

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
template <SecondMoment kSecondMoment, typename Param, typename Grad>
struct StepBlock {
  using T = ComputeType<Param>;
  static_assert(kNormChunk<T> == kCudaChunk<T>);
  static constexpr int kResident = kStepResidentBlocks<kSecondMoment, T>;
  struct Shared {
    double leaves[kCudaBlockThreads];
  };

  SmallDeviceLaunchParams<T> params;
  const SetEntry* sets;

  template <typename Block>
  ADAMAL_HD ADAMAL_INLINE void operator()(const Block& block, Shared& shared) const {
    const int64_t index = block.index();
    block.phase([&](int thread) { step_block<kSecondMoment, Param, Grad>(params, index, thread); });
    const WorkItem item = params.items[index];
    const SetEntry& entry = sets[item.tensor];
    // Zeros where nothing was stepped, too.
    if (!entry.sizes_come_with_step || !projects(scalars_of<T>(entry))) return;
    block.phase([&](int thread) {
      const SteppedRow<Param> row(entry.rows, params.tensors[item.tensor], 0);
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
template <typename Param>
struct ProjectTile {
  using T = ComputeType<Param>;
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
    double* const multipliers = tensor.multipliers + first_row;

    // Calls body(row, place, first element) for a thread's leaves; a row's number is the tile's.
    const auto for_leaves = [&](int thread, const auto& body) {
      const int row = tile.row_of(thread);
      const int lane = tile.lane_of(thread);
      if (row >= row_count || lane >= tile.lanes) return;
      const SteppedRow<Param> stepped(rows, tensor, first_row + row);
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
template <typename Param, typename Block, typename Leaf>
ADAMAL_HD ADAMAL_INLINE void add_piece(const Block& block, const SetEntry& entry,
                                       const TensorEntry& tensor, int64_t piece, SetTerms* leaves,
                                       const Leaf& leaf) {
  using T = ComputeType<Param>;
  block.phase([&](int thread) {
    const SteppedRow<Param> row(entry.rows, tensor, piece % entry.rows.rows);
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
template <typename Param>
struct AddSizes : LongRows {
  using T = ComputeType<Param>;
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
      add_piece<Param>(block, entry, tensors[item.tensor], item.chunk, shared.leaves,
                       [](const SteppedRow<Param>& row, int64_t first) {
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
                            tensors[item.tensor].multipliers[item.chunk]);
      if (search.state == SearchState::searching) is_searching[0] = 1;
    });
  }
};

// Adds the terms of rows that are searching, at their multipliers.
template <typename Param>
struct Evaluate : LongRows {
  using T = ComputeType<Param>;
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
      add_piece<Param>(block, entry, tensors[item.tensor], item.chunk, shared.leaves,
                       [&](const SteppedRow<Param>& row, int64_t first) {
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
template <typename Param>
struct FinishSearches : LongRows {
  using T = ComputeType<Param>;
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
        add_piece<Param>(block, entry, tensor, chunk * entry.rows.rows + item.chunk, shared.leaves,
                         [&](const SteppedRow<Param>& row, int64_t first) {
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
      tensor.multipliers[item.chunk] = shared.search.multiplier;
    });
  }
};

// Projects the rows for which a search was needed.
template <typename Param>
struct ProjectPieces : LongRows {
  using T = ComputeType<Param>;
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
        const SteppedRow<Param> row(entry.rows, tensors[item.tensor], index);
        const int64_t chunk = item.chunk / entry.rows.rows;
        row.template project_leaf<kPieceLeaf<T>>(chunk * kNormChunk<T> + thread * kPieceLeaf<T>,
                                                 scalars_of<T>(entry), entry.searches[index]);
      });
    }
  }
};

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
  StepBlock<Key::kSecondMoment, typename Key::Param, typename Key::Grad> kernel;
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
template <typename Param, typename Launch>
bool project_bucket(const TensorEntry* tensors, const SetTables& tables, int64_t piece_blocks,
                    bool step_added_some, const Launch& launch) {
  using T = ComputeType<Param>;
  if (tables.tile_count > 0 &&
      !launch(ProjectTile<Param>{tensors, tables.entries, tables.tiles}, tables.tile_count)) {
    return false;
  }
  if (tables.piece_count == 0) return true;
  const LongRows rows{tensors,          tables.entries,     tables.pieces, tables.piece_count,
                      tables.long_rows, tables.is_searching};
  const int64_t over_pieces = min_of(tables.piece_count, piece_blocks);
  const int64_t over_rows = tables.long_row_count;
  if ((tables.has_sizes_to_add || !step_added_some) &&
      !launch(AddSizes<Param>{{rows}, step_added_some}, over_pieces)) {
    return false;
  }
  if (!launch(BeginSearches<T>{rows}, over_rows)) return false;
  for (int32_t round = 0; round < kSearchRounds; ++round) {
    if (!launch(Evaluate<Param>{{rows}, round}, over_pieces)) return false;
    if (!launch(ContinueSearches<T>{{rows}, round}, over_rows)) return false;
  }
  return launch(FinishSearches<Param>{rows}, over_rows) &&
         launch(ProjectPieces<Param>{rows}, over_pieces);
}

}  // namespace adamal
