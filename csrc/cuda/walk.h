// The CUDA walk: (block, thread) -> elements, on the device and, for the tests, on the host.
//
// A block takes one work item. Its threads share nothing and never wait for one another, so any
// order of blocks and threads gives the same result.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/step.h"
#include "formula/bucket.h"
#include "formula/storage.h"

#ifdef __CUDACC__
#define ADAMAL_UNROLL _Pragma("unroll")
#define ADAMAL_ROLL _Pragma("unroll 1")
#define ADAMAL_INLINE __forceinline__
#else
#define ADAMAL_UNROLL
#define ADAMAL_ROLL
#define ADAMAL_INLINE inline
#endif

namespace adamal {

inline constexpr int kAccessBytes = 16;

// What one load or store instruction moves.
struct alignas(kAccessBytes) Access16 {
  uint32_t word[4];
};
inline ADAMAL_HD bool operator!=(const Access16& a, const Access16& b) {
  return ((a.word[0] ^ b.word[0]) | (a.word[1] ^ b.word[1]) | (a.word[2] ^ b.word[2]) |
          (a.word[3] ^ b.word[3])) != 0;
}

template <int kBytes>
struct AccessOf;
template <>
struct AccessOf<2> {
  using type = uint16_t;
};
template <>
struct AccessOf<4> {
  using type = uint32_t;
};
template <>
struct AccessOf<8> {
  using type = uint64_t;
};
template <>
struct AccessOf<16> {
  using type = Access16;
};

// The host traps what the device would: an address that does not fit its access.
inline void require_aligned(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    std::fprintf(stderr, "access of %zu bytes at misaligned address %p\n", alignment, address);
    std::abort();
  }
}

template <typename Access>
ADAMAL_HD ADAMAL_INLINE Access load_access(const void* address) {
#ifdef __CUDA_ARCH__
  return *static_cast<const Access*>(address);
#else
  require_aligned(address, sizeof(Access));
  Access access;
  memcpy(&access, address, sizeof(access));
  return access;
#endif
}

template <typename Access>
ADAMAL_HD ADAMAL_INLINE void store_access(void* address, const Access& access) {
#ifdef __CUDA_ARCH__
  *static_cast<Access*>(address) = access;
#else
  require_aligned(address, sizeof(Access));
  memcpy(address, &access, sizeof(access));
#endif
}

// Consecutive elements of one stream in registers, moved by 16-byte accesses; a single one by an
// access of its own size.
template <typename Storage, int kLanes>
struct Pack {
  static constexpr int kAccessLanes = kLanes == 1 ? 1 : kAccessBytes / int(sizeof(Storage));
  static_assert(kLanes % kAccessLanes == 0);
  using Access = typename AccessOf<kAccessLanes * sizeof(Storage)>::type;

  Storage lane[kLanes];

  ADAMAL_HD ADAMAL_INLINE void load(const Storage* source) {
    ADAMAL_UNROLL
    for (int i = 0; i < kLanes; i += kAccessLanes) {
      const Access access = load_access<Access>(source + i);
      memcpy(&lane[i], &access, sizeof(access));
    }
  }

  ADAMAL_HD ADAMAL_INLINE void store(Storage* target) const {
    ADAMAL_UNROLL
    for (int i = 0; i < kLanes; i += kAccessLanes) store_access(target + i, access_at(i));
  }

  // Leaves out each access whose elements still are, to the bit, those of `before`.
  ADAMAL_HD ADAMAL_INLINE void store_changed(Storage* target, const Pack& before) const {
    ADAMAL_UNROLL
    for (int i = 0; i < kLanes; i += kAccessLanes) {
      const Access access = access_at(i);
      if (access != before.access_at(i)) store_access(target + i, access);
    }
  }

 private:
  ADAMAL_HD ADAMAL_INLINE Access access_at(int i) const {
    Access access;
    memcpy(&access, &lane[i], sizeof(access));
    return access;
  }
};

// What a block works on: the streams of one chunk. Key is a KernelKey.
template <typename Key>
struct Chunk {
  typename Key::Param* param;
  const typename Key::Grad* grad;
  typename Key::ExpAvg* exp_avg;
  typename Key::ExpAvgSq* exp_avg_sq;
  typename Key::ExpAvgSq* max_exp_avg_sq;  // nullptr unless amsgrad
  int count;

  ADAMAL_HD ADAMAL_INLINE bool is_aligned() const {
    const uintptr_t bits = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
                           reinterpret_cast<uintptr_t>(exp_avg) |
                           reinterpret_cast<uintptr_t>(exp_avg_sq) |
                           reinterpret_cast<uintptr_t>(max_exp_avg_sq);
    return bits % kAccessBytes == 0;
  }
};

template <typename T>
ADAMAL_HD constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}

// Elements in a vector: one 16-byte access of the smallest storage type, several of the others.
template <typename Key>
inline constexpr int kVectorWidth =
    kAccessBytes /
    int(min_of(min_of(sizeof(typename Key::Param), sizeof(typename Key::Grad)),
               min_of(sizeof(typename Key::ExpAvg), sizeof(typename Key::ExpAvgSq))));

// What a thread does besides: nothing. cuda/watched_block.h has the other.
struct NotWatching {
  template <typename T>
  ADAMAL_HD ADAMAL_INLINE void begin(const StepScalars<T>&) {}
  template <typename T>
  ADAMAL_HD ADAMAL_INLINE void see(T, T) {}
};

// Steps kBatch packs of kLanes elements, the first at `first`, each `stride` further. All loads
// are issued before the first is used: their latencies overlap.
template <int kLanes, int kBatch, typename Key, typename T, typename Watch>
ADAMAL_HD ADAMAL_INLINE void step_packs(const Chunk<Key>& chunk, const StepScalars<T>& scalars,
                                        int first, int stride, Watch& watch) {
  constexpr bool kHasMax = Key::kHasMax;
  Pack<typename Key::Param, kLanes> param[kBatch];
  Pack<typename Key::Grad, kLanes> grad[kBatch];
  Pack<typename Key::ExpAvg, kLanes> exp_avg[kBatch];
  Pack<typename Key::ExpAvgSq, kLanes> exp_avg_sq[kBatch];
  Pack<typename Key::ExpAvgSq, kLanes> max_exp_avg_sq[kHasMax ? kBatch : 1];

  ADAMAL_UNROLL
  for (int i = 0; i < kBatch; ++i) {
    const int offset = first + i * stride;
    param[i].load(chunk.param + offset);
    grad[i].load(chunk.grad + offset);
    exp_avg[i].load(chunk.exp_avg + offset);
    exp_avg_sq[i].load(chunk.exp_avg_sq + offset);
    if constexpr (kHasMax) max_exp_avg_sq[i].load(chunk.max_exp_avg_sq + offset);
  }

  ADAMAL_UNROLL
  for (int i = 0; i < kBatch; ++i) {
    const int offset = first + i * stride;
    const auto old_exp_avg_sq = exp_avg_sq[i];
    const auto old_max_exp_avg_sq = max_exp_avg_sq[kHasMax ? i : 0];
    ADAMAL_UNROLL
    for (int j = 0; j < kLanes; ++j) {
      auto* const maximum = kHasMax ? &max_exp_avg_sq[i].lane[j] : nullptr;
      const Element<T> old = load_element<Key>(&param[i].lane[j], &exp_avg[i].lane[j],
                                               &exp_avg_sq[i].lane[j], maximum);
      const Element<T> e =
          step_element<Key::kSecondMoment>(old, static_cast<T>(decode(grad[i].lane[j])), scalars);
      watch.see(kHasMax ? old.max_exp_avg_sq : old.exp_avg_sq,
                as_stored<typename Key::ExpAvgSq>(e.max_exp_avg_sq));
      store_element<Key>(e, &param[i].lane[j], &exp_avg[i].lane[j], &exp_avg_sq[i].lane[j],
                         maximum);
    }
    param[i].store(chunk.param + offset);
    exp_avg[i].store(chunk.exp_avg + offset);
    if constexpr (Key::kSecondMoment == SecondMoment::monotone) {
      exp_avg_sq[i].store_changed(chunk.exp_avg_sq + offset, old_exp_avg_sq);
    } else {
      exp_avg_sq[i].store(chunk.exp_avg_sq + offset);
    }
    if constexpr (kHasMax) {
      max_exp_avg_sq[i].store_changed(chunk.max_exp_avg_sq + offset, old_max_exp_avg_sq);
    }
  }
}

// One thread's share of a chunk. Neighbouring threads take neighbouring vectors.
template <typename Key, typename T, typename Watch>
ADAMAL_HD ADAMAL_INLINE void step_chunk(const Chunk<Key>& chunk, const StepScalars<T>& scalars,
                                        int thread, Watch& watch) {
  constexpr int kWidth = kVectorWidth<Key>;
  constexpr int kVectors = kCudaThreadElements<T> / kWidth;
  static_assert(kVectors * kWidth == kCudaThreadElements<T>);
  constexpr int kThreads = kCudaBlockThreads;

  if (!chunk.is_aligned()) {
    constexpr int kBatch = 4;
    int i = thread;
    for (; i + (kBatch - 1) * kThreads < chunk.count; i += kBatch * kThreads) {
      step_packs<1, kBatch>(chunk, scalars, i, kThreads, watch);
    }
    for (; i < chunk.count; i += kThreads) {
      step_packs<1, 1>(chunk, scalars, i, 0, watch);
    }
  } else if (chunk.count == kCudaChunk<T>) {
    step_packs<kWidth, kVectors>(chunk, scalars, thread * kWidth, kThreads * kWidth, watch);
  } else {
    for (int i = thread * kWidth; i < chunk.count; i += kThreads * kWidth) {
      if (i + kWidth <= chunk.count) {
        step_packs<kWidth, 1>(chunk, scalars, i, 0, watch);
      } else {
        for (int j = i; j < chunk.count; ++j) {
          step_packs<1, 1>(chunk, scalars, j, 0, watch);
        }
      }
    }
  }
}

// Resident blocks a multiprocessor must hold, which caps the registers: without it ptxas aims at 64
// registers and spills, with one more block as well. float64 and a third moment need more of them.
template <typename Key>
inline constexpr int kStepResidentBlocks =
    sizeof(typename Key::Compute) == sizeof(double) || Key::kHasMax ? 2 : 3;

// One thread of one block of a launch; LaunchParams is in cuda/launches.h.
template <typename Key, typename LaunchParams, typename Watch>
ADAMAL_HD ADAMAL_INLINE void step_block(const LaunchParams& params, int64_t block, int thread,
                                        Watch& watch) {
  using T = typename Key::Compute;
  using ExpAvgSq = typename Key::ExpAvgSq;
  if (params.is_skipped()) return;
  const WorkItem item = params.items[block];
  const uint32_t slot = item.tensor - params.first_tensor;
  const auto* grad = static_cast<const typename Key::Grad*>(params.grads[slot]);
  if (grad == nullptr) return;

  const TensorEntry tensor = params.tensors[item.tensor];
#ifdef __CUDA_ARCH__
  // A pointer read from memory is generic to the compiler: say that it need not be.
  __builtin_assume(__isGlobal(tensor.param));
  __builtin_assume(__isGlobal(tensor.buffers[Buffer::exp_avg]));
  __builtin_assume(__isGlobal(tensor.buffers[Buffer::exp_avg_sq]));
  if (Key::kHasMax) {
    __builtin_assume(__isGlobal(tensor.buffers[Buffer::max_exp_avg_sq]));
  }
#endif
  const int64_t offset = item.chunk * kCudaChunk<T>;
  Chunk<Key> chunk{static_cast<typename Key::Param*>(tensor.param) + offset,
                   grad + offset,
                   static_cast<typename Key::ExpAvg*>(tensor.buffers[Buffer::exp_avg]) + offset,
                   static_cast<ExpAvgSq*>(tensor.buffers[Buffer::exp_avg_sq]) + offset,
                   nullptr,
                   int(min_of(tensor.numel - offset, kCudaChunk<T>))};
  if constexpr (Key::kHasMax) {
    chunk.max_exp_avg_sq = static_cast<ExpAvgSq*>(tensor.buffers[Buffer::max_exp_avg_sq]) + offset;
  }
  const StepScalars<T> scalars = params.scalars_of(slot);
  watch.begin(scalars);
  step_chunk(chunk, scalars, thread, watch);
}

template <typename Key, typename LaunchParams>
ADAMAL_HD ADAMAL_INLINE void step_block(const LaunchParams& params, int64_t block, int thread) {
  NotWatching watch;
  step_block<Key>(params, block, thread, watch);
}

}  // namespace adamal
