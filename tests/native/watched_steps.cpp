// Steps that are watched.
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "cuda/launches.h"
#include "cuda/step.h"
#include "cuda/watched_block.h"
#include "formula/watch.h"
#include "harness.h"
#include "owned_bucket.h"
#include "shuffled.h"
#include "step_shares.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

// Threads of a block in random order, all of which read its record before one writes it.
template <typename Key, typename Params>
void run_watched_launch(const Params& params, int64_t block_count, std::mt19937_64& random) {
  using T = typename Key::Compute;
  const auto copy = std::make_unique<Params>(params);
  for (const int64_t block : shuffled(block_count, random)) {
    ItemRecord* const record = copy->record_of(block);
    if (record == nullptr) continue;
    auto seen = Seen<T>::nothing();
    for (const int thread : shuffled(kCudaBlockThreads, random)) {
      seen.add(watched_thread<Key>(*copy, block, thread, record));
    }
    record_block(*copy, block, seen, record);
  }
}

// Launches like those of cuda/watched_step.cu, the large ones or those of few tensors.
void run_watched_cuda(OwnedBucket& bucket) {
  std::mt19937_64 random(bucket.seed);
  dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    using T = typename Key::Compute;
    using Small = SmallRecordedParams<T>;
    LaunchSplitter<T> splitter(bucket.view, bucket.tensors.data(), bucket.items.data());
    const auto params = std::make_unique<LargeRecordedParams<T>>();
    params->records = bucket.view.records;
    while (splitter.next(params.get())) {
      if (splitter.template fits<Small>()) {
        Small small = splitter.template shrink<Small>(*params);
        small.records = bucket.view.records;
        run_watched_launch<Key>(small, splitter.block_count(), random);
      } else {
        run_watched_launch<Key>(*params, splitter.block_count(), random);
      }
    }
  });
}

// The same by scalars on the device: those of the case, a row a tensor.
void run_watched_on_device(OwnedBucket& bucket) {
  std::mt19937_64 random(bucket.seed);
  dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    using T = typename Key::Compute;
    const auto memory = std::make_unique<double[]>(
        (DeviceRows<T>::bytes(bucket.view.tensor_count) + sizeof(double) - 1) / sizeof(double));
    const auto scalars = DeviceRows<T>::at(memory.get());
    *scalars.is_skipped = 0;
    for (int64_t i = 0; i < bucket.view.tensor_count; ++i) {
      scalars.rows[i] = StepScalars<T>(bucket.scalars[bucket.rows[i]]);
    }
    const auto run_as = [&](auto launch) {
      GradientSplitter<T> splitter(bucket.view);
      while (splitter.next(launch->kTensorCapacity)) {
        splitter.fill(bucket.tensors.data(), bucket.items.data(), launch.get());
        launch->scalars = scalars;
        launch->records = bucket.view.records;
        run_watched_launch<Key>(*launch, splitter.block_count(), random);
      }
    };
    if (bucket.view.tensor_count <= SmallRecordedDeviceParams<T>::kTensorCapacity) {
      run_as(std::make_unique<SmallRecordedDeviceParams<T>>());
    } else {
      run_as(std::make_unique<LargeRecordedDeviceParams<T>>());
    }
  });
}

// Steps with the records that follow, and writes them first.
template <typename Run>
void run_watched(OwnedBucket& bucket, Input& input, Output& output, const Run& run) {
  std::vector<int64_t> counts(bucket.view.tensor_count);
  for (int64_t i = 0; i < bucket.view.item_count; ++i) ++counts[bucket.items[i].tensor];
  // Each in memory of its own, so that a record beside it traps.
  std::vector<std::vector<ItemRecord>> records;
  for (const int64_t count : counts) records.push_back(input.array<ItemRecord>(count));
  std::vector<ItemRecord*> addresses;
  for (auto& of_tensor : records) addresses.push_back(of_tensor.data());
  bucket.view.records = addresses.data();
  run(bucket);
  for (const auto& of_tensor : records) output.array(of_tensor);
  bucket.write(output);
}

void run(Command command, Input& input, Output& output) {
  switch (command) {
    case Command::watched_cpu: {
      OwnedBucket bucket(input, /*for_cpu=*/true);
      return run_watched(bucket, input, output, run_step_cpu);
    }
    case Command::watched_cuda: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      return run_watched(bucket, input, output, run_watched_cuda);
    }
    case Command::watched_on_device: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      return run_watched(bucket, input, output, run_watched_on_device);
    }
    default:
      fail("not a command of this program");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run); }
