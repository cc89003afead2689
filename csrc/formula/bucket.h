// What one step of one bucket works on, as plain pointers.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "formula/buffers.h"
#include "formula/dtypes.h"
#include "formula/element.h"
#include "formula/rows.h"
#include "formula/scalars.h"
#include "formula/watch.h"

namespace adamal {

// Addresses of a tensor's first element. Element i of a buffer of the parameter's shape belongs to
// element i of the parameter.
struct TensorEntry {
  void* param;
  int64_t numel;
  void* buffers[Buffer::count];  // nullptr: there is none

  // The second moment whose root divides: with amsgrad its maximum.
  ADAMAL_HD const void* divisor() const {
    const void* const maximum = buffers[Buffer::max_exp_avg_sq];
    return maximum == nullptr ? buffers[Buffer::exp_avg_sq] : maximum;
  }
  ADAMAL_HD double* multipliers() const {
    return static_cast<double*>(buffers[Buffer::multiplier]);
  }
};

inline bool operator==(const TensorEntry& a, const TensorEntry& b) {
  static_assert(std::has_unique_object_representations_v<TensorEntry>);
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

// Elements [chunk * n, (chunk + 1) * n) of a tensor, where n is the backend's chunk size.
struct WorkItem {
  uint32_t tensor;
  uint32_t chunk;
};

// Work items are sorted by tensor, and hold every chunk of every tensor in order.
struct Bucket {
  int format;  // index into kFormats
  SecondMoment second_moment;
  const TensorEntry* tensors;
  int64_t tensor_count;
  const WorkItem* items;
  int64_t item_count;
  const void* const* grads;  // per tensor; nullptr: no gradient in this step, nothing changes
  const uint32_t* rows;  // per tensor: its row of scalars or options; not read without a gradient
  const StepScalars<double>* scalars;
  int64_t scalar_count;
  const DeviceScalars* device;  // instead of scalars; else null
  const CoupledRows* sets;      // per tensor; null where no set couples elements
  ItemRecord* const* records;   // per tensor, of each of its items; null: the step is not watched
  bool exceeds_caches = false;  // of the CPU, which hold little of it from step to step
  bool threads_are_awake = false;  // torch's on the CPU: they have just worked
};

// What selects a kernel, as types: those that streams are stored in, and what is computed in.
template <SecondMoment kMoment, typename ParamType, typename GradType, typename ExpAvgType,
          typename ExpAvgSqType>
struct KernelKey {
  static constexpr SecondMoment kSecondMoment = kMoment;
  static constexpr bool kHasMax = kMoment == SecondMoment::amsgrad;
  using Param = ParamType;
  using Grad = GradType;
  using ExpAvg = ExpAvgType;
  using ExpAvgSq = ExpAvgSqType;
  using Compute = ComputeType<Param>;
  using Rows = RowTypes<Param, ExpAvgSq>;
};

// Calls `call(KernelKey<...>{})` for the bucket's format and second moment; false if there is none.
template <typename Call>
bool dispatch(const Bucket& bucket, Call&& call) {
#define ADAMAL_CASE(second_moment, ...)                          \
  case SecondMoment::second_moment:                              \
    call(KernelKey<SecondMoment::second_moment, __VA_ARGS__>{}); \
    return true;
#define ADAMAL_FORMAT_CASE(index, ...)   \
  case index:                            \
    switch (bucket.second_moment) {      \
      ADAMAL_CASE(monotone, __VA_ARGS__) \
      ADAMAL_CASE(plain, __VA_ARGS__)    \
      ADAMAL_CASE(amsgrad, __VA_ARGS__)  \
    }                                    \
    return false;
  switch (bucket.format) { ADAMAL_FORMATS(ADAMAL_FORMAT_CASE) }
  return false;
#undef ADAMAL_FORMAT_CASE
#undef ADAMAL_CASE
}

inline constexpr const char* kNoKernel = "no kernel for this format and second moment";

}  // namespace adamal
