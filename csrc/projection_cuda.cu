// The CUDA step of a bucket whose sets couple elements. Includes no torch header.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "device_guard.h"
#include "launch_params.h"
#include "projection_blocks.h"
#include "scalars_cuda.h"
#include "set_tables.h"
#include "step.h"

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

// By launches of few tensors only: a kernel more for each of many would be a long build.
template <typename Key>
cudaError_t launch_steps(const Bucket& bucket, const DeviceTables& tables, const SetTables& sets,
                         void* rows, cudaStream_t stream) {
  using T = ComputeType<typename Key::Param>;
  const auto launch_with = [&](const auto& params, int64_t blocks) {
    using Params = std::decay_t<decltype(params)>;
    using Kernel = StepBlock<Key::kSecondMoment, typename Key::Param, typename Key::Grad, Params>;
    return launch(Kernel{params, sets.entries}, blocks, stream);
  };
  cudaError_t error = cudaSuccess;
  if (bucket.device == nullptr) {
    LaunchSplitter<T> splitter(bucket, tables.tensors, tables.items);
    SmallLaunchParams<T> params;
    while (error == cudaSuccess && splitter.next(&params)) {
      error = launch_with(params, splitter.block_count());
    }
    return error;
  }
  SmallDeviceLaunchParams<T> params;
  params.scalars = DeviceRows<T>::at(rows);
  error = derive_scalars_cuda(bucket, params.scalars, stream);
  GradientSplitter<T> splitter(bucket);
  while (error == cudaSuccess && splitter.next(params.kTensorCapacity)) {
    splitter.fill(tables.tensors, tables.items, &params);
    error = launch_with(params, splitter.block_count());
  }
  return error;
}

// The step, then the kernels that project what it has stored.
template <typename Key>
cudaError_t launch_all(const Bucket& bucket, const DeviceTables& tables, const SetTables& sets,
                       void* rows, cudaStream_t stream) {
  cudaError_t error = cudaMemsetAsync(sets.is_searching, 0, sets.zeroed_bytes, stream);
  if (error == cudaSuccess) error = launch_steps<Key>(bucket, tables, sets, rows, stream);
  if (error != cudaSuccess) return error;
  project_bucket<typename Key::Param>(tables.tensors, sets, kPieceBlocks,
                                      [&](const auto& kernel, int64_t blocks) {
                                        error = launch(kernel, blocks, stream);
                                        return error == cudaSuccess;
                                      });
  return error;
}

}  // namespace

const char* step_and_project_cuda(const Bucket& bucket, const DeviceTables& tables,
                                  const SetTables& sets, void* rows, int device, void* stream) {
  const int64_t most_blocks = std::max({bucket.item_count, sets.tile_count, sets.long_row_count});
  if (most_blocks > std::numeric_limits<int32_t>::max()) return kTooManyItems;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return cudaGetErrorString(guard.error());
  cudaError_t error = cudaSuccess;
  const bool known = dispatch(bucket, [&](auto key) {
    error = launch_all<decltype(key)>(bucket, tables, sets, rows, static_cast<cudaStream_t>(stream));
  });
  if (!known) return "no kernel for this pair of types and second moment";
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace adamal
