// Runs cases from a file through the native kernels, on the host and without torch.
//
// Usage: harness INPUT OUTPUT. tests/native_harness.py writes the input and reads the output; both
// are plain concatenations of little-endian 8-byte numbers and raw arrays. Every stream lies in a
// buffer of exactly its size, so that the sanitizers trap any access beside it.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "bucket.h"
#include "gradient_norm.h"
#include "launch_params.h"
#include "multi_tensor.h"
#include "owned_bucket.h"
#include "owned_device.h"
#include "owned_sets.h"
#include "projection_cpu.h"
#include "projections.h"
#include "shuffled.h"
#include "step.h"
#include "storage.h"
#include "watched_block.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

enum class Command : int64_t {
  info,
  decode,
  encode,
  scalars,
  step_cpu,
  step_cuda,
  step_on_device,
  norm_cpu,
  norm_cuda,
  watched_cpu,
  watched_cuda,
  watched_on_device,
  project_serially,
  project_cpu,
  project_cuda
};

// Random ranges of items, in random order.
void run_step_cpu(OwnedBucket& bucket) {
  std::mt19937_64 random(bucket.seed);
  std::vector<int64_t> ends{0};
  while (ends.back() < bucket.view.item_count) {
    ends.push_back(std::min<int64_t>(bucket.view.item_count, ends.back() + 1 + random() % 4));
  }
  for (const int64_t i : shuffled(static_cast<int64_t>(ends.size()) - 1, random)) {
    step_cpu(bucket.view, ends[i], ends[i + 1]);
  }
}

struct LaunchCounts {
  int64_t launches = 0;
  int64_t small_launches = 0;
};

template <typename Key, typename Params>
void run_launch(const Params& params, int64_t block_count, std::mt19937_64& random) {
  // A copy of exactly the launch's size, as the device would get it.
  const auto copy = std::make_unique<Params>(params);
  for (const int64_t block : shuffled(block_count, random)) {
    for (const int thread : shuffled(kCudaBlockThreads, random)) {
      step_block<Key::kSecondMoment, typename Key::Param, typename Key::Grad>(*copy, block, thread);
    }
  }
}

// Random blocks and threads of each launch.
LaunchCounts run_step_cuda(OwnedBucket& bucket) {
  std::mt19937_64 random(bucket.seed);
  LaunchCounts counts;
  const bool known = dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    using T = ComputeType<typename Key::Param>;
    using Small = SmallLaunchParams<T>;
    LaunchSplitter<T> splitter(bucket.view, bucket.tensors.data(), bucket.items.data());
    const auto params = std::make_unique<LargeLaunchParams<T>>();
    while (splitter.next(params.get())) {
      ++counts.launches;
      if (splitter.template fits<Small>()) {
        ++counts.small_launches;
        run_launch<Key>(splitter.template shrink<Small>(*params), splitter.block_count(), random);
      } else {
        run_launch<Key>(*params, splitter.block_count(), random);
      }
    }
  });
  if (!known) fail("no such pair or second moment");
  return counts;
}

// The first kernel of a step on the device, then the second: random threads and blocks of each.
template <typename Key, typename Derive, typename Launch>
void run_on_device(OwnedBucket& bucket, std::mt19937_64& random) {
  using T = ComputeType<typename Key::Param>;
  // Exactly as many bytes as the plan would allocate, so that a write past them traps.
  const auto memory = std::make_unique<double[]>(
      (DeviceRows<T>::bytes(bucket.view.tensor_count) + sizeof(double) - 1) / sizeof(double));
  const auto scalars = DeviceRows<T>::at(memory.get());
  const auto derive = std::make_unique<Derive>();
  DeriveSplitter<T> derivations(bucket.view, scalars);
  while (derivations.next(derive.get())) {
    for (const uint32_t slot : shuffled(derive->tensor_count + 3, random)) {
      derive_thread(*derive, slot);
    }
  }
  const auto launch = std::make_unique<Launch>();
  GradientSplitter<T> splitter(bucket.view);
  while (splitter.next(Launch::kTensorCapacity)) {
    splitter.fill(bucket.tensors.data(), bucket.items.data(), launch.get());
    launch->scalars = scalars;
    run_launch<Key>(*launch, splitter.block_count(), random);
  }
}

// Threads of a block in random order, all of which read its record before one writes it.
template <typename Key, typename Params>
void run_watched_launch(const Params& params, int64_t block_count, std::mt19937_64& random) {
  using T = ComputeType<typename Key::Param>;
  const auto copy = std::make_unique<Params>(params);
  for (const int64_t block : shuffled(block_count, random)) {
    ItemRecord* const record = copy->record_of(block);
    if (record == nullptr) continue;
    auto seen = Seen<T>::nothing();
    for (const int thread : shuffled(kCudaBlockThreads, random)) {
      seen.add(watched_thread<Key::kSecondMoment, typename Key::Param, typename Key::Grad>(
          *copy, block, thread, record));
    }
    record_block(*copy, block, seen, record);
  }
}

// Launches like those of watched_step_cuda.cu, the large ones or those of few tensors.
void run_watched_cuda(OwnedBucket& bucket) {
  std::mt19937_64 random(bucket.seed);
  dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    using T = ComputeType<typename Key::Param>;
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
    using T = ComputeType<typename Key::Param>;
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

// Steps by the case's first row of options and inputs, and writes what is counted.
void run_step_on_device(OwnedBucket& bucket, Input& input, Output& output) {
  std::mt19937_64 random(bucket.seed);
  OwnedDevice device(input, bucket.view.tensor_count);
  const bool is_small = device.is_small;
  bucket.view.device = &device.view;
  dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    using T = ComputeType<typename Key::Param>;
    if (is_small) {
      run_on_device<Key, SmallDeriveParams<T>, SmallDeviceLaunchParams<T>>(bucket, random);
    } else {
      run_on_device<Key, LargeDeriveParams<T>, LargeDeviceLaunchParams<T>>(bucket, random);
    }
  });
  device.write(output);
}

// Threads of a block in random order, which wait for one another before every level.
template <typename T, typename Grad, typename Params>
void run_norm(OwnedBucket& bucket, std::vector<double>* sums, std::mt19937_64& random) {
  using Tree = NormTree<T, Grad>;
  std::vector<double> item_sums(bucket.items.size());
  const auto params = std::make_unique<Params>();
  GradientSplitter<T> splitter(bucket.view);
  while (splitter.next(Params::kTensorCapacity)) {
    splitter.fill(bucket.tensors.data(), bucket.items.data(), params.get());
    for (const int64_t block : shuffled(splitter.block_count(), random)) {
      const WorkItem item = params->items[block];
      const auto* grad =
          static_cast<const Grad*>(params->grads[item.tensor - params->first_tensor]);
      if (grad == nullptr) continue;
      const int64_t offset = item.chunk * kCudaChunk<T>;
      const int64_t left = params->tensors[item.tensor].numel - offset;
      const auto leaves = std::make_unique<double[]>(Tree::kLeaves);
      for (const int thread : shuffled(kCudaBlockThreads, random)) {
        Tree::add_leaves(grad + offset, int(min_of(left, kCudaChunk<T>)), thread, leaves.get());
      }
      for (int stride = 1; stride < Tree::kLeaves; stride *= 2) {
        for (const int thread : shuffled(kCudaBlockThreads, random)) {
          add_level(leaves.get(), Tree::kLeaves, stride, thread);
        }
      }
      item_sums[splitter.first_item() + block] = leaves[0];
    }
  }
  int64_t first_item = 0;
  for (const TensorEntry& tensor : bucket.tensors) {
    const int64_t chunks = (tensor.numel + kNormChunk<T> - 1) / kNormChunk<T>;
    double lanes[kNormLanes];
    for (const int lane : shuffled(kNormLanes, random)) {
      lanes[lane] = add_lane(item_sums.data() + first_item, chunks, lane);
    }
    for (int stride = 1; stride < kNormLanes; stride *= 2) {
      for (const int thread : shuffled(kNormLanes, random)) {
        add_level(lanes, kNormLanes, stride, thread);
      }
    }
    sums->push_back(lanes[0]);
    first_item += chunks;
  }
}

void run_norm_cuda(OwnedBucket& bucket, Output& output) {
  std::mt19937_64 random(bucket.seed);
  std::vector<double> sums;
  dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    run_norm<ComputeType<typename Key::Param>, typename Key::Grad, SmallNormParams>(bucket, &sums,
                                                                                    random);
  });
  output.array(sums);
}

void run_norm_cpu(OwnedBucket& bucket, Output& output) {
  std::vector<double> chunk_sums(bucket.view.item_count * kNormChunksPerItem, -1.0);
  std::mt19937_64 random(bucket.seed);
  for (const int64_t i : shuffled(bucket.view.item_count, random)) {
    squared_norm_items_cpu(bucket.view, i, i + 1, chunk_sums.data());
  }
  std::vector<double> sums(bucket.view.tensor_count);
  squared_norm_tensors_cpu(bucket.view, chunk_sums.data(), sums.data());
  output.array(sums);
}

// Random shares of the work, in random order; returns how often work was shared out.
int64_t run_project_cpu(OwnedBucket& bucket, const OwnedSets& sets) {
  std::mt19937_64 random(bucket.seed);
  ProjectedStep projected;
  projected.bind(bucket.tensors, sets.sets, kDtypePairs[bucket.view.pair].param);
  int64_t passes = 0;
  const auto for_shares = [&](const std::vector<int64_t>& cost_before,
                              const ProjectedStep::Body& body) {
    ++passes;
    const auto count = static_cast<int64_t>(cost_before.size()) - 1;
    std::vector<int64_t> ends{0};
    while (ends.back() < count) {
      ends.push_back(std::min<int64_t>(count, ends.back() + 1 + random() % 4));
    }
    for (const int64_t i : shuffled(static_cast<int64_t>(ends.size()) - 1, random)) {
      if (cost_before[ends[i]] >= cost_before[ends[i + 1]]) fail("a share that costs nothing");
      body(ends[i], ends[i + 1]);
    }
  };
  projected.step(bucket.view, for_shares);
  return passes;
}

template <typename Storage>
void decode_all(const std::vector<uint16_t>& stored, Output& output) {
  std::vector<float> values;
  for (const uint16_t bits : stored) values.push_back(decode(Storage{bits}));
  output.array(values);
}

template <typename Storage>
void encode_all(const std::vector<float>& values, Output& output) {
  std::vector<uint16_t> stored;
  for (const float value : values) stored.push_back(encode<Storage>(value).bits);
  output.array(stored);
}

void derive_scalars(Input& input, Output& output) {
  for (int64_t i = input.integer(); i > 0; --i) {
    const int64_t step = input.integer();
    const auto number = input.array<double>(7);
    const auto flag = input.array<int64_t>(3);
    const StepOptions options{number[0], number[1], number[2],    number[3],    number[4],
                              number[5], number[6], flag[0] != 0, flag[1] != 0, flag[2] != 0};
    const double grad_factor = input.array<double>(1)[0];
    output.array(std::vector<StepScalars<double>>{derive_step_scalars(step, options, grad_factor)});
  }
}

template <typename Params>
void write_capacity(Output& output) {
  output.integer(sizeof(Params));
  output.integer(Params::kTensorCapacity);
  output.integer(Params::kRowCapacity);
}

void write_info(Output& output) {
  output.integer(kCpuChunk);
  for (int i = 0; i < kDtypePairCount; ++i) {
    output.integer(static_cast<int64_t>(kDtypePairs[i].param));
    output.integer(static_cast<int64_t>(kDtypePairs[i].grad));
    output.integer(cuda_chunk(i));
  }
  write_capacity<SmallLaunchParams<float>>(output);
  write_capacity<SmallLaunchParams<double>>(output);
  write_capacity<LargeLaunchParams<float>>(output);
  write_capacity<LargeLaunchParams<double>>(output);
}

void run(Input& input, Output& output) {
  const auto command = static_cast<Command>(input.integer());
  switch (command) {
    case Command::info:
      return write_info(output);
    case Command::decode: {
      const auto dtype = static_cast<Dtype>(input.integer());
      const auto stored = input.array<uint16_t>(input.integer());
      return dtype == Dtype::bfloat16 ? decode_all<bfloat16>(stored, output)
                                      : decode_all<float16>(stored, output);
    }
    case Command::encode: {
      const auto dtype = static_cast<Dtype>(input.integer());
      const auto values = input.array<float>(input.integer());
      return dtype == Dtype::bfloat16 ? encode_all<bfloat16>(values, output)
                                      : encode_all<float16>(values, output);
    }
    case Command::scalars:
      return derive_scalars(input, output);
    case Command::step_cpu: {
      OwnedBucket bucket(input, /*for_cpu=*/true);
      run_step_cpu(bucket);
      return bucket.write(output);
    }
    case Command::step_cuda: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      const LaunchCounts counts = run_step_cuda(bucket);
      output.integer(counts.launches);
      output.integer(counts.small_launches);
      return bucket.write(output);
    }
    case Command::step_on_device: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      run_step_on_device(bucket, input, output);
      return bucket.write(output);
    }
    case Command::norm_cpu: {
      OwnedBucket bucket(input, /*for_cpu=*/true);
      return run_norm_cpu(bucket, output);
    }
    case Command::norm_cuda: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      return run_norm_cuda(bucket, output);
    }
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
    case Command::project_serially: {
      OwnedBucket bucket(input, /*for_cpu=*/true);
      const OwnedSets sets(input, bucket);
      step_cpu(bucket.view, 0, bucket.view.item_count);
      project_serially(bucket.view);
      output.integer(0);
      sets.write(output);
      return bucket.write(output);
    }
    case Command::project_cpu: {
      OwnedBucket bucket(input, /*for_cpu=*/true);
      const OwnedSets sets(input, bucket);
      output.integer(run_project_cpu(bucket, sets));
      sets.write(output);
      return bucket.write(output);
    }
    case Command::project_cuda: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      return run_project_cuda(bucket, input, output);
    }
  }
  fail("no such command");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) fail("usage: harness INPUT OUTPUT");
  Input input(argv[1]);
  Output output(argv[2]);
  while (!input.at_end()) run(input, output);
  return 0;
}
