// Derives the scalars of a step on the device: a thread a tensor. Says, too, whether the device can
// run any of this. Includes no torch header.
#include "cuda/scalars.h"
#include "cuda/step.h"

namespace adamal {
namespace {

template <typename Params>
__global__ void __launch_bounds__(kCudaBlockThreads)
    adamal_derive_scalars(const __grid_constant__ Params params) {
  derive_thread(params, blockIdx.x * kCudaBlockThreads + threadIdx.x);
}

template <typename Params, typename T>
cudaError_t derive_all(const Bucket& bucket, DeviceRows<T> scalars, cudaStream_t stream) {
  DeriveSplitter<T> splitter(bucket, scalars);
  Params params;
  while (splitter.next(&params)) {
    const unsigned blocks = (params.tensor_count + kCudaBlockThreads - 1) / kCudaBlockThreads;
    adamal_derive_scalars<<<blocks, kCudaBlockThreads, 0, stream>>>(params);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t derive(const Bucket& bucket, DeviceRows<T> scalars, cudaStream_t stream) {
  return bucket.tensor_count <= SmallDeriveParams<T>::kTensorCapacity
             ? derive_all<SmallDeriveParams<T>>(bucket, scalars, stream)
             : derive_all<LargeDeriveParams<T>>(bucket, scalars, stream);
}

}  // namespace

cudaError_t derive_scalars_cuda(const Bucket& bucket, DeviceRows<float> scalars,
                                cudaStream_t stream) {
  return derive(bucket, scalars, stream);
}

cudaError_t derive_scalars_cuda(const Bucket& bucket, DeviceRows<double> scalars,
                                cudaStream_t stream) {
  return derive(bucket, scalars, stream);
}

// All files are compiled for the same architectures, and this one's module is the smallest to load.
const char* launch_error_cuda() {
  cudaFuncAttributes attributes;
  const cudaError_t error =
      cudaFuncGetAttributes(&attributes, adamal_derive_scalars<SmallDeriveParams<float>>);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // The next launch would report it again.
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return cudaGetErrorString(error);
    default:  // It may pass, and says nothing of the build: the launch will meet it, if any.
      return nullptr;
  }
}

int driver_version_cuda() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace adamal
