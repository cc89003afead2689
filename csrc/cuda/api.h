// What the CUDA module hands to the plan: plain functions in a capsule, so that neither module
// links the other, and the one with the kernels needs no torch.
#pragma once

#include "cuda/step.h"

namespace adamal {

inline constexpr const char* kCudaApiCapsule = "adamal_kernels.cuda_api/4";

struct CudaApi {
  decltype(&step_cuda) step;
  decltype(&watched_step_cuda) watched_step;
  decltype(&step_and_project_cuda) step_and_project;
  decltype(&device_rows_bytes) rows_bytes;
  decltype(&squared_norm_cuda) squared_norm;
  decltype(&is_capturing_cuda) is_capturing;
};

}  // namespace adamal
