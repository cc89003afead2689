// The harness's steps of buckets whose sets couple elements.
#pragma once

#include "owned_bucket.h"

namespace adamal::harness {

// Steps and projects a bucket by the kernels for CUDA. The input goes on with each tensor's set and
// multipliers, whether the step adds sizes, and whether the scalars are the device's, which then
// follow.
void run_project_cuda(OwnedBucket& bucket, Input& input, Output& output);

}  // namespace adamal::harness
