// The watched CUDA step: kernels of their own, so that those of other steps are what they were.
// Includes no torch header, and so compiles in seconds.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/scalars.h"
#include "cuda/step.h"
#include "cuda/watched_block.h"

namespace adamal {
namespace {

constexpr int kWarpThreads = 32;
constexpr int kWarps = kCudaBlockThreads / kWarpThreads;

// As in cuda/step.cu, one fewer: what a thread has seen takes registers too.
template <typename Key>
constexpr int kResidentBlocks =
    sizeof(typename Key::Compute) == sizeof(double) && Key::kHasMax ? 1 : 2;

// What the threads of a warp have seen, in its first.
template <typename T>
__device__ Seen<T> seen_by_warp(Seen<T> seen) {
  for (int lanes = kWarpThreads / 2; lanes > 0; lanes /= 2) {
    seen.add({__shfl_down_sync(~0u, seen.grown, lanes), __shfl_down_sync(~0u, seen.smallest, lanes),
              __shfl_down_sync(~0u, seen.largest, lanes),
              __shfl_down_sync(~0u, seen.least_change, lanes)});
  }
  return seen;
}

template <typename Key, typename Params>
__global__ void __launch_bounds__(kCudaBlockThreads, kResidentBlocks<Key>)
    adamal_watched_step(const __grid_constant__ Params params) {
  using T = typename Key::Compute;
  __shared__ Seen<T> seen_by[kWarps];
  ItemRecord* const record = params.record_of(blockIdx.x);
  if (record == nullptr) return;
  Seen<T> seen = seen_by_warp(watched_thread<Key>(params, blockIdx.x, threadIdx.x, record));
  if (threadIdx.x % kWarpThreads == 0) seen_by[threadIdx.x / kWarpThreads] = seen;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kWarps; ++warp) seen.add(seen_by[warp]);
  record_block(params, blockIdx.x, seen, record);
}

template <typename Key, typename Params>
cudaError_t launch(const Params& params, int64_t block_count, cudaStream_t stream) {
  adamal_watched_step<Key>
      <<<static_cast<unsigned>(block_count), kCudaBlockThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename Key>
cudaError_t launch_all(const Bucket& bucket, const DeviceTables& tables, cudaStream_t stream) {
  using T = typename Key::Compute;
  using Small = SmallRecordedParams<T>;
  LaunchSplitter<T> splitter(bucket, tables.tensors, tables.items);
  LargeRecordedParams<T> params;
  params.records = tables.records;
  while (splitter.next(&params)) {
    cudaError_t error;
    if (splitter.template fits<Small>()) {
      Small small = splitter.template shrink<Small>(params);
      small.records = tables.records;
      error = launch<Key>(small, splitter.block_count(), stream);
    } else {
      error = launch<Key>(params, splitter.block_count(), stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename Key, typename Params, typename T>
cudaError_t launch_next(const GradientSplitter<T>& splitter, const DeviceTables& tables,
                        DeviceRows<T> scalars, cudaStream_t stream) {
  Params params;
  splitter.fill(tables.tensors, tables.items, &params);
  params.scalars = scalars;
  params.records = tables.records;
  return launch<Key>(params, splitter.block_count(), stream);
}

template <typename Key>
cudaError_t launch_all_on_device(const Bucket& bucket, const DeviceTables& tables, void* rows,
                                 cudaStream_t stream) {
  using T = typename Key::Compute;
  using Small = SmallRecordedDeviceParams<T>;
  using Large = LargeRecordedDeviceParams<T>;
  const auto scalars = DeviceRows<T>::at(rows);
  cudaError_t error = derive_scalars_cuda(bucket, scalars, stream);
  GradientSplitter<T> splitter(bucket);
  while (error == cudaSuccess && splitter.next(Large::kTensorCapacity)) {
    error = splitter.tensor_count() <= Small::kTensorCapacity
                ? launch_next<Key, Small>(splitter, tables, scalars, stream)
                : launch_next<Key, Large>(splitter, tables, scalars, stream);
  }
  return error;
}

}  // namespace

const char* watched_step_cuda(const Bucket& bucket, const DeviceTables& tables, void* rows,
                              void* stream) {
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

}  // namespace adamal
