// What a watched step learns of its elements, and keeps with each work item until it is read.
//
// Counts, least and largest values: the same in any order of elements, threads and blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "formula/element.h"

namespace adamal {

// Of one work item, which alone reads and writes it. Values of the compute type are held as
// float64. The twin of adamal_kernels.core.stats.Record, which says what each field means.
struct ItemRecord {
  int64_t steps;
  int64_t steps_since_growth;
  int64_t grown;
  double smallest_denominator;
  double largest_denominator;
  double least_budget_change;
  double step_size;
  double budget_scale;
  double budget_offset;
};

inline constexpr int kItemRecordWords = 9;
static_assert(sizeof(ItemRecord) == kItemRecordWords * sizeof(int64_t));

// The regularization budget of an element, d / step_size, from the root of the second moment that
// d is made of.
template <typename T>
struct Budget {
  T scale;
  T offset;

  // NaN for a step with a learning rate of 0, whose budget would be infinite.
  ADAMAL_HD static Budget of(const StepScalars<T>& s) {
    if (!(s.step_size > T(0))) return {T(NAN), T(NAN)};
    return {T(1) / (s.bias2_sqrt * s.step_size), s.eps / s.step_size};
  }
  ADAMAL_HD static Budget of(const ItemRecord& record) {
    return {static_cast<T>(record.budget_scale), static_cast<T>(record.budget_offset)};
  }
};

// The change of the budget from the last step to this one: equation 15, with the step's own
// denominator. Written so, it is exactly 0 where nothing changed, and its second term, which is
// not negative where v does not fall, is all that the last step's v is needed for.
template <typename T>
struct BudgetChange {
  T scale_change;
  T offset_change;
  T last_scale;

  ADAMAL_HD BudgetChange(Budget<T> last, Budget<T> now)
      : scale_change(now.scale - last.scale),
        offset_change(now.offset - last.offset),
        last_scale(last.scale) {}

  ADAMAL_HD T where_v_stands_still(T root) const { return root * scale_change + offset_change; }
  ADAMAL_HD T at(T last_root, T root) const {
    return where_v_stands_still(root) + last_scale * (root - last_root);
  }
  // Not before a parameter's second watched step, nor where the learning rate was or is 0.
  ADAMAL_HD bool is_defined() const { return scale_change == scale_change; }
};

template <int kBytes>
struct SignedOf;
template <>
struct SignedOf<4> {
  using type = int32_t;
};
template <>
struct SignedOf<8> {
  using type = int64_t;
};

// Numbers that are not negative as integers of the same order; NaN is the largest.
template <typename T>
struct Ordered {
  using Key = typename SignedOf<sizeof(T)>::type;
  static constexpr Key kLargest = sizeof(T) == 4 ? Key(0x7fffffff) : Key(0x7fffffffffffffff);

  ADAMAL_HD static Key key_of(T value) { return bits_of(value) & kLargest; }
  ADAMAL_HD static T value_of(Key key) {
    T value;
    memcpy(&value, &key, sizeof(value));
    return value;
  }

  // The same of numbers of both signs, and of no NaN.
  ADAMAL_HD static Key signed_key_of(T value) { return flipped(bits_of(value)); }
  ADAMAL_HD static T value_of_signed(Key key) { return value_of(flipped(key)); }

 private:
  ADAMAL_HD static Key bits_of(T value) {
    Key bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
  ADAMAL_HD static Key flipped(Key key) { return key ^ (key >> (8 * sizeof(Key) - 1) & kLargest); }
};

// What some elements came to.
template <typename T>
struct Seen {
  using Key = typename Ordered<T>::Key;

  uint32_t grown;
  // Of the roots that denominators are made of.
  Key smallest;
  Key largest;
  T least_change;

  ADAMAL_HD static Seen nothing() { return {0, Ordered<T>::kLargest, 0, T(INFINITY)}; }

  ADAMAL_HD void add(const Seen& other) {
    grown += other.grown;
    add_range(other.smallest, other.largest);
    add_change(other.least_change);
  }

  // Of one element, whose denominator was made of `before` in the last step and is of `after` now.
  ADAMAL_HD void add_element(T before, T after, const BudgetChange<T>& change) {
    using std::sqrt;
    const T root = sqrt(after);
    const Key key = Ordered<T>::key_of(root);
    grown += after > before;
    add_range(key, key);
    add_change(change.at(after == before ? root : sqrt(before), root));
  }

  ADAMAL_HD void add_range(Key from, Key to) {
    smallest = from < smallest ? from : smallest;
    largest = to > largest ? to : largest;
  }
  // One that is no number, as of a v that has become infinite, is left out.
  ADAMAL_HD void add_change(T change) {
    least_change = change < least_change ? change : least_change;
  }
};

// Takes over what a step came to, for all elements of the item.
template <typename T>
ADAMAL_HD inline void record_step(const Seen<T>& seen, const StepScalars<T>& s, Budget<T> now,
                                  ItemRecord* record) {
  const T largest = Ordered<T>::value_of(seen.largest) / s.bias2_sqrt + s.eps;
  const T smallest = Ordered<T>::value_of(seen.smallest) / s.bias2_sqrt + s.eps;
  const bool is_defined = BudgetChange<T>(Budget<T>::of(*record), now).is_defined();
  record->steps += 1;
  if (seen.grown > 0) {
    record->steps_since_growth = 0;
  } else if (record->steps_since_growth >= 0) {
    record->steps_since_growth += 1;
  }
  record->grown = seen.grown;
  // One NaN makes both NaN.
  record->smallest_denominator = largest == largest ? smallest : largest;
  record->largest_denominator = largest;
  record->least_budget_change = is_defined ? double(seen.least_change) : double(NAN);
  record->step_size = s.step_size;
  record->budget_scale = now.scale;
  record->budget_offset = now.offset;
}

}  // namespace adamal
