#include "cpu/projection.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "cpu/set_loops.h"
#include "cpu/step.h"
#include "formula/storage.h"

namespace adamal {
namespace {

// What a piece of work costs besides its elements, in elements.
constexpr int64_t kPieceOverhead = 64;
// Scattered rows that are neighbours share cache lines: of float32, this many a line.
constexpr int32_t kMostRows = 16;
// Elements whose values and metric a thread holds at once: two megabytes, of the last cache. What
// does not fit is gathered anew for every evaluation, which for columns takes far longer: each of
// their lines is on a page of its own.
constexpr int64_t kTileElements = 131072;
static_assert(kTileElements / kMostRows >= kNormChunk<float> && kTileElements >= kCpuChunk);

// What a projection reads and writes of a tensor.
template <typename Types>
struct View {
  using Param = typename Types::Param;
  using ExpAvgSq = typename Types::ExpAvgSq;
  using T = typename Types::Compute;

  bool is_projected;
  Param* param;
  const ExpAvgSq* denominator_sq;
  double* multipliers;
  const CoupledRows& rows;
  StepScalars<T> scalars;

  View(const Bucket& bucket, uint32_t index)
      : is_projected(bucket.grads[index] != nullptr), rows(bucket.sets[index]) {
    if (!is_projected) return;  // It has no scalars either.
    const TensorEntry& tensor = bucket.tensors[index];
    param = static_cast<Param*>(tensor.param);
    denominator_sq = static_cast<const ExpAvgSq*>(tensor.divisor());
    multipliers = tensor.multipliers();
    scalars = StepScalars<T>(bucket.scalars[bucket.rows[index]]);
    is_projected = projects(scalars);
  }
};

// The values and the metric of some elements of some rows, row by row.
class Tile {
 public:
  Tile() : memory_(new double[2 * kSize]), y_(memory_.get()), d_(y_ + kSize) {}

  // Of at most `width` elements a row.
  void begin(int64_t width) {
    width_ = width;
    values_from_ = metric_from_ = -1;
  }
  int64_t width() const { return width_; }
  double* y(int64_t row) { return y_ + row * stride(); }
  double* d(int64_t row) { return d_ + row * stride(); }

  // Read what is not there yet, from element `first` of each row on.
  template <typename Types>
  void read_values(const View<Types>& view, int64_t first_row, int64_t rows, int64_t first) {
    if (values_from_ == first) return;
    values_from_ = first;
    gather(view.param, view.rows, first_row, rows, y_);
  }
  template <typename Types>
  void read_all(const View<Types>& view, int64_t first_row, int64_t rows, int64_t first) {
    read_values(view, first_row, rows, first);
    if (metric_from_ == first) return;
    metric_from_ = first;
    gather(view.denominator_sq, view.rows, first_row, rows, d_);
    for (int64_t i = 0; i < rows; ++i) to_metric(d(i), count(view.rows), view.scalars);
  }

  // Elements that were read of each row.
  int64_t count(const CoupledRows& rows) const {
    return std::min(width_, rows.length - values_from_);
  }

  // Writes the values of those rows that were found.
  template <typename Types>
  void write(const View<Types>& view, int64_t first_row, int64_t rows, const RowSearch* searches) {
    for_runs(view.rows, first_row, [&](int64_t offset, int64_t at, int64_t run, int64_t stride_of) {
      if (rows == 1 && stride_of == 1) return narrow(y_ + at, view.param + offset, run);
      for (int64_t i = 0; i < run; ++i) {
        for (int64_t row = 0; row < rows; ++row) {
          if (searches[row].state != SearchState::found) continue;
          const auto value = static_cast<typename Types::Compute>(y(row)[at + i]);
          view.param[offset + i * stride_of + row] = encode<typename Types::Param>(value);
        }
      }
    });
  }

 private:
  // Rows are set apart by a cache line, or they would meet in the same few of its sets.
  static constexpr int64_t kPadding = 8;
  static constexpr int64_t kSize = kTileElements + kMostRows * kPadding;

  int64_t stride() const { return width_ + kPadding; }

  // Calls body(offset, at, run, stride) for runs of elements of the first row that lie evenly.
  template <typename Body>
  void for_runs(const CoupledRows& rows, int64_t row, const Body& body) const {
    const int64_t size = rows.reduced_sizes[rows.reduced_count - 1];
    const int64_t stride_of = rows.reduced_strides[rows.reduced_count - 1];
    const int64_t start = rows.row_offset(row), elements = count(rows);
    for (int64_t at = 0; at < elements;) {
      const int64_t j = values_from_ + at;
      const int64_t run = std::min(size - j % size, elements - at);
      body(start + rows.element_offset(j), at, run, stride_of);
      at += run;
    }
  }

  // Rows that are more than one are neighbours in memory.
  template <typename Storage>
  void gather(const Storage* stored, const CoupledRows& rows, int64_t first_row, int64_t row_count,
              double* target) const {
    for_runs(rows, first_row, [&](int64_t offset, int64_t at, int64_t run, int64_t stride_of) {
      if (row_count == 1 && stride_of == 1) return widen(stored + offset, target + at, run);
      for (int64_t i = 0; i < run; ++i) {
        const Storage* const line = stored + offset + i * stride_of;
        for (int64_t row = 0; row < row_count; ++row) {
          target[row * stride() + at + i] = decode(line[row]);
        }
      }
    });
  }

  std::unique_ptr<double[]> memory_;
  double* y_;
  double* d_;
  int64_t width_ = 0;
  int64_t values_from_ = -1;
  int64_t metric_from_ = -1;
};

// The memory of a share of the work.
struct Scratch {
  Tile tile;
  std::unique_ptr<LaneSums[]> first{new LaneSums[kMostRows]};
  std::unique_ptr<LaneSums[]> second{new LaneSums[kMostRows]};
};

bool is_any(const RowSearch* searches, int64_t count, SearchState state) {
  return std::any_of(searches, searches + count,
                     [&](const RowSearch& search) { return search.state == state; });
}

// Projects rows of at most kMostRows, alone.
template <typename Types>
void project_rows(const View<Types>& view, int64_t first_row, int64_t count, Scratch& scratch) {
  using T = typename Types::Compute;
  const CoupledRows& rows = view.rows;
  const SetKind kind = rows.set.kind;
  double* const multipliers = view.multipliers + first_row;
  RowSearch searches[kMostRows];

  Tile& tile = scratch.tile;
  tile.begin(std::min(rows.length, kTileElements / count / kNormChunk<T> * kNormChunk<T>));
  const auto add_sizes = [&](const auto* stored, int64_t elements, int64_t row) {
    for_chunks<T>(elements, [&](int64_t at, int64_t of_chunk) {
      scratch.first[row].add(chunk_size(kind, stored + at, of_chunk));
    });
  };
  if (rows.is_contiguous()) {
    add_sizes(view.param + rows.row_offset(first_row), rows.length, 0);
  } else {
    for (int64_t first = 0; first < rows.length; first += tile.width()) {
      tile.read_values(view, first_row, count, first);
      for (int64_t i = 0; i < count; ++i) add_sizes(tile.y(i), tile.count(rows), i);
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    searches[i] = begin_search(rows.set, scratch.first[i].take(), multipliers[i]);
  }

  while (is_any(searches, count, SearchState::searching)) {
    for (int64_t first = 0; first < rows.length; first += tile.width()) {
      tile.read_all(view, first_row, count, first);
      for (int64_t i = 0; i < count; ++i) {
        if (searches[i].state != SearchState::searching) continue;
        for_chunks<T>(tile.count(rows), [&](int64_t at, int64_t of_chunk) {
          const SetTerms terms =
              chunk_terms(kind, tile.y(i) + at, tile.d(i) + at, searches[i].multiplier, of_chunk);
          scratch.first[i].add(terms.first);
          scratch.second[i].add(terms.second);
        });
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      if (searches[i].state != SearchState::searching) continue;
      continue_search(rows.set, {scratch.first[i].take(), scratch.second[i].take()}, &searches[i]);
    }
  }

  if (is_any(searches, count, SearchState::found)) {
    for (int64_t first = 0; first < rows.length; first += tile.width()) {
      tile.read_all(view, first_row, count, first);
      for (int64_t i = 0; i < count; ++i) {
        if (searches[i].state != SearchState::found) continue;
        project_values(kind, searches[i], tile.y(i), tile.d(i), tile.count(rows));
      }
      tile.write(view, first_row, count, searches);
    }
  }
  for (int64_t i = 0; i < count; ++i) multipliers[i] = searches[i].multiplier;
}

// Whether the row was in its ball, and most likely is so still: a bound of its size is looked at
// first.
bool starts_inside(const CoupledSet& set, double last_multiplier) {
  return set.kind != SetKind::simplex && last_multiplier == 0 && !std::signbit(last_multiplier);
}

// Where a search begins that the step's sums do not end.
double first_multiplier(const CoupledSet& set, double last_multiplier) {
  return begin_search(set, INFINITY, last_multiplier).multiplier;
}

void add_cost(std::vector<int64_t>* cost_before, int64_t elements) {
  cost_before->push_back(cost_before->back() + elements + kPieceOverhead);
}

}  // namespace

void ProjectedStep::add_items(uint32_t tensor, Item::Rows rows, int64_t first, int64_t last,
                              int64_t most) {
  const auto long_row = static_cast<int64_t>(long_rows_.size());
  for (; first < last; first += most) {
    const int64_t count = std::min(most, last - first);
    items_.push_back({tensor, rows, first, count, long_row});
    add_cost(&item_costs_, count);
  }
}

void ProjectedStep::bind(const std::vector<TensorEntry>& tensors,
                         const std::vector<CoupledRows>& sets, Dtype compute) {
  items_.clear();
  long_rows_.clear();
  blocks_.clear();
  item_costs_.assign(1, 0);
  block_costs_.assign(1, 0);
  const int64_t chunk = compute == Dtype::float64 ? kNormChunk<double> : kNormChunk<float>;
  int64_t chunks = 0;
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    const CoupledRows& rows = sets[i];
    const int64_t numel = tensors[i].numel;
    if (numel == 0) continue;
    if (!rows.is_contiguous()) {
      add_items(i, Item::scattered, 0, numel, kCpuChunk);
      const bool are_neighbours =
          rows.kept_count > 0 && rows.kept_strides[rows.kept_count - 1] == 1;
      // Neighbours are those whose numbers differ in the last digit.
      const int64_t run = are_neighbours ? rows.kept_sizes[rows.kept_count - 1] : 1;
      for (int64_t row = 0; row < rows.rows;) {
        const int64_t count = std::min<int64_t>(kMostRows, run - row % run);
        blocks_.push_back({i, static_cast<int32_t>(count), row});
        add_cost(&block_costs_, count * rows.length);
        row += count;
      }
    } else if (rows.length <= kCpuChunk) {
      add_items(i, Item::whole, 0, numel, kCpuChunk / rows.length * rows.length);
    } else {
      for (int64_t row = 0; row < rows.rows; ++row) {
        const auto first_item = static_cast<int64_t>(items_.size());
        add_items(i, Item::part_of_long, row * rows.length, (row + 1) * rows.length, kCpuChunk);
        const int64_t item_count = static_cast<int64_t>(items_.size()) - first_item;
        const int64_t chunks_of_row = (rows.length + chunk - 1) / chunk;
        long_rows_.push_back({i, row, first_item, item_count, chunks, chunks_of_row, {}});
        chunks += chunks_of_row;
      }
    }
  }
  sums_.resize(chunks);
}

template <typename Types>
class ProjectedStep::Run {
 public:
  using T = typename Types::Compute;
  using Tensor = View<Types>;

  Run(ProjectedStep& self, const Bucket& bucket, const ForShares& for_shares)
      : self_(self), bucket_(bucket), for_shares_(for_shares) {}

  void operator()() {
    for_shares_(self_.item_costs_, [&](int64_t first, int64_t last) {
      Scratch scratch;
      for (int64_t i = first; i < last; ++i) step_item(self_.items_[i], scratch);
    });
    begin_long_rows();
    const auto evaluate_at_search = [&](const Item& item, const Tensor& tensor, Scratch& scratch) {
      evaluate(item, tensor, self_.long_rows_[item.long_row].search.multiplier, scratch);
    };
    while (for_long_items(SearchState::searching, evaluate_at_search)) {
      for (LongRow& row : self_.long_rows_) continue_long_row(&row, bucket_.sets[row.tensor].set);
    }
    for_long_items(SearchState::found, [&](const Item& item, const Tensor& tensor,
                                           Scratch& scratch) { project(item, tensor, scratch); });
    for (const LongRow& row : self_.long_rows_) {
      const Tensor tensor(bucket_, row.tensor);
      if (tensor.is_projected) tensor.multipliers[row.row] = row.search.multiplier;
    }
    if (self_.blocks_.empty()) return;
    for_shares_(self_.block_costs_, [&](int64_t first, int64_t last) {
      Scratch scratch;
      for (int64_t i = first; i < last; ++i) {
        const Block& block = self_.blocks_[i];
        const Tensor tensor(bucket_, block.tensor);
        if (tensor.is_projected) project_rows(tensor, block.first_row, block.count, scratch);
      }
    });
  }

 private:
  void step_item(const Item& item, Scratch& scratch) {
    const Tensor tensor(bucket_, item.tensor);
    if (item.rows == Item::scattered) {
      step(item, 0, item.count);
    } else if (item.rows == Item::part_of_long) {
      step_part(item, tensor, scratch);
    } else {
      // What was stepped is in the first cache still when it is projected.
      const int64_t length = tensor.rows.length;
      const int64_t together = std::max<int64_t>(1, kNormChunk<T> / length) * length;
      for (int64_t at = 0; at < item.count; at += together) {
        const int64_t count = std::min(together, item.count - at);
        step(item, at, count);
        if (!tensor.is_projected) continue;
        const int64_t first_row = (item.first + at) / length;
        for (int64_t i = 0; i < count / length; ++i) project_row(tensor, first_row + i, scratch);
      }
    }
  }

  // Steps elements of an item, from the item's `at` on.
  void step(const Item& item, int64_t at, int64_t count) {
    if (bucket_.records != nullptr) return;
    step_elements_cpu(bucket_, item.tensor, item.first + at, count);
  }

  void project_row(const Tensor& tensor, int64_t row, Scratch& scratch) {
    const CoupledRows& rows = tensor.rows;
    const bool is_inside =
        starts_inside(rows.set, tensor.multipliers[row]) &&
        adamal::is_inside(rows.set,
                          size_bound(rows.set.kind, tensor.param + row * rows.length, rows.length));
    if (!is_inside) project_rows(tensor, row, 1, scratch);
  }

  void step_part(const Item& item, const Tensor& tensor, Scratch& scratch) {
    if (!tensor.is_projected) return step(item, 0, item.count);
    const CoupledSet& set = tensor.rows.set;
    const double last = last_multiplier(item, tensor);
    const bool is_bounded = starts_inside(set, last);
    Sums* const sums = sums_of(item, tensor);
    for_chunks<T>(item.count, [&](int64_t at, int64_t count) {
      step(item, at, count);
      const auto* const first = tensor.param + item.first + at;
      sums[at / kNormChunk<T>].size =
          is_bounded ? size_bound(set.kind, first, count) : chunk_size(set.kind, first, count);
    });
    const double multiplier = first_multiplier(set, last);
    // At 0 the last step left the row alone, as this one will, most likely.
    if (multiplier != 0) evaluate(item, tensor, multiplier, scratch);
  }

  double last_multiplier(const Item& item, const Tensor& tensor) const {
    return tensor.multipliers[self_.long_rows_[item.long_row].row];
  }

  void add_sizes(const Item& item, const Tensor& tensor) {
    Sums* const sums = sums_of(item, tensor);
    for_chunks<T>(item.count, [&](int64_t at, int64_t count) {
      sums[at / kNormChunk<T>].size =
          chunk_size(tensor.rows.set.kind, tensor.param + item.first + at, count);
    });
  }

  void evaluate(const Item& item, const Tensor& tensor, double multiplier, Scratch& scratch) {
    Tile& tile = scratch.tile;
    read(item, tensor, tile);
    Sums* const sums = sums_of(item, tensor);
    for_chunks<T>(item.count, [&](int64_t at, int64_t count) {
      sums[at / kNormChunk<T>].terms =
          chunk_terms(tensor.rows.set.kind, tile.y(0) + at, tile.d(0) + at, multiplier, count);
    });
  }

  void project(const Item& item, const Tensor& tensor, Scratch& scratch) {
    const LongRow& row = self_.long_rows_[item.long_row];
    Tile& tile = scratch.tile;
    read(item, tensor, tile);
    project_values(tensor.rows.set.kind, row.search, tile.y(0), tile.d(0), item.count);
    tile.write(tensor, row.row, 1, &row.search);
  }

  void read(const Item& item, const Tensor& tensor, Tile& tile) {
    const int64_t row = self_.long_rows_[item.long_row].row;
    tile.begin(kCpuChunk);
    tile.read_all(tensor, row, 1, item.first - row * tensor.rows.length);
  }

  Sums* sums_of(const Item& item, const Tensor& tensor) {
    const LongRow& row = self_.long_rows_[item.long_row];
    const int64_t first = item.first - row.row * tensor.rows.length;
    return &self_.sums_[row.first_sum + first / kNormChunk<T>];
  }

  void begin_long_rows() {
    for (LongRow& row : self_.long_rows_) {
      const Tensor tensor(bucket_, row.tensor);
      row.search = {0, 1, SearchState::left_alone, 0};
      if (!tensor.is_projected || !starts_inside(tensor.rows.set, tensor.multipliers[row.row])) {
        continue;
      }
      if (!is_inside(tensor.rows.set, size_of(row))) row.search.state = SearchState::searching;
    }
    // Of those whose bounds do not tell.
    for_long_items(SearchState::searching, [&](const Item& item, const Tensor& tensor, Scratch&) {
      add_sizes(item, tensor);
    });
    for (LongRow& row : self_.long_rows_) {
      const Tensor tensor(bucket_, row.tensor);
      if (!tensor.is_projected) continue;
      const bool has_bound = starts_inside(tensor.rows.set, tensor.multipliers[row.row]);
      if (!has_bound || row.search.state == SearchState::searching) begin_long_row(&row, tensor);
    }
  }

  // By the sums of its elements' sizes.
  void begin_long_row(LongRow* row, const Tensor& tensor) {
    const CoupledSet& set = tensor.rows.set;
    const double last_multiplier = tensor.multipliers[row->row];
    row->search = begin_search(set, size_of(*row), last_multiplier);
    if (first_multiplier(set, last_multiplier) != 0) continue_long_row(row, set);
  }

  double size_of(const LongRow& row) const {
    LaneSums size;
    for (int64_t i = 0; i < row.sum_count; ++i) size.add(self_.sums_[row.first_sum + i].size);
    return size.take();
  }

  // By the sums at the search's multiplier.
  void continue_long_row(LongRow* row, const CoupledSet& set) {
    if (row->search.state != SearchState::searching) return;
    const Sums* const sums = &self_.sums_[row->first_sum];
    LaneSums first, second;
    for (int64_t i = 0; i < row->sum_count; ++i) {
      first.add(sums[i].terms.first);
      second.add(sums[i].terms.second);
    }
    continue_search(set, {first.take(), second.take()}, &row->search);
  }

  // Calls body(item, tensor, scratch) for the parts of rows in that state; false if there is none.
  template <typename Body>
  bool for_long_items(SearchState state, const Body& body) {
    std::vector<int64_t> items, costs{0};
    for (const LongRow& row : self_.long_rows_) {
      if (row.search.state != state) continue;
      for (int64_t i = row.first_item; i < row.first_item + row.item_count; ++i) {
        items.push_back(i);
        add_cost(&costs, self_.items_[i].count);
      }
    }
    if (items.empty()) return false;
    for_shares_(costs, [&](int64_t first, int64_t last) {
      Scratch scratch;
      for (int64_t i = first; i < last; ++i) {
        const Item& item = self_.items_[items[i]];
        body(item, Tensor(bucket_, item.tensor), scratch);
      }
    });
    return true;
  }

  ProjectedStep& self_;
  const Bucket& bucket_;
  const ForShares& for_shares_;
};

void ProjectedStep::step(const Bucket& bucket, const ForShares& for_shares) {
  dispatch(bucket,
           [&](auto key) { Run<typename decltype(key)::Rows>(*this, bucket, for_shares)(); });
}

}  // namespace adamal
