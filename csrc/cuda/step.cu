// The CUDA step: the launches of a bucket. Includes no torch header, and so compiles in seconds.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/launches.h"
#include "cuda/scalars.h"
#include "cuda/step.h"
#include "cuda/walk.h"

#if CUDART_VERSION < 12010
#error "adamal_kernels needs CUDA 12.1 or newer: its launches carry up to 32764 bytes of parameters"
#endif

namespace adamal {
namespace {

template <typename Key, typename Params>
__global__ void __launch_bounds__(kCudaBlockThreads, kStepResidentBlocks<Key>)
    adamal_step(const __grid_constant__ Params params) {
  step_block<Key>(params, blockIdx.x, threadIdx.x);
}

template <typename Key, typename Params>
cudaError_t launch(const Params& params, int64_t block_count, cudaStream_t stream) {
  adamal_step<Key><<<static_cast<unsigned>(block_count), kCudaBlockThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename Key>
cudaError_t launch_all(const Bucket& bucket, const DeviceTables& tables, cudaStream_t stream) {
  using T = typename Key::Compute;
  using Small = SmallLaunchParams<T>;
  LaunchSplitter<T> splitter(bucket, tables.tensors, tables.items);
  LargeLaunchParams<T> params;
  while (splitter.next(&params)) {
    const cudaError_t error =
        splitter.template fits<Small>()
            ? launch<Key>(splitter.template shrink<Small>(params), splitter.block_count(), stream)
            : launch<Key>(params, splitter.block_count(), stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Two kernels: the first derives the scalars, the second steps by them.
template <typename Key>
cudaError_t launch_all_on_device(const Bucket& bucket, const DeviceTables& tables, void* rows,
                                 cudaStream_t stream) {
  using T = typename Key::Compute;
  using Large = LargeDeviceLaunchParams<T>;
  using Small = SmallDeviceLaunchParams<T>;
  const auto scalars = DeviceRows<T>::at(rows);
  cudaError_t error = derive_scalars_cuda(bucket, scalars, stream);
  if (error != cudaSuccess) return error;
  GradientSplitter<T> splitter(bucket);
  while (splitter.next(Large::kTensorCapacity)) {
    const auto launch_with = [&](auto* params) {
      splitter.fill(tables.tensors, tables.items, params);
      params->scalars = scalars;
      return launch<Key>(*params, splitter.block_count(), stream);
    };
    if (splitter.tensor_count() <= Small::kTensorCapacity) {
      Small params;
      error = launch_with(&params);
    } else {
      Large params;
      error = launch_with(&params);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t device_rows_bytes(const Bucket& bucket) {
  return kFormats[bucket.format].compute() == Dtype::float64
             ? DeviceRows<double>::bytes(bucket.tensor_count)
             : DeviceRows<float>::bytes(bucket.tensor_count);
}

const char* step_cuda(const Bucket& bucket, const DeviceTables& tables, void* rows, void* stream) {
  if (bucket.item_count > std::numeric_limits<int32_t>::max()) return kTooManyItems;
  cudaError_t error = cudaSuccess;
  const bool known = dispatch(bucket, [&](auto key) {
    using Key = decltype(key);
    const auto on = static_cast<cudaStream_t>(stream);
    error = bucket.device == nullptr ? launch_all<Key>(bucket, tables, on)
                                     : launch_all_on_device<Key>(bucket, tables, rows, on);
  });
  if (!known) return kNoKernel;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

bool is_capturing_cuda(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const auto on = static_cast<cudaStream_t>(stream);
  return cudaStreamIsCapturing(on, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
}

}  // namespace adamal
