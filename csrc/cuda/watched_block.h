// A block of a watched step: its threads step and watch, and one of them writes what all have seen.
#pragma once

#include <cstdint>

#include "cuda/launches.h"
#include "cuda/walk.h"
#include "formula/watch.h"

namespace adamal {

// The parameters of a launch, and the table of records that an unwatched one does without.
template <typename Params>
struct Recorded : Params {
  ItemRecord* const* records;  // of each of the bucket's tensors

  // Null where the block has nothing to step.
  ADAMAL_HD ADAMAL_INLINE ItemRecord* record_of(int64_t block) const {
    if (this->is_skipped()) return nullptr;
    const WorkItem item = this->items[block];
    if (this->grads[item.tensor - this->first_tensor] == nullptr) return nullptr;
    return records[item.tensor] + item.chunk;
  }
};

template <typename T>
using SmallRecordedParams = Recorded<SmallLaunchParams<T>>;
template <typename T>
using LargeRecordedParams = Recorded<LargeLaunchParams<T>>;
template <typename T>
using SmallRecordedDeviceParams = Recorded<DeviceLaunchParams<T, 4096 - sizeof(void*)>>;
template <typename T>
using LargeRecordedDeviceParams = Recorded<DeviceLaunchParams<T, 32764 - sizeof(void*)>>;

static_assert(sizeof(SmallRecordedParams<float>) <= 4096);
static_assert(sizeof(SmallRecordedParams<double>) <= 4096);
static_assert(sizeof(LargeRecordedParams<float>) <= 32764);
static_assert(sizeof(LargeRecordedParams<double>) <= 32764);
static_assert(sizeof(SmallRecordedDeviceParams<double>) <= 4096);
static_assert(sizeof(LargeRecordedDeviceParams<double>) <= 32764);

// Watches a thread's elements.
template <typename T>
struct ThreadWatch {
  const ItemRecord* record;  // of the last step
  BudgetChange<T> change{{}, {}};
  Seen<T> seen = Seen<T>::nothing();

  ADAMAL_HD ADAMAL_INLINE void begin(const StepScalars<T>& scalars) {
    change = BudgetChange<T>(Budget<T>::of(*record), Budget<T>::of(scalars));
  }
  ADAMAL_HD ADAMAL_INLINE void see(T before, T after) { seen.add_element(before, after, change); }
};

// What one thread of a block, which has something to step, has seen.
template <typename Key, typename Params>
ADAMAL_HD ADAMAL_INLINE Seen<typename Key::Compute> watched_thread(const Params& params,
                                                                   int64_t block, int thread,
                                                                   const ItemRecord* record) {
  ThreadWatch<typename Key::Compute> watch{record};
  step_block<Key>(params, block, thread, watch);
  return watch.seen;
}

// Writes what all threads of a block have seen, once all of them have read the record.
template <typename T, typename Params>
ADAMAL_HD ADAMAL_INLINE void record_block(const Params& params, int64_t block, const Seen<T>& seen,
                                          ItemRecord* record) {
  const StepScalars<T> scalars =
      params.scalars_of(params.items[block].tensor - params.first_tensor);
  record_step(seen, scalars, Budget<T>::of(scalars), record);
}

}  // namespace adamal
