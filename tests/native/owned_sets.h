// The sets of an OwnedBucket's tensors, read from the harness's input, and a projection onto them
// that is as plain as formula/sets.h allows: one element after another, and trees by recursion.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "formula/norm.h"
#include "formula/rows.h"
#include "formula/sets.h"
#include "formula/storage.h"
#include "owned_bucket.h"

namespace adamal::harness {

struct OwnedSets {
  std::vector<CoupledRows> sets;
  std::vector<std::unique_ptr<Stream>> multipliers;

  // Hands the bucket what it reads.
  OwnedSets(Input& input, OwnedBucket& bucket) {
    for (TensorEntry& tensor : bucket.tensors) {
      CoupledRows rows{};
      rows.set.kind = static_cast<SetKind>(input.integer());
      const auto numbers = input.array<double>(2);
      rows.set.size = numbers[0];
      rows.set.tolerance = numbers[1];
      rows.rows = read_runs(input, &rows.kept_count, rows.kept_sizes, rows.kept_strides);
      rows.length = read_runs(input, &rows.reduced_count, rows.reduced_sizes, rows.reduced_strides);
      if (!covers(rows, tensor.numel)) fail("rows that do not cover their tensor");
      sets.push_back(rows);
      multipliers.push_back(
          std::make_unique<Stream>(input, rows.rows * sizeof(double), 0, /*read_only=*/false));
      tensor.buffers[Buffer::multiplier] = multipliers.back()->data();
    }
    bucket.view.sets = sets.data();
  }

  void write(Output& output) const {
    for (const auto& stream : multipliers) output.write(stream->data(), stream->bytes());
  }

 private:
  static int64_t read_runs(Input& input, int32_t* count, int64_t* sizes, int64_t* strides) {
    *count = static_cast<int32_t>(input.integer());
    int64_t elements = 1;
    for (int32_t i = 0; i < *count; ++i) {
      sizes[i] = input.integer();
      strides[i] = input.integer();
      elements *= sizes[i];
    }
    return elements;
  }
};

// Elements beyond the end are zeros.
inline double tree_sum(const std::vector<double>& terms, size_t first, size_t width) {
  if (first >= terms.size()) return 0;
  if (width == 1) return terms[first];
  return tree_sum(terms, first, width / 2) + tree_sum(terms, first + width / 2, width / 2);
}

template <typename T>
double row_sum(const std::vector<double>& terms) {
  std::vector<double> lanes(kNormLanes);
  for (size_t first = 0, i = 0; first < terms.size(); first += kNormChunk<T>, ++i) {
    lanes[i % kNormLanes] += tree_sum(terms, first, kNormChunk<T>);
  }
  return tree_sum(lanes, 0, kNormLanes);
}

template <typename Types>
void project_row_serially(const CoupledRows& rows, int64_t row, const TensorEntry& tensor,
                          const StepScalars<typename Types::Compute>& scalars) {
  using Param = typename Types::Param;
  using T = typename Types::Compute;
  const SetKind kind = rows.set.kind;
  auto* const param = static_cast<Param*>(tensor.param);
  const auto* const v = static_cast<const typename Types::ExpAvgSq*>(tensor.divisor());
  std::vector<double> y(rows.length), d(rows.length), first(rows.length), second(rows.length);
  for (int64_t j = 0; j < rows.length; ++j) {
    y[j] = decode(param[rows.offset_of(row, j)]);
    d[j] = metric_of(static_cast<T>(decode(v[rows.offset_of(row, j)])), scalars);
    first[j] = size_term(kind, y[j]);
  }
  double& multiplier = tensor.multipliers()[row];
  RowSearch search = begin_search(rows.set, row_sum<T>(first), multiplier);
  while (search.state == SearchState::searching) {
    for (int64_t j = 0; j < rows.length; ++j) {
      const SetTerms terms = set_terms(kind, y[j], d[j], search.multiplier);
      first[j] = terms.first;
      second[j] = terms.second;
    }
    continue_search(rows.set, {row_sum<T>(first), row_sum<T>(second)}, &search);
  }
  multiplier = search.multiplier;
  if (search.state != SearchState::found) return;
  for (int64_t j = 0; j < rows.length; ++j) {
    const double x = projected(kind, y[j], d[j], search.multiplier, search.scale);
    param[rows.offset_of(row, j)] = encode<Param>(static_cast<T>(x));
  }
}

// Projects what a step has stored.
inline void project_serially(const Bucket& bucket) {
  dispatch(bucket, [&](auto key) {
    using Types = typename decltype(key)::Rows;
    for (int64_t i = 0; i < bucket.tensor_count; ++i) {
      if (bucket.grads[i] == nullptr || bucket.tensors[i].numel == 0) continue;
      const StepScalars<typename Types::Compute> scalars(bucket.scalars[bucket.rows[i]]);
      if (!projects(scalars)) continue;
      for (int64_t row = 0; row < bucket.sets[i].rows; ++row) {
        project_row_serially<Types>(bucket.sets[i], row, bucket.tensors[i], scalars);
      }
    }
  });
}

}  // namespace adamal::harness
