// The first kernel of a step whose scalars are derived on the device.
#pragma once

#include <cuda_runtime.h>

#include "cuda/launches.h"

namespace adamal {

// Enqueues on the current device: derives each tensor's scalars and counts its step, or finds the
// step to be skipped.
cudaError_t derive_scalars_cuda(const Bucket& bucket, DeviceRows<float> scalars,
                                cudaStream_t stream);
cudaError_t derive_scalars_cuda(const Bucket& bucket, DeviceRows<double> scalars,
                                cudaStream_t stream);

}  // namespace adamal
