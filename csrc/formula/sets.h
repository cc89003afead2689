// Sets that couple the elements of a row: balls and simplices, projected onto in the metric
// diag(d). One element's terms and a row's search for its multiplier, on the host and on the
// device.
//
// The nearest point has one unknown a row, its multiplier, which Newton's method finds: every
// evaluation adds two terms of each element, in the order of formula/norm.h. All is float64, each
// operation rounded to nearest, in the order written here; the twin is
// adamal_kernels/backends/eager/sets.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "formula/element.h"

namespace adamal {

enum class SetKind : int32_t { l2_ball = 0, l1_ball = 1, simplex = 2 };

struct CoupledSet {
  SetKind kind;
  double size;       // the ball's radius, the simplex's total
  double tolerance;  // relative to it: how far beyond it a row still counts as in the set
};

// The sums of one evaluation of a row, and one element's part of them.
struct SetTerms {
  double first;
  double second;
};

enum class SearchState : int32_t {
  searching = 0,
  found = 1,      // the row is projected, by the multiplier and the scale
  left_alone = 2  // it lies in the set, or is not finite
};

// A row's search. `multiplier` outlives the step: the next one starts from it.
struct RowSearch {
  double multiplier;
  double scale;
  SearchState state;
  int32_t evaluations;
};

// Excess over the set's size, relative to it, from which one more step of Newton's method leads to
// the solution: its error is that of the square, or none where the function is piecewise linear.
ADAMAL_HD constexpr double search_tolerance(SetKind kind) {
  return kind == SetKind::l2_ball ? 0x1p-40 : 0x1p-50;
}
inline constexpr int32_t kMostEvaluations = 100;
// Where d is 0 (eps and v are), the metric does not see the element: it counts as this.
inline constexpr double kLeastMetric = 1e-100;
// Of a simplex: every element counts, whatever its sign.
inline constexpr double kAllElements = -INFINITY;

template <typename T>
ADAMAL_HD inline double metric_of(T exp_avg_sq, const StepScalars<T>& s) {
  using std::sqrt;
  const double d = sqrt(exp_avg_sq) / s.bias2_sqrt + s.eps;
  return d < kLeastMetric ? kLeastMetric : d;
}

// A step with a learning rate of 0 does not project.
template <typename T>
ADAMAL_HD inline bool projects(const StepScalars<T>& s) {
  return s.step_size != T(0);
}

// Of an element before projection: what tells whether the row is in the set.
ADAMAL_HD inline double size_term(SetKind kind, double y) {
  switch (kind) {
    case SetKind::l2_ball:
      return y * y;
    case SetKind::l1_ball:
      return y < 0 ? -y : y;
    case SetKind::simplex:
      break;
  }
  return y >= 0 ? y : double(INFINITY);
}

// Whether a row is in the set as far as its type can tell: of a point that was projected, yes.
ADAMAL_HD inline bool is_inside(const CoupledSet& set, double size_sum) {
  const double most = set.size * (1 + set.tolerance);
  if (set.kind == SetKind::l2_ball) return size_sum <= most * most;
  if (set.kind == SetKind::l1_ball) return size_sum <= most;
  return size_sum <= most && size_sum >= set.size * (1 - set.tolerance);
}

// The element's distance to 0 after projection by the multiplier, without the scale. NaN passes.
ADAMAL_HD inline double projected_size(SetKind kind, double y, double d, double multiplier) {
  if (kind == SetKind::l2_ball) return y / (1 + multiplier / d);
  const double size = kind == SetKind::l1_ball && y < 0 ? -y : y;
  if (multiplier == kAllElements) return size;
  const double moved = size - multiplier / d;
  return moved <= 0 ? 0 : moved;
}

ADAMAL_HD inline SetTerms set_terms(SetKind kind, double y, double d, double multiplier) {
  const double size = projected_size(kind, y, d, multiplier);
  if (kind == SetKind::l2_ball) {
    const double square = size * size;
    return {square, square / (d + multiplier)};
  }
  const bool counts = multiplier == kAllElements || size != 0;
  return {size, counts ? 1 / d : 0};
}

ADAMAL_HD inline double projected(SetKind kind, double y, double d, double multiplier,
                                  double scale) {
  const double size = projected_size(kind, y, d, multiplier) * scale;
  return kind == SetKind::l1_ball && y < 0 ? 0 - size : size;  // Never -0.
}

// Starts a row's search from the last step's multiplier, unless the row is in the set.
ADAMAL_HD inline RowSearch begin_search(const CoupledSet& set, double size_sum,
                                        double last_multiplier) {
  if (is_inside(set, size_sum)) return {0, 1, SearchState::left_alone, 0};
  // A ball's is not negative. False for NaN.
  const double least = set.kind == SetKind::simplex ? -double(INFINITY) : 0.0;
  const bool is_usable = last_multiplier > least && last_multiplier < double(INFINITY);
  return {is_usable ? last_multiplier : 0.0, 1, SearchState::searching, 0};
}

// Takes the sums at the multiplier: ends the search, or moves on to the next multiplier.
//
// The L2 ball: 1 / |x(m)| - 1 / size rises and is concave in m. The others: sum(x(m)) - size falls
// and is convex. So wherever Newton's method starts, after one step it is below the solution and
// from there never overshoots: an excess that is not positive is rounding.
ADAMAL_HD inline void continue_search(const CoupledSet& set, SetTerms sums, RowSearch* search) {
  using std::sqrt;
  const double infinity = INFINITY;
  const double before = search->multiplier;
  const bool all = before == kAllElements;  // Not yet a point of the set.
  const bool is_finite = sums.first < infinity && sums.first > -infinity &&
                         sums.second < infinity && sums.second > -infinity;
  // From these every element counts. Where the whole metric is infinite, none does: none can move.
  const bool counts_all = all || (set.kind == SetKind::l1_ball && before == 0);
  if (!is_finite || (counts_all && sums.second == 0)) {
    *search = {0, 1, SearchState::left_alone, search->evaluations};
    return;
  }
  const bool is_ball = set.kind == SetKind::l2_ball;
  const double size = is_ball ? sqrt(sums.first) : sums.first;
  const double excess = size - set.size;
  const double distance = excess < 0 ? -excess : excess;
  double next;
  if (is_ball) {
    next = before + excess / set.size * (sums.first / sums.second);
  } else if (sums.second == 0) {
    next = set.kind == SetKind::l1_ball ? 0 : kAllElements;
  } else {
    next = (all ? 0 : before) + excess / sums.second;
  }
  if (set.kind != SetKind::simplex && !(next > 0)) next = 0;
  const bool is_below = search->evaluations > 0 && excess <= 0;
  ++search->evaluations;
  const bool is_close = !all && distance <= search_tolerance(set.kind) * set.size;
  const bool is_stuck =
      !all && !is_close && (is_below || next == before || search->evaluations >= kMostEvaluations);
  if (is_close || is_stuck) search->state = SearchState::found;
  if (!is_stuck) {
    search->multiplier = next;
    return;
  }
  // Rounding keeps it from coming closer: the scale takes away what is left.
  const bool is_scaled = set.kind == SetKind::simplex ? size > 0 : size > set.size;
  search->scale = is_scaled ? set.size / size : 1;
}

}  // namespace adamal
