// A bucket read from the harness's input: every stream in a buffer of exactly its size.
#pragma once

#include <sanitizer/asan_interface.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu/step.h"
#include "cuda/step.h"
#include "formula/bucket.h"
#include "harness.h"

namespace adamal::harness {

// The memory of one stream: `misalignment` bytes off a 64-byte boundary, nothing behind it. A
// read-only one lies on pages of its own.
class Stream {
 public:
  Stream(Input& input, size_t bytes, size_t misalignment, bool read_only)
      : bytes_(bytes), misalignment_(misalignment), read_only_(read_only) {
    const size_t total = bytes + misalignment;
    if (read_only) {
      mapped_ = total + 1;
      void* pages =
          mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (pages == MAP_FAILED) fail("no memory");
      base_ = static_cast<unsigned char*>(pages);
    } else {
      void* memory = nullptr;
      if (posix_memalign(&memory, 64, total) != 0) fail("no memory");
      base_ = static_cast<unsigned char*>(memory);
    }
    std::memset(base_, kCanary, misalignment);
    input.read(data(), bytes);
    original_.assign(base_ + misalignment, base_ + total);
    if (read_only && mprotect(base_, mapped_, PROT_READ) != 0) fail("mprotect failed");
    ASAN_POISON_MEMORY_REGION(base_, misalignment);
  }
  ~Stream() {
    ASAN_UNPOISON_MEMORY_REGION(base_, misalignment_);
    for (size_t i = 0; i < misalignment_; ++i) {
      if (base_[i] != kCanary) fail("a store before the first element");
    }
    if (read_only_) {
      munmap(base_, mapped_);
    } else {
      std::free(base_);
    }
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  void* data() { return base_ + misalignment_; }
  size_t bytes() const { return bytes_; }
  bool is_unchanged() {
    return std::equal(original_.begin(), original_.end(), base_ + misalignment_);
  }

 private:
  static constexpr unsigned char kCanary = 0xa5;
  size_t bytes_;
  size_t misalignment_;
  bool read_only_;
  size_t mapped_ = 0;
  unsigned char* base_ = nullptr;
  std::vector<unsigned char> original_;
};

inline size_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return 4;
    case Dtype::float64:
      return 8;
    default:
      return 2;
  }
}

// A bucket that owns what it points to.
struct OwnedBucket {
  enum { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kStreamCount };

  Bucket view{};
  uint64_t seed;
  std::vector<StepScalars<double>> scalars;
  std::vector<std::unique_ptr<Stream>> streams;  // kStreamCount a tensor
  std::vector<TensorEntry> tensors;
  std::vector<WorkItem> items;
  std::vector<const void*> grads;
  std::vector<uint32_t> rows;

  OwnedBucket(Input& input, bool for_cpu) {
    seed = input.integer();
    view.format = static_cast<int>(input.integer());
    view.second_moment = static_cast<SecondMoment>(input.integer());
    view.scalar_count = input.integer();
    view.tensor_count = input.integer();
    scalars = input.array<StepScalars<double>>(view.scalar_count);
    for (int64_t i = 0; i < view.tensor_count; ++i) read_tensor(input);

    const int64_t chunk = for_cpu ? kCpuChunk : cuda_chunk(view.format);
    for (uint32_t i = 0; i < tensors.size(); ++i) {
      for (int64_t j = 0; j * chunk < tensors[i].numel; ++j) {
        items.push_back({i, static_cast<uint32_t>(j)});
      }
    }
    view.tensors = tensors.data();
    view.items = items.data();
    view.item_count = static_cast<int64_t>(items.size());
    view.grads = grads.data();
    view.rows = rows.data();
    view.scalars = scalars.data();
  }

  void read_tensor(Input& input) {
    const Format format = kFormats[view.format];
    const size_t sizes[kStreamCount] = {size_of(format.param), size_of(format.grad),
                                        size_of(format.exp_avg), size_of(format.exp_avg_sq),
                                        size_of(format.exp_avg_sq)};
    const int64_t numel = input.integer();
    rows.push_back(static_cast<uint32_t>(input.integer()));
    const auto present = input.array<int64_t>(kStreamCount);
    const auto misalignment = input.array<int64_t>(kStreamCount);  // in elements
    const auto read_only = input.array<int64_t>(kStreamCount);
    void* data[kStreamCount] = {};
    for (int i = 0; i < kStreamCount; ++i) {
      streams.push_back(nullptr);
      if (!present[i]) continue;
      streams.back() = std::make_unique<Stream>(input, numel * sizes[i], misalignment[i] * sizes[i],
                                                read_only[i] != 0);
      data[i] = streams.back()->data();
    }
    tensors.push_back(
        {data[kParam], numel, {data[kExpAvg], data[kExpAvgSq], data[kMaxExpAvgSq], nullptr}});
    grads.push_back(data[kGrad]);
  }

  void write(Output& output) {
    for (size_t i = 0; i < streams.size(); ++i) {
      if (streams[i] == nullptr) continue;
      if (i % kStreamCount == kGrad) {
        if (!streams[i]->is_unchanged()) fail("a store to a gradient");
      } else {
        output.write(streams[i]->data(), streams[i]->bytes());
      }
    }
  }
};

}  // namespace adamal::harness
