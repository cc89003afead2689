// How the CPU step watches its elements: in loops that compilers vectorise, and with few roots.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/multiversioned.h"
#include "formula/storage.h"
#include "formula/watch.h"

namespace adamal {

// Watches nothing, and costs nothing.
template <typename T>
struct Unwatched {
  Unwatched(const BudgetChange<T>&, Seen<T>*) {}
  void see(int64_t, T, T) {}
  template <typename Storage>
  void end_block(const Storage*, int64_t, bool) {}
};

// Watches the elements of one item, in blocks of kBlock but for the last: the step's loop keeps
// what v was and the root of what it is, and a loop of its own, which has registers for what it
// finds, looks at some blocks that are in the first cache still.
template <typename Kernel, int64_t kBlock>
class Watched {
 public:
  using T = typename Kernel::Compute;
  using Storage = typename Kernel::ExpAvgSq;

  // Adds to what has been seen, of which only the change need be of this item.
  Watched(const BudgetChange<T>& change, Seen<T>* seen) : change_(change), seen_(seen) {}

  // Element i of a block, as it is stored. Its step takes the same root where storing rounds
  // nothing.
  ADAMAL_FLATTENED void see(int64_t i, T before, T after) {
    using std::sqrt;
    before_[held_ + i] = before;
    roots_[held_ + i] = sqrt(after);
  }

  // After the last of a block's `count` elements, of which `after` has what v is now.
  ADAMAL_FLATTENED void end_block(const Storage* after, int64_t count, bool is_last) {
    held_ += count;
    if (held_ < kHeld && !is_last) return;
    look(after + count - held_, held_);
    held_ = 0;
  }

 private:
  using Key = typename Ordered<T>::Key;

  static constexpr bool kFalls = Kernel::kSecondMoment == SecondMoment::plain;
  static constexpr int64_t kHeld = 4 * kBlock;

  ADAMAL_FLATTENED void look(const Storage* after, int64_t count) {
    Key grown = 0, smallest = Ordered<T>::kLargest, largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Key key = Ordered<T>::key_of(roots_[i]);
      grown += decode(after[i]) > before_[i];
      smallest = key < smallest ? key : smallest;
      largest = key > largest ? key : largest;
    }
    Seen<T> seen{static_cast<uint32_t>(grown), smallest, largest, T(INFINITY)};
    // Where v does not fall, no change is less than where it stands still, and that is least at one
    // end of the roots, by the same roundings: most elements need not be looked at again, for the
    // roots that v had.
    const T ends[] = {Ordered<T>::value_of(smallest), Ordered<T>::value_of(largest)};
    for (const T root : ends) seen.add_change(change_.where_v_stands_still(root));
    // But for roots that are not finite, or were multiplied by what was not: elements with these
    // have no change, and hide one that has.
    const bool is_bound = !kFalls && ends[1] < T(INFINITY) && change_.last_scale < T(INFINITY);
    if (!is_bound || (grown > 0 && seen.least_change < seen_->least_change)) {
      seen.least_change = least(count);
    }
    seen_->add(seen);
  }

  // As integers of the same order, whose least one compilers vectorise where they do not a float's.
  ADAMAL_FLATTENED T least(int64_t count) {
    using std::sqrt;
    Key least = Ordered<T>::key_of(T(INFINITY));
    for (int64_t i = 0; i < count; ++i) {
      const T change = change_.at(sqrt(before_[i]), roots_[i]);
      const Key key = Ordered<T>::signed_key_of(change == change ? change : T(INFINITY));
      least = key < least ? key : least;
    }
    return Ordered<T>::value_of_signed(least);
  }

  BudgetChange<T> change_;
  Seen<T>* seen_;
  int64_t held_ = 0;
  T before_[kHeld];
  T roots_[kHeld];
};

}  // namespace adamal
