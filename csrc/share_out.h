// Work that other threads take a share of if they come in time; nobody waits for them to come.
//
// at::parallel_for waits until every thread has had its turn. Where the machine is busy with
// something else, as with a data loader's workers, that is milliseconds for a walk of a tenth of
// one. Here the caller takes the parts that no one else has taken, and waits for begun ones only.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

namespace adamal {

// Calls body(first, last) for parts of [0, count), each of at most `part`, on the caller's thread
// and on torch's inter-op threads.
template <typename Body>
void share_out(size_t count, size_t part, const Body& body) {
  struct Shares {
    Shares(size_t all, size_t each, const Body* call) : count(all), part(each), body(call) {}

    const size_t count, part;
    const Body* body;  // lives for as long as there are parts to take
    std::atomic<size_t> taken{0}, done{0};
    std::mutex mutex;
    std::exception_ptr error;

    void work() {
      for (size_t first; (first = taken.fetch_add(part)) < count; done.fetch_add(part)) {
        try {
          (*body)(first, std::min(first + part, count));
        } catch (...) {
          const std::lock_guard<std::mutex> lock(mutex);
          error = std::current_exception();
        }
      }
    }
  };
  const size_t parts = (count + part - 1) / part;
  const size_t helpers = std::min<size_t>(at::get_num_threads(), parts) - (parts > 0);
  if (helpers == 0) {
    if (count > 0) body(0, count);
    return;
  }
  const auto shares = std::make_shared<Shares>(count, part, &body);
  for (size_t i = 0; i < helpers; ++i) at::launch([shares] { shares->work(); });
  shares->work();
  while (shares->done.load() < parts * part) std::this_thread::yield();
  if (shares->error) std::rethrow_exception(shares->error);
}

}  // namespace adamal
