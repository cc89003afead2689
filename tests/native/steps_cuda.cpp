// Steps by the kernel for CUDA, by the host's scalars.
#include <cstdint>
#include <memory>
#include <random>

#include "cuda/launches.h"
#include "cuda/step.h"
#include "harness.h"
#include "owned_bucket.h"
#include "step_launches.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

struct LaunchCounts {
  int64_t launches = 0;
  int64_t small_launches = 0;
};

// Random blocks and threads of each launch.
LaunchCounts run_step_cuda(OwnedBucket& bucket) {
  std::mt19937_64 random(bucket.seed);
  LaunchCounts counts;
  const bool known = dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    using T = typename Key::Compute;
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
  if (!known) fail(kNoKernel);
  return counts;
}

void run(Command command, Input& input, Output& output) {
  switch (command) {
    case Command::step_cuda: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      const LaunchCounts counts = run_step_cuda(bucket);
      output.integer(counts.launches);
      output.integer(counts.small_launches);
      return bucket.write(output);
    }
    default:
      fail("not a command of this program");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run); }
