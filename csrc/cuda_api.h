// What the CUDA module hands to the plan: plain functions in a capsule, so that neither module
// links the other, and the one with the kernels needs no torch.
#pragma once

#include "step.h"

namespace adamal {

inline constexpr const char* kCudaApiCapsule = "adamal_kernels.cuda_api/1";

struct CudaApi {
  decltype(&step_cuda) step;
  decltype(&upload_cuda) upload;
};

}  // namespace adamal
