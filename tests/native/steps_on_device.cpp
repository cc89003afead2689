// Steps by the kernels for CUDA, by scalars that they derive.
#include <cstdint>
#include <memory>
#include <random>

#include "cuda/launches.h"
#include "cuda/step.h"
#include "formula/scalars.h"
#include "harness.h"
#include "owned_bucket.h"
#include "owned_device.h"
#include "shuffled.h"
#include "step_launches.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

// The first kernel of a step on the device, then the second: random threads and blocks of each.
template <typename Key, typename Derive, typename Launch>
void run_on_device(OwnedBucket& bucket, std::mt19937_64& random) {
  using T = typename Key::Compute;
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

// Steps by the case's first row of options and inputs, and writes what is counted.
void run_step_on_device(OwnedBucket& bucket, Input& input, Output& output) {
  std::mt19937_64 random(bucket.seed);
  OwnedDevice device(input, bucket.view.tensor_count);
  const bool is_small = device.is_small;
  bucket.view.device = &device.view;
  dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    using T = typename Key::Compute;
    if (is_small) {
      run_on_device<Key, SmallDeriveParams<T>, SmallDeviceLaunchParams<T>>(bucket, random);
    } else {
      run_on_device<Key, LargeDeriveParams<T>, LargeDeviceLaunchParams<T>>(bucket, random);
    }
  });
  device.write(output);
}

void run(Command command, Input& input, Output& output) {
  switch (command) {
    case Command::step_on_device: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      run_step_on_device(bucket, input, output);
      return bucket.write(output);
    }
    default:
      fail("not a command of this program");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run); }
