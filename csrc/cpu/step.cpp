// The CPU step: the plain loop over the element function, vectorised by the compiler.
#include "cpu/step.h"

#include <algorithm>
#include <type_traits>

#include "cpu/multiversioned.h"
#include "cpu/watch.h"
#include "formula/storage.h"

namespace adamal {
namespace {

// The divisions and the root of a vector take so long that the processor looks too few vectors
// ahead to keep the memory busy: ask for what comes some blocks later, into the tensor's next
// chunk. Of a bucket that exceeds the caches without a place in the last of them, which would only
// be written back from there; a bucket that they hold would be slower for it. Both, and the
// distance, are chosen by measurement.
constexpr int64_t kBlock = 64;
constexpr int64_t kAhead = 3 * kBlock;

template <typename Storage>
inline void prefetch_block(const Storage* first, bool exceeds_caches) {
  constexpr int64_t kLine = 64 / sizeof(Storage);
  constexpr int kStays = 3, kLeaves = 0;
  for (int64_t i = 0; i < kBlock; i += kLine) {
    if (exceeds_caches) {
      __builtin_prefetch(first + i, 0, kLeaves);
    } else {
      __builtin_prefetch(first + i, 0, kStays);
    }
  }
}

// Steps `count` elements; `remaining`, no fewer, are left to the tensor's end.
template <typename Key, bool kGuarded, typename Watch, typename T = typename Key::Compute>
ADAMAL_MULTIVERSIONED void step_elements(typename Key::Param* __restrict param,
                                         const typename Key::Grad* __restrict grad,
                                         typename Key::ExpAvg* __restrict exp_avg,
                                         typename Key::ExpAvgSq* __restrict exp_avg_sq,
                                         typename Key::ExpAvgSq* __restrict max_exp_avg_sq,
                                         int64_t count, int64_t remaining, bool exceeds_caches,
                                         const StepScalars<T>& shared_scalars,
                                         const BudgetChange<T>& change, Seen<T>* seen) {
  constexpr bool kHasMax = Key::kHasMax;
  // A copy: through the reference, the stores below might change it.
  const StepScalars<T> scalars = shared_scalars;
  Watch watch(change, seen);
  for (int64_t first = 0; first < count; first += kBlock) {
    if (const int64_t later = first + kAhead; later + kBlock <= remaining) {
      prefetch_block(param + later, exceeds_caches);
      prefetch_block(grad + later, exceeds_caches);
      prefetch_block(exp_avg + later, exceeds_caches);
      prefetch_block(exp_avg_sq + later, exceeds_caches);
      if constexpr (kHasMax) prefetch_block(max_exp_avg_sq + later, exceeds_caches);
    }
    const int64_t last = std::min(first + kBlock, count);
    for (int64_t i = first; i < last; ++i) {
      auto* const maximum = kHasMax ? max_exp_avg_sq + i : nullptr;
      const Element<T> old = load_element<Key>(param + i, exp_avg + i, exp_avg_sq + i, maximum);
      const Element<T> e =
          step_element<Key::kSecondMoment, kGuarded>(old, static_cast<T>(decode(grad[i])), scalars);
      store_element<Key>(e, param + i, exp_avg + i, exp_avg_sq + i, maximum);
      watch.see(i - first, kHasMax ? old.max_exp_avg_sq : old.exp_avg_sq,
                as_stored<typename Key::ExpAvgSq>(e.max_exp_avg_sq));
    }
    watch.end_block((kHasMax ? max_exp_avg_sq : exp_avg_sq) + first, last - first, last == count);
  }
}

// The streams of one work item; grad is null where the tensor has none.
template <typename Key>
struct Span {
  using Param = typename Key::Param;
  using Grad = typename Key::Grad;
  using ExpAvg = typename Key::ExpAvg;
  using ExpAvgSq = typename Key::ExpAvgSq;

  Param* param;
  const Grad* grad;
  ExpAvg* exp_avg;
  ExpAvgSq* exp_avg_sq;
  ExpAvgSq* max_exp_avg_sq;
  int64_t count;
  int64_t remaining;  // to the tensor's end

  Span(const Bucket& bucket, WorkItem item) : grad(nullptr) {
    const TensorEntry& tensor = bucket.tensors[item.tensor];
    const int64_t offset = item.chunk * kCpuChunk;
    param = static_cast<Param*>(tensor.param) + offset;
    if (const void* first = bucket.grads[item.tensor]) {
      grad = static_cast<const Grad*>(first) + offset;
    }
    exp_avg = static_cast<ExpAvg*>(tensor.buffers[Buffer::exp_avg]) + offset;
    exp_avg_sq = static_cast<ExpAvgSq*>(tensor.buffers[Buffer::exp_avg_sq]) + offset;
    max_exp_avg_sq = static_cast<ExpAvgSq*>(tensor.buffers[Buffer::max_exp_avg_sq]);
    if (max_exp_avg_sq != nullptr) max_exp_avg_sq += offset;
    remaining = tensor.numel - offset;
    count = std::min(kCpuChunk, remaining);
  }

  // Of the tensor's first item: moves on to elements [first, first + elements) of the tensor.
  void move_to(int64_t first, int64_t elements) {
    param += first;
    grad += first;
    exp_avg += first;
    exp_avg_sq += first;
    if (max_exp_avg_sq != nullptr) max_exp_avg_sq += first;
    count = elements;
    remaining -= first;
  }

  void prefetch_start() const {
    __builtin_prefetch(param, 1);
    __builtin_prefetch(grad);
    __builtin_prefetch(exp_avg, 1);
    __builtin_prefetch(exp_avg_sq, 1);
    if (max_exp_avg_sq != nullptr) __builtin_prefetch(max_exp_avg_sq, 1);
  }
};

// The guards cost as much as all else: they are left out where they would change nothing.
template <typename Key, typename Watch, typename T>
void step_span(const Span<Key>& span, bool exceeds_caches, const StepScalars<T>& scalars,
               const BudgetChange<T>& change, Seen<T>* seen) {
  const auto step =
      scalars.need_guards() ? step_elements<Key, true, Watch> : step_elements<Key, false, Watch>;
  step(span.param, span.grad, span.exp_avg, span.exp_avg_sq, span.max_exp_avg_sq, span.count,
       span.remaining, exceeds_caches, scalars, change, seen);
}

template <typename Key, bool kWatched>
void step_items(const Bucket& bucket, int64_t first_item, int64_t last_item) {
  using T = typename Key::Compute;
  // Small tensors lie anywhere: the next ones are fetched while these are stepped.
  constexpr int64_t kItemsAhead = 8;
  StepScalars<T> scalars;
  Budget<T> now{};
  int64_t scalars_row = -1;
  using Watch = std::conditional_t<kWatched, Watched<Key, kBlock>, Unwatched<T>>;
  Seen<T> seen = Seen<T>::nothing();
  int64_t seen_tensor = -1;
  for (int64_t i = first_item; i < last_item; ++i) {
    if (i + kItemsAhead < last_item) {
      const WorkItem ahead = bucket.items[i + kItemsAhead];
      Span<Key>(bucket, ahead).prefetch_start();
      if constexpr (kWatched) __builtin_prefetch(bucket.records[ahead.tensor] + ahead.chunk, 1);
    }
    const WorkItem item = bucket.items[i];
    const Span<Key> span(bucket, item);
    if (span.grad == nullptr) continue;
    if (const uint32_t row = bucket.rows[item.tensor]; row != scalars_row) {
      scalars = StepScalars<T>(bucket.scalars[row]);
      scalars_row = row;
      if constexpr (kWatched) now = Budget<T>::of(scalars);
    }
    const auto step_with = [&](const BudgetChange<T>& change) {
      step_span<Key, Watch>(span, bucket.exceeds_caches, scalars, change, &seen);
    };
    if constexpr (kWatched) {
      ItemRecord* const record = bucket.records[item.tensor] + item.chunk;
      // Of a tensor's items it is the least change that counts: the next ones look for less only.
      const T least = item.tensor == seen_tensor ? seen.least_change : T(INFINITY);
      seen = Seen<T>::nothing();
      seen.least_change = least;
      seen_tensor = item.tensor;
      step_with(BudgetChange<T>(Budget<T>::of(*record), now));
      record_step(seen, scalars, now, record);
    } else {
      step_with(BudgetChange<T>({}, {}));
    }
  }
}

}  // namespace

void step_cpu(const Bucket& bucket, int64_t first_item, int64_t last_item) {
  dispatch(bucket, [&](auto key) {
    if (bucket.records == nullptr) {
      step_items<decltype(key), false>(bucket, first_item, last_item);
    } else {
      step_items<decltype(key), true>(bucket, first_item, last_item);
    }
  });
}

void step_elements_cpu(const Bucket& bucket, uint32_t tensor, int64_t first, int64_t count) {
  if (bucket.grads[tensor] == nullptr) return;
  dispatch(bucket, [&](auto key) {
    using Key = decltype(key);
    using T = typename Key::Compute;
    Span<Key> span(bucket, WorkItem{tensor, 0});
    span.move_to(first, count);
    const StepScalars<T> scalars(bucket.scalars[bucket.rows[tensor]]);
    step_span<Key, Unwatched<T>>(span, bucket.exceeds_caches, scalars, BudgetChange<T>({}, {}),
                                 static_cast<Seen<T>*>(nullptr));
  });
}

}  // namespace adamal
