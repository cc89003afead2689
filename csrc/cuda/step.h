// One step of one bucket on CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formula/bucket.h"
#include "formula/dtypes.h"

namespace adamal {

// A CUDA work item is a block, each of whose threads holds 32 bytes of every moment in registers:
// enough loads in flight to hide the memory's latency, few enough to keep several blocks resident.
inline constexpr int kCudaBlockThreads = 256;
template <typename T>
inline constexpr int kCudaThreadElements = 32 / sizeof(T);
template <typename T>
inline constexpr int64_t kCudaChunk = kCudaBlockThreads * kCudaThreadElements<T>;

// Elements a CUDA work item covers.
constexpr int64_t cuda_chunk(int format) {
  return kFormats[format].compute() == Dtype::float64 ? kCudaChunk<double> : kCudaChunk<float>;
}

inline constexpr const char* kTooManyItems =
    "a bucket of more than 2^31 - 1 chunks exceeds a CUDA grid: split its parameters over several "
    "optimizers";

// A bucket's tables, copied to the device.
struct DeviceTables {
  const TensorEntry* tensors;
  const WorkItem* items;
  const int64_t* first_items;  // of each tensor
  ItemRecord* const* records;  // of each tensor; null: the step is not watched
};

// Enqueues the step of a whole bucket on `stream` (a cudaStream_t) of the current device. `bucket`
// is the host's view: its tables lie in host memory, the tensors and gradients they point to on the
// device. `rows` is device memory of device_rows_bytes(bucket); not used, and may be null, where
// the scalars are the host's. Returns nullptr, or what went wrong (a static string).
const char* step_cuda(const Bucket& bucket, const DeviceTables& tables, void* rows, void* stream);
int64_t device_rows_bytes(const Bucket& bucket);

// The same, and keeps what the step came to in the records.
const char* watched_step_cuda(const Bucket& bucket, const DeviceTables& tables, void* rows,
                              void* stream);
// Steps, watching or not, and projects a bucket whose sets couple elements. `sets` are its tables
// of cuda/set_tables.h on the device, with room for its scalars.
struct SetTables;
const char* step_and_project_cuda(const Bucket& bucket, const DeviceTables& tables,
                                  const SetTables& sets, void* stream);

// Enqueues the sum of squares of all gradients into `total`. `scratch` is device memory for a
// double a work item and a double a tensor. Returns as step_cuda does.
const char* squared_norm_cuda(const Bucket& bucket, const DeviceTables& tables, double* scratch,
                              double* total, void* stream);

// Whether a CUDA graph is being captured on `stream`.
bool is_capturing_cuda(void* stream);

// Why the current device, or its driver, can launch no kernel of this module, whatever it is: a
// static string; nullptr if that is not known.
const char* launch_error_cuda();

// The newest CUDA that the driver runs, 1000 * major + 10 * minor; 0 without a driver.
int driver_version_cuda();

}  // namespace adamal
