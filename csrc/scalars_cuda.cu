// Derives the scalars of a step on the device: a thread a tensor. Includes no torch header.
#include "scalars_cuda.h"

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

}  // namespace adamal
