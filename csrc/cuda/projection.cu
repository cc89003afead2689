// The CUDA step of a bucket whose sets couple elements. Includes no torch header.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cuda/launches.h"
#include "cuda/projection_launches.h"
#include "cuda/scalars.h"
#include "cuda/set_tables.h"
#include "cuda/step.h"

namespace adamal {
namespace {

// Blocks that fill any device.
constexpr int64_t kPieceBlocks = 2048;

// The threads of this block, of which the caller is one.
struct DeviceBlock {
  __device__ int64_t index() const { return blockIdx.x; }
  __device__ int64_t count() const { return gridDim.x; }
  template <typename Body>
  __device__ __forceinline__ void phase(const Body& body) const {
    body(static_cast<int>(threadIdx.x));
    __syncthreads();
  }
};

template <typename Kernel>
__global__ void __launch_bounds__(kCudaBlockThreads, Kernel::kResident)
    adamal_project(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  kernel(DeviceBlock{}, shared);
}

template <typename Kernel>
cudaError_t launch(const Kernel& kernel, int64_t blocks, cudaStream_t stream) {
  adamal_project<<<static_cast<unsigned>(blocks), kCudaBlockThreads, 0, stream>>>(kernel);
  return cudaGetLastError();
}

// The scalars, the step by them, and the kernels that project what it has stored.
template <typename Key>
const char* launch_all(const Bucket& bucket, const DeviceTables& tables, const SetTables& sets,
                       cudaStream_t stream) {
  using T = typename Key::Compute;
  const auto scalars = DeviceRows<T>::at(sets.scalars);
  cudaError_t error = cudaMemsetAsync(sets.is_searching, 0, sets.zeroed_bytes, stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const auto launch_on_stream = [&](const auto& kernel, int64_t blocks) {
    error = launch(kernel, blocks, stream);
    return error == cudaSuccess;
  };
  if (bucket.device == nullptr) store_scalars(bucket, tables, scalars, launch_on_stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (bucket.records != nullptr) {
    const char* failure = watched_step_cuda(bucket, tables, sets.scalars, stream);
    if (failure != nullptr) return failure;
  } else {
    if (bucket.device != nullptr) error = derive_scalars_cuda(bucket, scalars, stream);
    if (error == cudaSuccess) {
      step_bucket<Key>(bucket, tables, sets, scalars, launch_on_stream);
    }
  }
  if (error == cudaSuccess) {
    project_bucket<typename Key::Rows>(tables.tensors, sets, kPieceBlocks,
                                       bucket.records == nullptr, launch_on_stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* step_and_project_cuda(const Bucket& bucket, const DeviceTables& tables,
                                  const SetTables& sets, void* stream) {
  const int64_t most_blocks = std::max({bucket.item_count, sets.tile_count, sets.long_row_count});
  if (most_blocks > std::numeric_limits<int32_t>::max()) return kTooManyItems;
  const char* failure = nullptr;
  const bool known = dispatch(bucket, [&](auto key) {
    failure = launch_all<decltype(key)>(bucket, tables, sets, static_cast<cudaStream_t>(stream));
  });
  return known ? failure : kNoKernel;
}

}  // namespace adamal
