// Owns how threads work in step: they are woken once for an operator, and then share its steps one after the other,
// with a barrier after each. Within a step no thread may read what another writes.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <exception>

namespace llama2 {

// One thread's place among those that do the same work.
class Team {
 public:
  // Calls `work(team)` on all of torch's threads, or on this one alone where the others are not worth waking, and
  // rethrows what a step threw.
  template <typename Work>
  static void run(bool is_worth_waking, const Work& work) {
    std::exception_ptr error;  // must not propagate out of the parallel region
    if (is_worth_waking && at::get_num_threads() > 1) {
#pragma omp parallel
      work(Team(error, omp_get_thread_num(), omp_get_num_threads()));
    } else {
      work(Team(error, 0, 1));
    }
    if (error) std::rethrow_exception(error);
  }

  // Calls `step(begin, end)` for this thread's part of [0, size). It must not throw.
  template <typename Step>
  void share(int64_t size, const Step& step) const {
    share_without_meeting(size, step);
    meet();
  }

  // As a part of the step that follows.
  template <typename Step>
  void share_without_meeting(int64_t size, const Step& step) const {
    const int64_t part = (size + threads_ - 1) / threads_, begin = std::min(thread_ * part, size);
    if (begin < size && !error_) step(begin, std::min(begin + part, size));
  }

  // Calls `step()` on the first thread. If it throws, all threads skip the steps that follow.
  template <typename Step>
  void alone(const Step& step) const {
    if (thread_ == 0 && !error_) {
      try {
        step();
      } catch (...) {
        error_ = std::current_exception();
      }
    }
    meet();
  }

  // Returns when all threads have arrived. In OpenMP's barrier a thread that waits long sleeps and lets others run.
  void meet() const {
    if (threads_ == 1) return;
#pragma omp barrier
  }

 private:
  Team(std::exception_ptr& error, int thread, int threads) : error_(error), thread_(thread), threads_(threads) {}

  std::exception_ptr& error_;  // written by the first thread in `alone`, read by all after the barrier
  const int thread_, threads_;
};

}  // namespace llama2
