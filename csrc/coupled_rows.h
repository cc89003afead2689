// How the rows of a set that couples elements lie in a tensor.
#pragma once

#include <cstdint>

#include "coupled_sets.h"

namespace adamal {

// Row r is a mixed-radix number over `kept`, element j of a row one over `reduced`, the last digit
// the fastest; a digit moves by its stride, and strides fall.
struct CoupledRows {
  static constexpr int kMostRuns = 4;

  CoupledSet set;
  int64_t rows;
  int64_t length;
  int32_t kept_count;
  int32_t reduced_count;
  int64_t kept_sizes[kMostRuns];
  int64_t kept_strides[kMostRuns];
  int64_t reduced_sizes[kMostRuns];
  int64_t reduced_strides[kMostRuns];

  // Of the row's first element, in elements from the tensor's.
  ADAMAL_HD int64_t row_offset(int64_t row) const {
    return offset(row, kept_count, kept_sizes, kept_strides);
  }
  // Of element j, from the row's first.
  ADAMAL_HD int64_t element_offset(int64_t j) const {
    return offset(j, reduced_count, reduced_sizes, reduced_strides);
  }
  ADAMAL_HD int64_t offset_of(int64_t row, int64_t j) const {
    return row_offset(row) + element_offset(j);
  }
  // Whether the elements of a row are neighbours in memory.
  ADAMAL_HD bool is_contiguous() const { return reduced_count == 1 && reduced_strides[0] == 1; }

 private:
  ADAMAL_HD static int64_t offset(int64_t index, int count, const int64_t* sizes,
                                  const int64_t* strides) {
    int64_t sum = 0;
    for (int i = count - 1; i > 0; --i) {
      sum += index % sizes[i] * strides[i];
      index /= sizes[i];
    }
    return count == 0 ? sum : sum + index * strides[0];
  }
};

}  // namespace adamal
