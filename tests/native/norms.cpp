// Squared norms of gradients.
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "cpu/step.h"
#include "cuda/launches.h"
#include "cuda/norm_tree.h"
#include "cuda/step.h"
#include "cuda/walk.h"
#include "formula/norm.h"
#include "harness.h"
#include "owned_bucket.h"
#include "shuffled.h"

namespace {

using namespace adamal;
using namespace adamal::harness;

// Threads of a block in random order, which wait for one another before every level.
template <typename T, typename Grad, typename Params>
void run_norm(OwnedBucket& bucket, std::vector<double>* sums, std::mt19937_64& random) {
  using Tree = NormTree<T, Grad>;
  std::vector<double> item_sums(bucket.items.size());
  const auto params = std::make_unique<Params>();
  GradientSplitter<T> splitter(bucket.view);
  while (splitter.next(Params::kTensorCapacity)) {
    splitter.fill(bucket.tensors.data(), bucket.items.data(), params.get());
    for (const int64_t block : shuffled(splitter.block_count(), random)) {
      const WorkItem item = params->items[block];
      const auto* grad =
          static_cast<const Grad*>(params->grads[item.tensor - params->first_tensor]);
      if (grad == nullptr) continue;
      const int64_t offset = item.chunk * kCudaChunk<T>;
      const int64_t left = params->tensors[item.tensor].numel - offset;
      const auto leaves = std::make_unique<double[]>(Tree::kLeaves);
      for (const int thread : shuffled(kCudaBlockThreads, random)) {
        Tree::add_leaves(grad + offset, int(min_of(left, kCudaChunk<T>)), thread, leaves.get());
      }
      for (int stride = 1; stride < Tree::kLeaves; stride *= 2) {
        for (const int thread : shuffled(kCudaBlockThreads, random)) {
          add_level(leaves.get(), Tree::kLeaves, stride, thread);
        }
      }
      item_sums[splitter.first_item() + block] = leaves[0];
    }
  }
  int64_t first_item = 0;
  for (const TensorEntry& tensor : bucket.tensors) {
    const int64_t chunks = (tensor.numel + kNormChunk<T> - 1) / kNormChunk<T>;
    double lanes[kNormLanes];
    for (const int lane : shuffled(kNormLanes, random)) {
      lanes[lane] = add_lane(item_sums.data() + first_item, chunks, lane);
    }
    for (int stride = 1; stride < kNormLanes; stride *= 2) {
      for (const int thread : shuffled(kNormLanes, random)) {
        add_level(lanes, kNormLanes, stride, thread);
      }
    }
    sums->push_back(lanes[0]);
    first_item += chunks;
  }
}

void run_norm_cuda(OwnedBucket& bucket, Output& output) {
  std::mt19937_64 random(bucket.seed);
  std::vector<double> sums;
  dispatch(bucket.view, [&](auto key) {
    using Key = decltype(key);
    run_norm<typename Key::Compute, typename Key::Grad, SmallNormParams>(bucket, &sums, random);
  });
  output.array(sums);
}

void run_norm_cpu(OwnedBucket& bucket, Output& output) {
  std::vector<double> chunk_sums(bucket.view.item_count * kNormChunksPerItem, -1.0);
  std::mt19937_64 random(bucket.seed);
  for (const int64_t i : shuffled(bucket.view.item_count, random)) {
    squared_norm_items_cpu(bucket.view, i, i + 1, chunk_sums.data());
  }
  std::vector<double> sums(bucket.view.tensor_count);
  squared_norm_tensors_cpu(bucket.view, chunk_sums.data(), sums.data());
  output.array(sums);
}

void run(Command command, Input& input, Output& output) {
  switch (command) {
    case Command::norm_cpu: {
      OwnedBucket bucket(input, /*for_cpu=*/true);
      return run_norm_cpu(bucket, output);
    }
    case Command::norm_cuda: {
      OwnedBucket bucket(input, /*for_cpu=*/false);
      return run_norm_cuda(bucket, output);
    }
    default:
      fail("not a command of this program");
  }
}

}  // namespace

int main(int argc, char** argv) { return run_cases(argc, argv, run); }
