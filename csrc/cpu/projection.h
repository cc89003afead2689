// The CPU step of a bucket whose sets couple elements.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "formula/bucket.h"
#include "formula/rows.h"

namespace adamal {

// Steps a bucket's tensors and projects what the step stored, in the order of formula/sets.h, so
// that the results depend on no share or thread. Three kinds of rows:
// - short ones that lie contiguously: some of them are stepped and at once projected, in cache;
// - long ones that lie contiguously: the step sums up what tells whether they are in their sets,
//   and what begins a search where the last step projected; threads share the search's sums;
// - scattered ones: after the step, each is projected by one thread, neighbours together.
class ProjectedStep {
 public:
  // Calls body(first, last) for ranges that make up all pieces of work, in any order or in
  // parallel, and returns when all are done. cost_before[i] is the cost of the pieces before i.
  using Body = std::function<void(int64_t first, int64_t last)>;
  using ForShares = std::function<void(const std::vector<int64_t>& cost_before, const Body& body)>;

  // Each set's rows cover its tensor; `compute` is what a step of them computes in.
  void bind(const std::vector<TensorEntry>& tensors, const std::vector<CoupledRows>& sets,
            Dtype compute);

  // Of a bucket of the bound tensors and sets. One that is watched has been stepped: its records
  // are of other items.
  void step(const Bucket& bucket, const ForShares& for_shares);

 private:
  // Consecutive elements that are stepped by one thread.
  struct Item {
    enum Rows { whole, part_of_long, scattered };
    uint32_t tensor;
    Rows rows;
    int64_t first;
    int64_t count;
    int64_t long_row;  // index, where it is a part of one
  };
  struct LongRow {
    uint32_t tensor;
    int64_t row;
    int64_t first_item;
    int64_t item_count;
    int64_t first_sum;  // of its chunks
    int64_t sum_count;
    RowSearch search;
  };
  // Rows that are projected together.
  struct Block {
    uint32_t tensor;
    int32_t count;
    int64_t first_row;
  };
  struct Sums {
    double size;
    SetTerms terms;
  };

  void add_items(uint32_t tensor, Item::Rows rows, int64_t first, int64_t last, int64_t most);
  template <typename Types>
  class Run;

  std::vector<Item> items_;
  std::vector<int64_t> item_costs_;  // of all items before
  std::vector<LongRow> long_rows_;
  std::vector<Sums> sums_;  // by chunk of the long rows
  std::vector<Block> blocks_;
  std::vector<int64_t> block_costs_;
};

}  // namespace adamal
