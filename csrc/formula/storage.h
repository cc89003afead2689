// Storage types: decode to the compute type, encode with one rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "formula/dtypes.h"
#include "formula/element.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace adamal {

template <typename To, typename From>
ADAMAL_HD inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// The host's 16-bit conversions in integers and selects, which compilers vectorise.
namespace host {

constexpr uint32_t kFloat32Infinity = 0x7f800000;
// Added to a small float, 0.5 rounds it (to nearest even) to a multiple of 2^-24, the unit of
// float16's denormals, and leaves the multiple in its mantissa.
constexpr uint32_t kHalfBits = 0x3f000000;
constexpr uint32_t kFloat16ExponentShift = (127 - 15) << 23;

inline float decode_bfloat16(uint16_t bits) { return bit_cast<float>(uint32_t(bits) << 16); }

inline uint16_t encode_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // The carry of the rounding would turn some NaNs into infinities or zeros.
  const bool is_nan = (bits & 0x7fffffff) > kFloat32Infinity;
  return static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
}

inline float decode_float16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  const float denormal = bit_cast<float>(kHalfBits + magnitude) - 0.5f;
  uint32_t result = (magnitude << 13) + kFloat16ExponentShift;
  result = magnitude < 0x0400 ? bit_cast<uint32_t>(denormal) : result;
  result = magnitude >= 0x7c00 ? (magnitude << 13) | kFloat32Infinity : result;
  return bit_cast<float>(sign | result);
}

inline uint16_t encode_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const float denormal = bit_cast<float>(magnitude) + 0.5f;
  uint32_t result = (magnitude - kFloat16ExponentShift + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  result = magnitude < 0x38800000 ? bit_cast<uint32_t>(denormal) - kHalfBits : result;  // < 2^-14
  result = magnitude >= 0x47800000 ? 0x7c00 : result;                                   // >= 2^16
  result = magnitude > kFloat32Infinity ? 0x7e00 : result;
  return static_cast<uint16_t>(sign | result);
}

}  // namespace host

ADAMAL_HD inline float decode(float stored) { return stored; }
ADAMAL_HD inline double decode(double stored) { return stored; }

ADAMAL_HD inline float decode(bfloat16 stored) {
#ifdef __CUDA_ARCH__
  return __bfloat162float(__ushort_as_bfloat16(stored.bits));
#else
  return host::decode_bfloat16(stored.bits);
#endif
}

ADAMAL_HD inline float decode(float16 stored) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(stored.bits));
#else
  return host::decode_float16(stored.bits);
#endif
}

// A 16-bit type is encoded from float32 only: from float64 it would be rounded twice.
template <typename Storage, typename T>
ADAMAL_HD inline Storage encode(T value) {
  if constexpr (std::is_same_v<Storage, T>) {
    return value;
  } else {
    static_assert(std::is_same_v<T, float> &&
                  (std::is_same_v<Storage, bfloat16> || std::is_same_v<Storage, float16>));
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<Storage, bfloat16>) {
      return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
    } else {
      return {__half_as_ushort(__float2half_rn(value))};
    }
#else
    if constexpr (std::is_same_v<Storage, bfloat16>) {
      return {host::encode_bfloat16(value)};
    } else {
      return {host::encode_float16(value)};
    }
#endif
  }
}

// An element as it is stored; Key is a KernelKey. A struct of the stored values would not do: GCC
// takes loops over one that has a 16-bit member for too irregular to vectorise.
template <typename Key>
ADAMAL_HD inline Element<typename Key::Compute> load_element(
    const typename Key::Param* param, const typename Key::ExpAvg* exp_avg,
    const typename Key::ExpAvgSq* exp_avg_sq,
    [[maybe_unused]] const typename Key::ExpAvgSq* max_exp_avg_sq) {
  using T = typename Key::Compute;
  Element<T> e{static_cast<T>(decode(*param)), static_cast<T>(decode(*exp_avg)),
               static_cast<T>(decode(*exp_avg_sq)), T(0)};
  if constexpr (Key::kHasMax) e.max_exp_avg_sq = static_cast<T>(decode(*max_exp_avg_sq));
  return e;
}

template <typename Key>
ADAMAL_HD inline void store_element(const Element<typename Key::Compute>& e,
                                    typename Key::Param* param, typename Key::ExpAvg* exp_avg,
                                    typename Key::ExpAvgSq* exp_avg_sq,
                                    [[maybe_unused]] typename Key::ExpAvgSq* max_exp_avg_sq) {
  *param = encode<typename Key::Param>(e.param);
  *exp_avg = encode<typename Key::ExpAvg>(e.exp_avg);
  *exp_avg_sq = encode<typename Key::ExpAvgSq>(e.exp_avg_sq);
  if constexpr (Key::kHasMax) {
    *max_exp_avg_sq = encode<typename Key::ExpAvgSq>(e.max_exp_avg_sq);
  }
}

// A value as it is read again once it has been stored.
template <typename Storage, typename T>
ADAMAL_HD inline T as_stored(T value) {
  return static_cast<T>(decode(encode<Storage>(value)));
}

}  // namespace adamal
