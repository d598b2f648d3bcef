// Owns how threads work in step: they come together once for an operator, and then share one step of it after the
// other, each until all have done their part. Within a step no thread may look at what another one writes.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <exception>

namespace llama2 {

// One thread's place among those that do the same work.
class Team {
 public:
  // Calls `work(team)` on all of torch's threads, or on this one alone where the others are not worth waking, and
  // throws what it threw.
  template <typename Work>
  static void run(bool is_worth_waking, const Work& work) {
    Meeting meeting;
    std::exception_ptr error;  // must not leave a thread by itself
    auto take_part = [&](int thread, int threads) {
      try {
        work(Team(meeting, thread, threads));
      } catch (const Left&) {
      } catch (...) {
        error = std::current_exception();
        meeting.is_over.store(true);
      }
    };
    if (is_worth_waking && at::get_num_threads() > 1) {
#pragma omp parallel
      take_part(omp_get_thread_num(), omp_get_num_threads());
    } else {
      take_part(0, 1);
    }
    if (error) std::rethrow_exception(error);
  }

  // Calls `step(begin, end)` for this thread's part of [0, size). It must not throw.
  template <typename Step>
  void share(int64_t size, const Step& step) const {
    const int64_t part = (size + threads_ - 1) / threads_, begin = std::min(thread_ * part, size);
    if (begin < size) step(begin, std::min(begin + part, size));
    meet();
  }

  // Calls `step()` on the first thread. It may throw: then the others leave the work too.
  template <typename Step>
  void alone(const Step& step) const {
    if (thread_ == 0) step();
    meet();
  }

 private:
  struct Left {};
  struct Meeting {
    alignas(64) std::atomic<int> arrivals{0};
    alignas(64) std::atomic<int64_t> rounds{0};
    std::atomic<bool> is_over{false};
  };

  Team(Meeting& meeting, int thread, int threads) : meeting_(meeting), thread_(thread), threads_(threads) {}

  // Returns when all threads have come here. One that has no processor of its own lets others run.
  void meet() const {
    if (threads_ == 1) return;
    const int64_t round = meeting_.rounds.load();
    if (meeting_.arrivals.fetch_add(1) + 1 == threads_) {
      meeting_.arrivals.store(0);
      meeting_.rounds.store(round + 1);
    }
    for (int64_t spins = 1; meeting_.rounds.load() == round; spins++) {
      if (meeting_.is_over.load()) throw Left();
      if (spins % 4096 == 0) sched_yield();
    }
  }

  Meeting& meeting_;
  const int thread_, threads_;
};

}  // namespace llama2
