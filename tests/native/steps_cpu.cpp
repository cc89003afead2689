// Steps by the kernels for the CPU.
#include "harness.h"
#include "owned_bucket.h"
#include "step_shares.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

void run(Command command, Input& input, Output& output) {
  switch (command) {
    case Command::step_cpu: {
      OwnedBucket bucket(input, /*for_cpu=*/true);
      run_step_cpu(bucket);
      return bucket.write(output);
    }
    default:
      fail("not a command of this program");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run); }
