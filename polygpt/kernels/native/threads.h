// Work on several threads of XLA's pool.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace polygpt {

using ThreadPool = xla::ffi::ThreadPool;

// Calls part(0) to part(parts - 1) on the calling thread and those of XLA's pool that are free. Each takes a range of its
// own from front to back, because what a part fetches ahead belongs to the next one, and then what is left of the other
// ranges. It waits for parts that another thread has begun, never for a thread to become free: all of them may be waiting
// here. Where memory is too short to ask for more threads, it goes on without them: to throw would free what the others
// still read.
template <class Part>
void in_parallel(ThreadPool& pool, int64_t parts, Part part) {
  const int64_t threads = std::min<int64_t>(std::max<int64_t>(1, pool.num_threads()), parts);
  struct State {
    std::atomic<int64_t> arrived{0}, done{0};
    std::vector<std::atomic<int64_t>> next;  // of each range
  };
  auto state = std::make_shared<State>();
  state->next = std::vector<std::atomic<int64_t>>(threads);
  for (int64_t range = 0; range < threads; range++) state->next[range] = range * parts / threads;
  auto work = [state, threads, parts, part] {
    const int64_t own = state->arrived.fetch_add(1);
    for (int64_t other = 0; other < threads; other++) {
      const int64_t range = (own + other) % threads, end = (range + 1) * parts / threads;
      for (int64_t each; (each = state->next[range].fetch_add(1)) < end;) {
        part(each);
        state->done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  try {
    for (int64_t other = 1; other < threads; other++) pool.Schedule([work] { work(); });
  } catch (const std::bad_alloc&) {
  }
  work();
  for (int64_t turns = 0; state->done.load(std::memory_order_acquire) < parts; turns++) {
    if (turns > 1000) std::this_thread::yield();
#if defined(__x86_64__)
    else _mm_pause();
#endif
  }
}

// Outputs of a part: threads meet at the end of a product, so parts are small beside a thread's share.
int64_t part_size(ThreadPool& pool, int64_t outputs, int64_t multiple) {
  const int64_t wanted = outputs / (8 * std::max<int64_t>(1, pool.num_threads()));
  return std::max<int64_t>(multiple, std::min<int64_t>(96, wanted) / multiple * multiple);
}

}  // namespace polygpt
