// The CPU projections' loops over neighbouring elements, which compilers vectorise, and the sums of
// chunks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cpu/multiversioned.h"
#include "cpu/tree_sum.h"
#include "formula/dtypes.h"
#include "formula/sets.h"
#include "formula/storage.h"

namespace adamal {

template <SetKind kKind>
using KindConstant = std::integral_constant<SetKind, kKind>;

template <typename Call>
auto with_kind(SetKind kind, Call&& call) {
  switch (kind) {
    case SetKind::l2_ball:
      return call(KindConstant<SetKind::l2_ball>{});
    case SetKind::l1_ball:
      return call(KindConstant<SetKind::l1_ball>{});
    case SetKind::simplex:
      break;
  }
  return call(KindConstant<SetKind::simplex>{});
}

template <typename Storage>
static ADAMAL_MULTIVERSIONED void widen(const Storage* __restrict stored, double* __restrict values,
                                        int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = decode(stored[i]);
}

template <typename Param>
static ADAMAL_MULTIVERSIONED void narrow(const double* __restrict values, Param* __restrict stored,
                                         int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    stored[i] = encode<Param>(static_cast<ComputeType<Param>>(values[i]));
  }
}

// Of the second moments, widened from T.
template <typename T>
static ADAMAL_MULTIVERSIONED void to_metric(double* __restrict values, int64_t count,
                                            const StepScalars<T>& shared_scalars) {
  const StepScalars<T> scalars = shared_scalars;
  for (int64_t i = 0; i < count; ++i) values[i] = metric_of(static_cast<T>(values[i]), scalars);
}

template <SetKind kKind, typename Storage>
static ADAMAL_MULTIVERSIONED void size_terms(const Storage* __restrict stored,
                                             double* __restrict terms, int64_t count) {
  for (int64_t i = 0; i < count; ++i) terms[i] = size_term(kKind, decode(stored[i]));
}

template <SetKind kKind>
static ADAMAL_MULTIVERSIONED void terms_at(const double* __restrict y, const double* __restrict d,
                                           double multiplier, double* __restrict first,
                                           double* __restrict second, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const SetTerms terms = set_terms(kKind, y[i], d[i], multiplier);
    first[i] = terms.first;
    second[i] = terms.second;
  }
}

template <SetKind kKind>
static ADAMAL_MULTIVERSIONED void project_all(double* __restrict y, const double* __restrict d,
                                              double multiplier, double scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = projected(kKind, y[i], d[i], multiplier, scale);
}

// No less than the sum of some elements' sizes, of no more than a work item's: what tells, at a
// fraction of the sum's cost, that a row lies well within its ball. NaN where an element is.
//
// Lanes of the element's own type, whose roundings are far less than the share that is added; what
// is lost to denormal numbers is less than the smallest normal one an element.
template <SetKind kKind, typename Storage>
static ADAMAL_MULTIVERSIONED double bound_of_sizes(const Storage* __restrict stored,
                                                   int64_t count) {
  using T = ComputeType<Storage>;
  constexpr int64_t kLanes = 32;
  T lanes[kLanes] = {};
  const auto size_at = [&](int64_t i) {
    const T y = decode(stored[i]);
    return kKind == SetKind::l2_ball ? y * y : (y < 0 ? -y : y);
  };
  int64_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] += size_at(first + i);
  }
  for (int64_t i = first; i < count; ++i) lanes[i - first] += size_at(i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  constexpr double kShare = 0x1p-10;
  return lanes[0] * (1 + kShare) + static_cast<double>(count) * std::numeric_limits<T>::min();
}

template <typename Storage>
double size_bound(SetKind kind, const Storage* stored, int64_t count) {
  if (kind == SetKind::l2_ball) return bound_of_sizes<SetKind::l2_ball>(stored, count);
  return bound_of_sizes<SetKind::l1_ball>(stored, count);
}

// A chunk's sums.

inline double padded_sum(double* terms, int64_t count) {
  double other[kNormChunk<float> / 2];
  const int64_t width = power_of_two_from(count);
  std::fill(terms + count, terms + width, 0.0);
  return add_tree(terms, other, width);
}

template <typename Storage>
double chunk_size(SetKind kind, const Storage* stored, int64_t count) {
  double terms[kNormChunk<float>];
  with_kind(kind, [&](auto constant) { size_terms<constant()>(stored, terms, count); });
  return padded_sum(terms, count);
}

inline SetTerms chunk_terms(SetKind kind, const double* y, const double* d, double multiplier,
                            int64_t count) {
  double first[kNormChunk<float>], second[kNormChunk<float>];
  with_kind(kind,
            [&](auto constant) { terms_at<constant()>(y, d, multiplier, first, second, count); });
  return {padded_sum(first, count), padded_sum(second, count)};
}

inline void project_values(SetKind kind, const RowSearch& search, double* y, const double* d,
                           int64_t count) {
  with_kind(kind, [&](auto constant) {
    project_all<constant()>(y, d, search.multiplier, search.scale, count);
  });
}

// Calls body(first, count) for each chunk of `count` elements.
template <typename T, typename Body>
void for_chunks(int64_t count, const Body& body) {
  for (int64_t first = 0; first < count; first += kNormChunk<T>) {
    body(first, std::min<int64_t>(kNormChunk<T>, count - first));
  }
}

}  // namespace adamal
