// The state tensors of a parameter: one table, a row a tensor.
#pragma once

#include <utility>

#include "formula/dtypes.h"
#include "formula/element.h"

namespace adamal {

// Laid out as the parameter, or a float64 for each row of its set.
enum class BufferShape { parameter, rows };
enum class BufferNeeds { nothing, amsgrad, row_set };

// (key, shape, needs, type), in the order of BUFFERS in adamal_kernels/core/buffers.py.
#define ADAMAL_BUFFERS(X)                                  \
  X(exp_avg, parameter, nothing, format.exp_avg)           \
  X(exp_avg_sq, parameter, nothing, format.exp_avg_sq)     \
  X(max_exp_avg_sq, parameter, amsgrad, format.exp_avg_sq) \
  X(multiplier, rows, row_set, Dtype::float64)

struct Buffer {
#define ADAMAL_NAME(key, ...) key,
  enum Index : int { ADAMAL_BUFFERS(ADAMAL_NAME) count };
#undef ADAMAL_NAME

  const char* key;  // in a parameter's state
  BufferShape shape;
  BufferNeeds needs;

  constexpr bool exists(SecondMoment second_moment, bool has_row_set) const {
    return needs == BufferNeeds::nothing ||
           (needs == BufferNeeds::amsgrad ? second_moment == SecondMoment::amsgrad : has_row_set);
  }
};

#define ADAMAL_ROW(key, shape, needs, type) {#key, BufferShape::shape, BufferNeeds::needs},
inline constexpr Buffer kBuffers[Buffer::count] = {ADAMAL_BUFFERS(ADAMAL_ROW)};
#undef ADAMAL_ROW

// The type that a buffer is stored in.
constexpr Dtype buffer_dtype(int which, [[maybe_unused]] const Format& format) {
#define ADAMAL_TYPE(key, shape, needs, type) \
  case Buffer::key:                          \
    return type;
  switch (which) { ADAMAL_BUFFERS(ADAMAL_TYPE) }
#undef ADAMAL_TYPE
  return Dtype::float64;
}

// Calls body(std::integral_constant<int, index>) for each buffer until one call returns false, and
// returns whether none did. A loop would cost the host some tens of instructions a tensor.
template <typename Body, int... kIndices>
bool for_buffers(const Body& body, std::integer_sequence<int, kIndices...>) {
  return (body(std::integral_constant<int, kIndices>{}) && ...);
}

template <typename Body>
bool for_buffers(const Body& body) {
  return for_buffers(body, std::make_integer_sequence<int, Buffer::count>{});
}

}  // namespace adamal
