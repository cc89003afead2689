#include "plan/cpu_plan.h"

#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>

#include <algorithm>

namespace adamal {
namespace {

// A thread's least share, about 0.1 ms: less is done before another thread, on a busy machine, has
// so much as begun.
constexpr int64_t kParallelElements = 262144;
// The same where the others have just worked, and wait for more.
constexpr int64_t kParallelElementsAwake = 32768;
// A thread's part of the last cache is less on most processors; what they say it is cannot be
// relied on in virtual machines.
constexpr int64_t kCachedBytes = 16 << 20;
// What a work item costs besides its elements, in elements: look-ups and the loop's ends.
constexpr int64_t kItemOverhead = 64;

// Calls body(first, last) for shares of pieces of work, on torch's CPU threads. They are shared out
// by cost, not by pieces: a ragged bucket would keep one thread waiting.
template <typename Body>
void for_shares(const std::vector<int64_t>& cost_before, const Body& body,
                int64_t least = kParallelElements) {
  const auto count = static_cast<int64_t>(cost_before.size()) - 1;
  at::parallel_for(0, cost_before.back(), least, [&](int64_t first, int64_t last) {
    const auto piece_at = [&](int64_t cost) {
      return std::lower_bound(cost_before.begin(), cost_before.end(), cost) - cost_before.begin();
    };
    body(piece_at(first), std::min<int64_t>(piece_at(last), count));
  });
}

int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64:
      return 8;
    case Dtype::float32:
      return 4;
    case Dtype::bfloat16:
    case Dtype::float16:
      break;
  }
  return 2;
}

}  // namespace

void CpuPlan::on_bound() {
  cost_before_.resize(items().size() + 1);
  cost_before_[0] = 0;
  const int64_t second_moments = second_moment() == SecondMoment::amsgrad ? 2 : 1;
  const int64_t element_bytes = bytes_of(format().param) + bytes_of(format().grad) +
                                bytes_of(format().exp_avg) +
                                second_moments * bytes_of(format().exp_avg_sq);
  bytes_ = 0;
  for (const TensorEntry& tensor : tensors()) bytes_ += tensor.numel * element_bytes;
  for (size_t i = 0; i < items().size(); ++i) {
    const int64_t left = tensors()[items()[i].tensor].numel - items()[i].chunk * kCpuChunk;
    cost_before_[i + 1] = cost_before_[i] + std::min(kCpuChunk, left) + kItemOverhead;
  }
  if (!sets().empty()) projected_.bind(tensors(), sets(), format().compute());
}

void CpuPlan::launch(const Bucket& bucket) {
  if (bucket.device == nullptr) {
    launch_by_rows(bucket);
    return;
  }
  // The twin of the CUDA step's first kernel.
  const DeviceScalars& device = *bucket.device;
  if (gradient_factor(device.inputs).skip) {
    if (device.skipped_steps != nullptr) ++*device.skipped_steps;
    return;
  }
  std::vector<StepScalars<double>> scalars(bucket.tensor_count);
  std::vector<uint32_t> rows(bucket.tensor_count);
  for (int64_t i = 0; i < bucket.tensor_count; ++i) {
    if (bucket.grads[i] == nullptr) continue;
    rows[i] = static_cast<uint32_t>(i);
    derive_and_count(device.options[bucket.rows[i]], device.inputs, device.counts + i, &scalars[i]);
  }
  Bucket by_rows = bucket;
  by_rows.rows = rows.data();
  by_rows.scalars = scalars.data();
  by_rows.scalar_count = bucket.tensor_count;
  by_rows.device = nullptr;
  launch_by_rows(by_rows);
}

void CpuPlan::launch_by_rows(Bucket bucket) {
  // A projection reads again what the step has just written.
  bucket.exceeds_caches = bucket.sets == nullptr && bytes_ > kCachedBytes * at::get_num_threads();
  const auto step_items = [&] {
    for_shares(
        cost_before_, [&](int64_t first, int64_t last) { step_cpu(bucket, first, last); },
        bucket.threads_are_awake ? kParallelElementsAwake : kParallelElements);
  };
  if (bucket.sets != nullptr) {
    if (bucket.records != nullptr) step_items();
    projected_.step(bucket, [](const std::vector<int64_t>& cost_before,
                               const ProjectedStep::Body& body) { for_shares(cost_before, body); });
    return;
  }
  step_items();
}

at::Tensor CpuPlan::launch_squared_norm(const Bucket& bucket) {
  std::vector<double> chunk_sums(bucket.item_count * kNormChunksPerItem);
  for_shares(cost_before_, [&](int64_t first, int64_t last) {
    squared_norm_items_cpu(bucket, first, last, chunk_sums.data());
  });
  std::vector<double> sums(bucket.tensor_count);
  squared_norm_tensors_cpu(bucket, chunk_sums.data(), sums.data());
  double total = 0;
  for (const double sum : sums) total += sum;
  return at::scalar_tensor(total, at::TensorOptions().dtype(at::kDouble));
}

}  // namespace adamal
