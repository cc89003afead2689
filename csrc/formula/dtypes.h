// The storage types and the formats a step can read; the twin of adamal_kernels/core/storage.py.
#pragma once

#include <cstdint>

namespace adamal {

using float32 = float;
using float64 = double;

// The 16-bit types are bits only; formula/storage.h converts them. All arithmetic is float32 or
// float64.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

enum class Dtype { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// A format: (index, parameter, gradient, exp_avg, exp_avg_sq), in the order of storage.FORMATS. A
// maximum of the second moments is stored as they are.
#define ADAMAL_FORMATS(X)                    \
  X(0, float32, float32, float32, float32)   \
  X(1, float64, float64, float64, float64)   \
  X(2, bfloat16, bfloat16, float32, float32) \
  X(3, float16, float16, float32, float32)   \
  X(4, bfloat16, float32, float32, float32)  \
  X(5, float16, float32, float32, float32)   \
  X(6, float32, bfloat16, float32, float32)  \
  X(7, float32, float16, float32, float32)

struct Format {
  Dtype param;
  Dtype grad;
  Dtype exp_avg;
  Dtype exp_avg_sq;

  // What a step computes in.
  constexpr Dtype compute() const {
    return param == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  }
};

#define ADAMAL_ENTRY(index, param, grad, exp_avg, exp_avg_sq) \
  {Dtype::param, Dtype::grad, Dtype::exp_avg, Dtype::exp_avg_sq},
inline constexpr Format kFormats[] = {ADAMAL_FORMATS(ADAMAL_ENTRY)};
#undef ADAMAL_ENTRY

inline constexpr int kFormatCount = sizeof(kFormats) / sizeof(kFormats[0]);

// The type a step computes in, by the parameter's.
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

// What a projection reads and writes, as types.
template <typename ParamType, typename ExpAvgSqType>
struct RowTypes {
  using Param = ParamType;
  using ExpAvgSq = ExpAvgSqType;
  using Compute = ComputeType<Param>;
};

}  // namespace adamal
