// The tables from which the CUDA projections of a bucket work, and the memory they work in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/launches.h"
#include "cuda/step.h"
#include "formula/bucket.h"
#include "formula/norm.h"
#include "formula/rows.h"

namespace adamal {

// A row up to this long is projected by one block, which shares it with no other: the sums of up to
// kNormLanes chunks are one tree of neighbours over all elements.
inline constexpr int64_t kLongestTiledRow = 16384;
// Elements of such a row that one thread adds by itself.
inline constexpr int kTileLeaf = 8;
inline constexpr int kTileLeaves = int(kLongestTiledRow) / kTileLeaf;
static_assert(kLongestTiledRow <= kNormLanes * int64_t(kNormChunk<double>));

// How the threads of a block share the short rows of a tile; all are powers of two.
struct RowTile {
  int32_t rows;
  int32_t leaves;             // of a row
  int32_t lanes;              // threads a row
  int32_t rows_are_adjacent;  // neighbouring threads take neighbouring rows, not elements

  ADAMAL_HD int32_t row_of(int thread) const {
    return rows_are_adjacent ? thread % rows : thread / lanes;
  }
  ADAMAL_HD int32_t lane_of(int thread) const {
    return rows_are_adjacent ? thread / rows : thread % lanes;
  }
};

inline RowTile tile_of(const CoupledRows& rows) {
  constexpr int64_t kElements = 4096;  // 16 a thread, unless a row has more
  constexpr int64_t kAdjacent = 8;     // rows that fill a sector of 32 bytes
  const int64_t padded = power_of_two_from(std::max<int64_t>(rows.length, kTileLeaf));
  int64_t count = std::clamp<int64_t>(kElements / padded, 1, kCudaBlockThreads);
  const bool adjacent =
      rows.kept_count > 0 && rows.kept_strides[rows.kept_count - 1] == 1 && !rows.is_contiguous();
  if (adjacent) count = std::max(count, std::min(kAdjacent, kLongestTiledRow / padded));
  count = std::min(count, power_of_two_from(rows.rows));
  const int64_t leaves = padded / kTileLeaf;
  const int64_t lanes = std::min(kCudaBlockThreads / count, leaves);
  return {static_cast<int32_t>(count), static_cast<int32_t>(leaves), static_cast<int32_t>(lanes),
          adjacent};
}

// What kernels know of a tensor's set.
struct SetEntry {
  CoupledRows rows;
  RowTile tile;                  // of short rows
  const void* scalars;           // StepScalars<T> of this step; a rate of 0 does not project
  SetTerms* sums;                // of each piece of long rows
  RowSearch* searches;           // of each long row
  int64_t sizes_come_with_step;  // a long row that is the whole tensor, in the order of memory

  ADAMAL_HD bool is_long() const { return rows.length > kLongestTiledRow; }
};

// Pairs of kernels that look for the multipliers of long rows; what is left, one block a row ends.
inline constexpr int kSearchRounds = 12;

// The tables of a bucket on the device.
struct SetTables {
  const SetEntry* entries;    // of each tensor
  const WorkItem* tiles;      // of short rows: tensor, tile
  const WorkItem* pieces;     // of long rows: tensor, and piece chunk * rows + row
  const WorkItem* long_rows;  // tensor, row
  int64_t tile_count;
  int64_t piece_count;
  int64_t long_row_count;
  bool has_sizes_to_add;  // long rows whose sizes no step adds

  // Zeros before every step: whether a round has rows to search for, and the scalars, a
  // DeviceRows<T>; zeros among them, too, of tensors that are not stepped.
  int32_t* is_searching;
  void* scalars;
  int64_t zeroed_bytes;
};

// Builds a bucket's tables on the host, for one block of memory of the device.
class SetWork {
 public:
  explicit SetWork(const Bucket& bucket) : bucket_(bucket) {
    const int64_t chunk = cuda_chunk(bucket.format);
    for (int64_t i = 0; i < bucket.tensor_count; ++i) {
      const auto tensor = static_cast<uint32_t>(i);
      const CoupledRows& rows = bucket.sets[i];
      SetEntry entry{};
      entry.rows = rows;
      first_pieces_.push_back(static_cast<int64_t>(pieces_.size()));
      first_rows_.push_back(static_cast<int64_t>(long_rows_.size()));
      if (bucket.tensors[i].numel > 0 && !entry.is_long()) {
        entry.tile = tile_of(rows);
        append(&tiles_, tensor, (rows.rows + entry.tile.rows - 1) / entry.tile.rows);
      } else if (bucket.tensors[i].numel > 0) {
        entry.sizes_come_with_step = rows.rows == 1 && rows.is_contiguous();
        has_sizes_to_add_ = has_sizes_to_add_ || !entry.sizes_come_with_step;
        append(&pieces_, tensor, rows.rows * ((rows.length + chunk - 1) / chunk));
        append(&long_rows_, tensor, rows.rows);
      }
      entries_.push_back(entry);
    }
  }

  int64_t most_blocks() const {
    return static_cast<int64_t>(std::max({tiles_.size(), pieces_.size(), long_rows_.size()}));
  }
  // Of the tables, which come first, and with the memory the kernels work in.
  int64_t table_bytes() const { return layout().is_searching; }
  int64_t bytes() const { return layout().end; }

  SetTables tables_at(char* memory) const {
    const Layout at = layout();
    return {reinterpret_cast<const SetEntry*>(memory),
            reinterpret_cast<const WorkItem*>(memory + at.tiles),
            reinterpret_cast<const WorkItem*>(memory + at.pieces),
            reinterpret_cast<const WorkItem*>(memory + at.long_rows),
            static_cast<int64_t>(tiles_.size()),
            static_cast<int64_t>(pieces_.size()),
            static_cast<int64_t>(long_rows_.size()),
            has_sizes_to_add_,
            reinterpret_cast<int32_t*>(memory + at.is_searching),
            memory + at.scalars,
            at.sums - at.is_searching};
  }

  // What is to be copied to `memory`, an address of the device.
  std::vector<char> image_for(char* memory) const {
    const Layout at = layout();
    std::vector<SetEntry> entries = entries_;
    for (size_t i = 0; i < entries.size(); ++i) {
      entries[i].scalars = scalars_of(memory + at.scalars, i);
      entries[i].sums = reinterpret_cast<SetTerms*>(memory + at.sums) + first_pieces_[i];
      entries[i].searches = reinterpret_cast<RowSearch*>(memory + at.searches) + first_rows_[i];
    }
    std::vector<char> image(table_bytes());
    const auto copy = [&](int64_t offset, const auto& table) {
      if (table.empty()) return;
      std::memcpy(image.data() + offset, table.data(), table.size() * sizeof(table[0]));
    };
    copy(0, entries);
    copy(at.tiles, tiles_);
    copy(at.pieces, pieces_);
    copy(at.long_rows, long_rows_);
    return image;
  }

 private:
  // Offsets from the entries, which come first.
  struct Layout {
    int64_t tiles, pieces, long_rows, is_searching, scalars, sums, searches, end;
  };

  static void append(std::vector<WorkItem>* items, uint32_t tensor, int64_t count) {
    for (int64_t i = 0; i < count; ++i) items->push_back({tensor, static_cast<uint32_t>(i)});
  }

  bool is_double() const { return kFormats[bucket_.format].compute() == Dtype::float64; }
  int64_t scalars_bytes() const {
    const auto count = static_cast<int64_t>(entries_.size());
    return is_double() ? DeviceRows<double>::bytes(count) : DeviceRows<float>::bytes(count);
  }
  void* scalars_of(void* memory, size_t tensor) const {
    if (is_double()) return DeviceRows<double>::at(memory).rows + tensor;
    return DeviceRows<float>::at(memory).rows + tensor;
  }

  Layout layout() const {
    int64_t end = 0;
    const auto take = [&](size_t count, int64_t bytes) {
      constexpr int64_t kAlignment = 16;
      const int64_t offset = (end + kAlignment - 1) / kAlignment * kAlignment;
      end = offset + static_cast<int64_t>(count) * bytes;
      return offset;
    };
    Layout at;
    take(entries_.size(), sizeof(SetEntry));
    at.tiles = take(tiles_.size(), sizeof(WorkItem));
    at.pieces = take(pieces_.size(), sizeof(WorkItem));
    at.long_rows = take(long_rows_.size(), sizeof(WorkItem));
    at.is_searching = take(kSearchRounds + 1, sizeof(int32_t));
    at.scalars = take(1, scalars_bytes());
    at.sums = take(pieces_.size(), sizeof(SetTerms));
    at.searches = take(long_rows_.size(), sizeof(RowSearch));
    at.end = end;
    return at;
  }

  const Bucket& bucket_;
  std::vector<SetEntry> entries_;
  std::vector<WorkItem> tiles_;
  std::vector<WorkItem> pieces_;
  std::vector<WorkItem> long_rows_;
  std::vector<int64_t> first_pieces_;  // of each tensor
  std::vector<int64_t> first_rows_;    // of each tensor, among long rows
  bool has_sizes_to_add_ = false;
};

}  // namespace adamal
