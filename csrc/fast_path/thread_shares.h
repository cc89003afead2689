// A walk over many small objects that torch's CPU threads share, whenever each of them comes.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

namespace adamal {

// Every thread has a share, which it takes in parts, and then takes what is left of the others': a
// thread that has to be woken first, which takes as long as some hundred members, leaves its share
// to those that are there. In the next walk each has the same share, still in its cache.
class ThreadShares {
 public:
  // How many threads have `least` of `count` each.
  static size_t threads_for(size_t count, size_t least) {
    return std::min<size_t>(at::get_num_threads(), std::max<size_t>(1, count / least));
  }

  // Calls body(first, last) for parts of [0, count), on as many threads as have `least` each. They
  // may read Python's objects while the caller, who waits for them, holds the GIL for all.
  template <typename Body>
  void walk(size_t count, size_t least, const Body& body) {
    walk(count, least, [] { return true; }, body);
  }

  // The same after the caller's prepare(), during which the others are woken; false, and no body
  // called, where prepare() returns false.
  template <typename Prepare, typename Body>
  bool walk(size_t count, size_t least, const Prepare& prepare, const Body& body) {
    using Clock = std::chrono::steady_clock;
    const size_t threads = threads_for(count, least);
    is_shared_ = walks_alone_ == 0 && threads > 1;
    if (!is_shared_) {
      walks_alone_ -= walks_alone_ > 0;
      if (!prepare()) return false;
      if (count > 0) body(0, count);
      return true;
    }
    std::vector<Share> shares(threads);
    for (size_t i = 0; i < threads; ++i) {
      shares[i].next = count * i / threads;
      shares[i].end = count * (i + 1) / threads;
    }
    Clock::time_point start;
    std::atomic<Prepared> prepared = Prepared::not_yet;
    at::parallel_for(0, static_cast<int64_t>(threads), 1, [&](int64_t first, int64_t last) {
      if (first == 0) {
        // The caller's; should it throw, the others go home.
        struct Announce {
          std::atomic<Prepared>* to;
          Prepared what = Prepared::in_vain;
          ~Announce() { to->store(what, std::memory_order_release); }
        } announce{&prepared};
        if (prepare()) announce.what = Prepared::well;
        start = Clock::now();
      }
      Prepared found;
      while ((found = prepared.load(std::memory_order_acquire)) == Prepared::not_yet) {
        std::this_thread::yield();
      }
      if (found == Prepared::in_vain) return;
      for (int64_t own = first; own < last; ++own) {
        for (size_t i = 0; i < threads; ++i) take(&shares[(own + i) % threads], body);
      }
    });
    // All of them have to come before the caller goes on. Where the machine is busy, one comes
    // milliseconds late: then this thread walks alone for a while, and longer each time that one
    // is late again.
    if (Clock::now() - start > count * kLate) {
      walks_alone_ = penalty_;
      penalty_ = std::min(2 * penalty_, kMostWalksAlone);
    } else {
      penalty_ = std::max(penalty_ / 2, kLeastWalksAlone);
    }
    return prepared.load(std::memory_order_relaxed) == Prepared::well;
  }

  // Whether several threads shared the last walk, and all came in time: by torch's defaults they
  // now wait for more, for a while.
  bool are_awake() const { return is_shared_ && walks_alone_ == 0; }

 private:
  static constexpr size_t kPart = 128;
  static constexpr int kLeastWalksAlone = 2, kMostWalksAlone = 64;
  // More than one thread takes for a member, on the slowest machine seen.
  static constexpr std::chrono::nanoseconds kLate{1000};

  enum class Prepared { not_yet, well, in_vain };

  struct alignas(64) Share {
    std::atomic<size_t> next;
    size_t end;
  };

  template <typename Body>
  static void take(Share* share, const Body& body) {
    for (size_t first;
         (first = share->next.fetch_add(kPart, std::memory_order_relaxed)) < share->end;) {
      body(first, std::min(first + kPart, share->end));
    }
  }

  int walks_alone_ = 0;             // that are still to come
  int penalty_ = kLeastWalksAlone;  // for the next that is late, in walks alone
  bool is_shared_ = false;
};

}  // namespace adamal
