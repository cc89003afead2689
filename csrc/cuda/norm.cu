// The CUDA norm: the sum of squares of a bucket's gradients, in the order of formula/norm.h.
// Includes no torch header, and so compiles in seconds.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/launches.h"
#include "cuda/norm_tree.h"
#include "cuda/step.h"
#include "formula/norm.h"

namespace adamal {
namespace {

// A block a work item, which is a chunk of the norm.
template <typename T, typename Grad, typename Params>
__global__ void __launch_bounds__(kCudaBlockThreads)
    adamal_norm_of_items(const __grid_constant__ Params params) {
  using Tree = NormTree<T, Grad>;
  static_assert(kNormChunk<T> == kCudaChunk<T>);
  __shared__ double leaves[Tree::kLeaves];
  const WorkItem item = params.items[blockIdx.x];
  const Grad* grad = static_cast<const Grad*>(params.grads[item.tensor - params.first_tensor]);
  if (grad == nullptr) return;  // Its sum has been set to 0.
  const int64_t offset = item.chunk * kCudaChunk<T>;
  const int64_t left = params.tensors[item.tensor].numel - offset;
  Tree::add_leaves(grad + offset, int(min_of(left, kCudaChunk<T>)), threadIdx.x, leaves);
  for (int stride = 1; stride < Tree::kLeaves; stride *= 2) {
    __syncthreads();
    add_level(leaves, Tree::kLeaves, stride, threadIdx.x);
  }
  // The thread that added the last level.
  if (threadIdx.x == 0) params.item_sums[blockIdx.x] = leaves[0];
}

// A block a tensor, a thread a lane.
__global__ void __launch_bounds__(kNormLanes)
    adamal_norm_of_tensors(DeviceTables tables, const double* item_sums, int64_t chunk,
                           double* sums) {
  __shared__ double lanes[kNormLanes];
  const int64_t chunks = (tables.tensors[blockIdx.x].numel + chunk - 1) / chunk;
  lanes[threadIdx.x] = add_lane(item_sums + tables.first_items[blockIdx.x], chunks, threadIdx.x);
  for (int stride = 1; stride < kNormLanes; stride *= 2) {
    __syncthreads();
    add_level(lanes, kNormLanes, stride, threadIdx.x);
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = lanes[0];
}

// One block: its threads fetch what the first adds, one after another.
__global__ void __launch_bounds__(kNormLanes)
    adamal_norm_total(const double* sums, int64_t count, double* total) {
  __shared__ double fetched[kNormLanes];
  double sum = 0;
  for (int64_t first = 0; first < count; first += kNormLanes) {
    const int64_t i = first + threadIdx.x;
    fetched[threadIdx.x] = i < count ? sums[i] : 0.0;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int j = 0; j < kNormLanes; ++j) sum = sum + fetched[j];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *total = sum;
}

template <typename T, typename Grad, typename Params>
cudaError_t launch_items(const GradientSplitter<T>& splitter, const DeviceTables& tables,
                         double* item_sums, cudaStream_t stream) {
  Params params;
  splitter.fill(tables.tensors, tables.items, &params);
  params.item_sums = item_sums + splitter.first_item();
  adamal_norm_of_items<T, Grad>
      <<<static_cast<unsigned>(splitter.block_count()), kCudaBlockThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, typename Grad>
cudaError_t launch_all(const Bucket& bucket, const DeviceTables& tables, double* item_sums,
                       double* total, cudaStream_t stream) {
  double* const sums = item_sums + bucket.item_count;
  cudaError_t error = cudaMemsetAsync(item_sums, 0, bucket.item_count * sizeof(double), stream);
  if (error != cudaSuccess) return error;
  GradientSplitter<T> splitter(bucket);
  while (splitter.next(LargeNormParams::kTensorCapacity)) {
    error = splitter.tensor_count() <= SmallNormParams::kTensorCapacity
                ? launch_items<T, Grad, SmallNormParams>(splitter, tables, item_sums, stream)
                : launch_items<T, Grad, LargeNormParams>(splitter, tables, item_sums, stream);
    if (error != cudaSuccess) return error;
  }
  adamal_norm_of_tensors<<<static_cast<unsigned>(bucket.tensor_count), kNormLanes, 0, stream>>>(
      tables, item_sums, kNormChunk<T>, sums);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  adamal_norm_total<<<1, kNormLanes, 0, stream>>>(sums, bucket.tensor_count, total);
  return cudaGetLastError();
}

}  // namespace

const char* squared_norm_cuda(const Bucket& bucket, const DeviceTables& tables, double* scratch,
                              double* total, void* stream) {
  if (bucket.item_count > std::numeric_limits<int32_t>::max()) return kTooManyItems;
  cudaError_t error = cudaSuccess;
  const bool known = dispatch(bucket, [&](auto key) {
    using Key = decltype(key);
    error = launch_all<typename Key::Compute, typename Key::Grad>(
        bucket, tables, scratch, total, static_cast<cudaStream_t>(stream));
  });
  if (!known) return kNoKernel;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace adamal
