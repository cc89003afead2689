// How the CPU step watches its elements: in loops that compilers vectorise, and with few roots.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "multiversioned.h"
#include "watch.h"

namespace adamal {

// Watches nothing, and costs nothing.
template <typename T>
struct Unwatched {
  Unwatched(const BudgetChange<T>&, Seen<T>*) {}
  void begin_block(int64_t) {}
  void see(int64_t, T, T) {}
  void end_block(const T*, int64_t, bool) {}
};

// Watches the elements of one item, in blocks of kBlock but for the last.
//
// Lanes, one for each element of a block, rather than one least value: compilers vectorise them
// as they are, and put them together once for many blocks.
template <SecondMoment kSecondMoment, int64_t kBlock, typename T>
class Watched {
 public:
  // Adds to what has been seen, of which only the change need be of this item.
  Watched(const BudgetChange<T>& change, Seen<T>* seen) : change_(change), seen_(seen) {}

  // Before the first of a block's `count` elements.
  ADAMAL_FLATTENED void begin_block(int64_t count) {
    if (blocks_ > 0) return;
    lanes_ = count;
    std::fill_n(grown_, count, Key(0));
    std::fill_n(smallest_, count, Ordered<T>::kLargest);
    std::fill_n(largest_, count, Key(0));
    if (kFalls) std::fill_n(least_, count, T(INFINITY));
  }

  // Element i of the block.
  ADAMAL_FLATTENED void see(int64_t i, T before, T after) {
    using std::sqrt;
    const Key key = Ordered<T>::key_of(after);
    grown_[i] += after > before;
    smallest_[i] = key < smallest_[i] ? key : smallest_[i];
    largest_[i] = key > largest_[i] ? key : largest_[i];
    if constexpr (kFalls) {
      const T change = change_.at(sqrt(before), sqrt(after));
      least_[i] = change < least_[i] ? change : least_[i];
    } else {
      before_[blocks_ * kBlock + i] = before;
    }
  }

  // After the last of a block's `count` elements, of which `after` has what v is now.
  ADAMAL_FLATTENED void end_block(const T* after, int64_t count, bool is_last) {
    if (++blocks_ < kBlocks && !is_last) return;
    const int64_t earlier = (blocks_ - 1) * kBlock;
    blocks_ = 0;
    Seen<T> seen = Seen<T>::nothing();
    for (int64_t i = 0; i < lanes_; ++i) {
      seen.grown += static_cast<uint32_t>(grown_[i]);
      seen.add_range(smallest_[i], largest_[i]);
      if constexpr (kFalls) seen.add_change(least_[i]);
    }
    if constexpr (!kFalls) {
      // No change is less than where v stands still, and that is least at one end of the roots, by
      // the same roundings: most blocks need not be looked at again, for the roots that v had.
      for (const Key key : {seen.smallest, seen.largest}) {
        seen.add_change(change_.where_v_stands_still(std::sqrt(Ordered<T>::value_of(key))));
      }
      if (seen.least_change < seen_->least_change) {
        seen.least_change = least_change(after - earlier, earlier + count);
      }
    }
    seen_->add(seen);
  }

 private:
  using Key = typename Ordered<T>::Key;

  static constexpr bool kFalls = kSecondMoment == SecondMoment::plain;
  // That are put together at a time: 4 KB of what v was.
  static constexpr int64_t kBlocks = 4096 / (kBlock * int64_t(sizeof(T)));

  ADAMAL_FLATTENED T least_change(const T* after, int64_t count) {
    using std::sqrt;
    T least = T(INFINITY);
    int64_t lanes = std::min(count, kBlock);
    std::fill_n(least_, lanes, least);
    for (int64_t first = 0; first < count; first += kBlock) {
      lanes = std::min(count - first, kBlock);
      for (int64_t i = 0; i < lanes; ++i) {
        const T change = change_.at(sqrt(before_[first + i]), sqrt(after[first + i]));
        least_[i] = change < least_[i] ? change : least_[i];
      }
    }
    lanes = std::min(count, kBlock);
    for (int64_t i = 0; i < lanes; ++i) least = least_[i] < least ? least_[i] : least;
    return least;
  }

  BudgetChange<T> change_;
  Seen<T>* seen_;
  int64_t blocks_ = 0;
  int64_t lanes_;
  Key grown_[kBlock];
  Key smallest_[kBlock];
  Key largest_[kBlock];
  T least_[kBlock];
  T before_[kBlocks * kBlock];
};

}  // namespace adamal
