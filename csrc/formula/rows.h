// How the rows of a set that couples elements lie in a tensor.
#pragma once

#include <cstdint>

#include "formula/sets.h"

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

inline bool operator==(const CoupledRows& a, const CoupledRows& b) {
  const auto same = [](int count, const int64_t* first, const int64_t* second) {
    for (int i = 0; i < count; ++i) {
      if (first[i] != second[i]) return false;
    }
    return true;
  };
  return a.set.kind == b.set.kind && a.set.size == b.set.size &&
         a.set.tolerance == b.set.tolerance && a.kept_count == b.kept_count &&
         a.reduced_count == b.reduced_count && same(a.kept_count, a.kept_sizes, b.kept_sizes) &&
         same(a.kept_count, a.kept_strides, b.kept_strides) &&
         same(a.reduced_count, a.reduced_sizes, b.reduced_sizes) &&
         same(a.reduced_count, a.reduced_strides, b.reduced_strides);
}

// Whether every element of a dense tensor belongs to one row, and the rows are numbered in the
// order of their first elements.
inline bool covers(const CoupledRows& rows, int64_t numel) {
  if (rows.rows < 0 || rows.length < 0) return false;
  if (numel == 0) return rows.rows == 0 || rows.length == 0;
  // The digits of both numbers, from the fastest on, must be those of an address.
  int kept = rows.kept_count - 1, reduced = rows.reduced_count - 1;
  int64_t stride = 1, kept_elements = 1, reduced_elements = 1;
  const auto take = [&](const int64_t* sizes, const int64_t* strides, int* digit,
                        int64_t* elements) {
    const int i = *digit;
    if (i < 0 || sizes[i] < 1 || (sizes[i] != 1 && strides[i] != stride) ||
        sizes[i] > numel / stride) {
      return false;
    }
    stride *= sizes[i];
    *elements *= sizes[i];
    --*digit;
    return true;
  };
  while (kept >= 0 || reduced >= 0) {
    if (!take(rows.reduced_sizes, rows.reduced_strides, &reduced, &reduced_elements) &&
        !take(rows.kept_sizes, rows.kept_strides, &kept, &kept_elements)) {
      return false;
    }
  }
  return stride == numel && kept_elements == rows.rows && reduced_elements == rows.length;
}

}  // namespace adamal
