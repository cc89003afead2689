// Steps and projections by the kernels for CUDA.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <type_traits>
#include <vector>

#include "cuda/launches.h"
#include "cuda/projection_launches.h"
#include "cuda/set_tables.h"
#include "harness.h"
#include "owned_bucket.h"
#include "owned_device.h"
#include "owned_sets.h"
#include "shuffled.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

constexpr int kGarbage = 0xa5;
// Fewer than a bucket's pieces, so that blocks take several.
constexpr int64_t kPieceBlocks = 3;

// All threads of a block, in an order of its own in each phase.
class HostBlock {
 public:
  HostBlock(int64_t index, int64_t count, std::mt19937_64& random)
      : index_(index), count_(count), random_(random) {}

  int64_t index() const { return index_; }
  int64_t count() const { return count_; }
  template <typename Body>
  void phase(const Body& body) const {
    for (const int thread : shuffled(kCudaBlockThreads, random_)) body(thread);
  }

 private:
  int64_t index_;
  int64_t count_;
  std::mt19937_64& random_;
};

template <typename Kernel>
bool run_kernel(const Kernel& kernel, int64_t blocks, std::mt19937_64& random) {
  // A copy of exactly the launch's size, as the device would get it.
  const auto copy = std::make_unique<Kernel>(kernel);
  for (const int64_t index : shuffled(blocks, random)) {
    typename Kernel::Shared* shared = new typename Kernel::Shared;
    static_assert(std::is_trivially_copyable_v<typename Kernel::Shared>);
    std::memset(static_cast<void*>(shared), kGarbage, sizeof(*shared));
    (*copy)(HostBlock(index, blocks, random), *shared);
    delete shared;
  }
  return true;
}

template <typename Key>
void run_all(OwnedBucket& bucket, const SetTables& sets, bool step_adds_sizes,
             std::mt19937_64& random) {
  using T = typename Key::Compute;
  const DeviceTables tables{bucket.tensors.data(), bucket.items.data(), nullptr, nullptr};
  const auto scalars = DeviceRows<T>::at(sets.scalars);
  const auto launch = [&](const auto& kernel, int64_t blocks) {
    return run_kernel(kernel, blocks, random);
  };
  if (bucket.view.device == nullptr) {
    store_scalars(bucket.view, tables, scalars, launch);
  } else {
    SmallDeriveParams<T> derive;
    DeriveSplitter<T> derivations(bucket.view, scalars);
    while (derivations.next(&derive)) {
      for (const uint32_t slot : shuffled(derive.tensor_count, random)) derive_thread(derive, slot);
    }
  }
  step_bucket<Key>(bucket.view, tables, sets, scalars, launch);
  if (!step_adds_sizes) {
    for (int64_t i = 0; i < sets.piece_count; ++i) {
      const WorkItem piece = sets.pieces[i];
      sets.entries[piece.tensor].sums[piece.chunk] = {-1, -1};
    }
  }
  project_bucket<typename Key::Rows>(tables.tensors, sets, kPieceBlocks, step_adds_sizes, launch);
}

// The input goes on with each tensor's set and multipliers, whether the step adds sizes, and
// whether the scalars are the device's, which then follow.
void run_project_cuda(OwnedBucket& bucket, Input& input, Output& output) {
  std::mt19937_64 random(bucket.seed);
  const OwnedSets sets(input, bucket);
  const bool step_adds_sizes = input.integer() != 0;
  std::optional<OwnedDevice> device;
  if (input.integer() != 0) {
    device.emplace(input, bucket.view.tensor_count);
    bucket.view.device = &device->view;
  }

  const SetWork work(bucket.view);
  // Exactly as many bytes as the plan would allocate, so that an access past them traps.
  std::vector<char> memory(work.bytes(), static_cast<char>(kGarbage));
  const std::vector<char> image = work.image_for(memory.data());
  std::copy(image.begin(), image.end(), memory.begin());
  const SetTables tables = work.tables_at(memory.data());
  std::memset(tables.is_searching, 0, tables.zeroed_bytes);
  dispatch(bucket.view,
           [&](auto key) { run_all<decltype(key)>(bucket, tables, step_adds_sizes, random); });
  sets.write(output);
  if (device.has_value()) device->write(output);
  bucket.write(output);
}

void run(Command command, Input& input, Output& output) {
  switch (command) {
    case Command::project_cuda: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      return run_project_cuda(bucket, input, output);
    }
    default:
      fail("not a command of this program");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run); }
