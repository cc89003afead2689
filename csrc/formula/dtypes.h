// The storage types and the pairs of them a step can read; the twin of adamal_kernels/core/storage.py.
#pragma once

#include <cstdint>

namespace adamal {

using float32 = float;
using float64 = double;

// The 16-bit types are bits only; storage.h converts them. All arithmetic is float32 or float64.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class Dtype { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// (index, parameter, gradient) in the order of dtypes.DTYPE_PAIRS.
#define ADAMAL_DTYPE_PAIRS(X) \
  X(0, float32, float32)      \
  X(1, float64, float64)      \
  X(2, bfloat16, bfloat16)    \
  X(3, float16, float16)      \
  X(4, bfloat16, float32)     \
  X(5, float16, float32)      \
  X(6, float32, bfloat16)     \
  X(7, float32, float16)

struct DtypePair {
  Dtype param;
  Dtype grad;
};

#define ADAMAL_PAIR_ENTRY(index, param, grad) {Dtype::param, Dtype::grad},
inline constexpr DtypePair kDtypePairs[] = {ADAMAL_DTYPE_PAIRS(ADAMAL_PAIR_ENTRY)};
#undef ADAMAL_PAIR_ENTRY

inline constexpr int kDtypePairCount = sizeof(kDtypePairs) / sizeof(kDtypePairs[0]);

// The type a step computes in and keeps its moments in.
template <typename Param>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <typename Param>
using ComputeType = typename ComputeTypeOf<Param>::type;

}  // namespace adamal
