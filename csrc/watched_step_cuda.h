// The watched step by scalars that lie on the device already.
#pragma once

#include <cuda_runtime.h>

#include "step.h"

namespace adamal {

// Enqueues the step alone: nothing is derived or counted. `rows` is the memory of the scalars, a
// DeviceRows. The device is the current one.
cudaError_t watched_step_by_rows_cuda(const Bucket& bucket, const DeviceTables& tables, void* rows,
                                      cudaStream_t stream);

}  // namespace adamal
