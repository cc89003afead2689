// Steps and projections on the CPU: by the kernels, and as plainly as can be.
#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include "cpu/projection.h"
#include "cpu/step.h"
#include "harness.h"
#include "owned_bucket.h"
#include "owned_sets.h"
#include "shuffled.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

// Random shares of the work, in random order; returns how often work was shared out.
int64_t run_project_cpu(OwnedBucket& bucket, const OwnedSets& sets) {
  std::mt19937_64 random(bucket.seed);
  ProjectedStep projected;
  projected.bind(bucket.tensors, sets.sets, kFormats[bucket.view.format].compute());
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

void run(Command command, Input& input, Output& output) {
  switch (command) {
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
    default:
      fail("not a command of this program");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run); }
