// A row of a set that couples elements, after the step has stored it, as the CUDA kernels read and
// write it: by leaves of neighbouring elements, which a thread adds by itself.
#pragma once

#include <cstdint>

#include "cuda/norm_tree.h"
#include "cuda/set_tables.h"
#include "cuda/walk.h"
#include "formula/bucket.h"
#include "formula/norm.h"
#include "formula/rows.h"
#include "formula/sets.h"
#include "formula/storage.h"

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
template <typename Types>
class SteppedRow {
 public:
  using Param = typename Types::Param;
  using ExpAvgSq = typename Types::ExpAvgSq;
  using T = typename Types::Compute;

  ADAMAL_HD SteppedRow(const CoupledRows& rows, const TensorEntry& tensor, int64_t row)
      : rows_(rows) {
    const int64_t offset = rows.row_offset(row);
    param_ = static_cast<Param*>(tensor.param) + offset;
    denominator_sq_ = static_cast<const ExpAvgSq*>(tensor.divisor()) + offset;
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
      return set_terms(rows_.set.kind, value_of(param, j), metric_at(denominator_sq, j, scalars),
                       multiplier);
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
          projected(rows_.set.kind, value_of(param, j), metric_at(denominator_sq, j, scalars),
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
  template <typename Pack>
  ADAMAL_HD static ADAMAL_INLINE double metric_at(const Pack& denominator_sq, int j,
                                                  const StepScalars<T>& scalars) {
    return metric_of(static_cast<T>(decode(denominator_sq.lane[j])), scalars);
  }

  const CoupledRows& rows_;
  Param* param_;
  const ExpAvgSq* denominator_sq_;
};

template <typename T>
ADAMAL_HD inline const StepScalars<T>& scalars_of(const SetEntry& entry) {
  return *static_cast<const StepScalars<T>*>(entry.scalars);
}

// Elements of a piece that one thread adds by itself.
template <typename T>
inline constexpr int kPieceLeaf = kNormChunk<T> / kCudaBlockThreads;

}  // namespace adamal
