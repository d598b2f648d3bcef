// Owns the sum over the ranks of one host, through memory that they share.
//
// The protocol is described in llama2/parallel/shared_memory.py.
#include <ATen/ATen.h>
#include <sched.h>
#include <torch/library.h>

#include <chrono>

#include "kernels.h"
#include "lanes.h"

namespace llama2 {
namespace {

constexpr int64_t kLine = 64 / sizeof(int64_t);

struct Ranks {
  int64_t* header;
  uint8_t* slots;
  int64_t rank, world_size, slot_bytes;
  std::chrono::duration<double> patience;

  uint8_t* slot(int64_t operation, int64_t of) const { return slots + (operation % 2 * world_size + of) * slot_bytes; }
  int64_t& flag(int64_t of) const { return header[of * kLine]; }
  int64_t& bytes(int64_t operation, int64_t of) const { return header[of * kLine + 1 + operation % 2]; }

  // Waits until every rank has contributed to `operation`; yields, for ranks that share a processor.
  void wait(int64_t operation) const {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    for (int64_t other = 0; other < world_size; other++)
      for (int64_t spins = 1; __atomic_load_n(&flag(other), __ATOMIC_ACQUIRE) < operation; spins++) {
        if (spins % 64 == 0) sched_yield();
        if (spins % (1 << 16) == 0)
          TORCH_CHECK(std::chrono::steady_clock::now() < deadline, "rank ", other, " stands at operation ", flag(other),
                      " and did not reach operation ", operation, ", where rank ", rank, " waits, in ",
                      patience.count(), " s");
      }
  }
};

template <typename T>
void contribute(const Ranks& ranks, int64_t operation, const T* from, int64_t count) {
  std::copy(from, from + count, reinterpret_cast<T*>(ranks.slot(operation, ranks.rank)));
  ranks.bytes(operation, ranks.rank) = count * sizeof(T);
  __atomic_store_n(&ranks.flag(ranks.rank), operation, __ATOMIC_RELEASE);
}

// In rank order and in fp32, so that every rank gets the same bits.
template <typename T>
void sum(const Ranks& ranks, int64_t operation, T* to, int64_t count) {
  for (int64_t other = 0; other < ranks.world_size; other++)
    TORCH_CHECK(ranks.bytes(operation, other) == ranks.bytes(operation, ranks.rank), "rank ", other, " brought ",
                ranks.bytes(operation, other), " bytes to operation ", operation, ", where rank ", ranks.rank,
                " brought ", ranks.bytes(operation, ranks.rank), ": it is out of step");
  for_lanes(count, [&](int64_t i, auto... lanes) {
    Floats total(0.f);
    for (int64_t other = 0; other < ranks.world_size; other++)
      total = total + load(reinterpret_cast<const T*>(ranks.slot(operation, other)) + i, lanes...);
    store(to + i, total, lanes...);
  });
}

}  // namespace

// x, contiguous, becomes the sum of all ranks'. Throws if a rank does not arrive in `patience` seconds, or its size
// differs.
void all_reduce(at::Tensor x, at::Tensor mapping, int64_t rank, int64_t world_size, int64_t slot_bytes,
                double patience) {
  auto* memory = mapping.mutable_data_ptr<uint8_t>();
  const Ranks ranks{reinterpret_cast<int64_t*>(memory),
                    memory + world_size * kLine * sizeof(int64_t),
                    rank,
                    world_size,
                    slot_bytes,
                    std::chrono::duration<double>(patience)};
  LLAMA2_DISPATCH(x.scalar_type(), "all_reduce", [&] {
    auto* values = x.mutable_data_ptr<scalar_t>();
    const int64_t step = slot_bytes / sizeof(scalar_t);
    for (int64_t begin = 0; begin < x.numel(); begin += step) {
      const int64_t count = std::min(step, x.numel() - begin), operation = ranks.flag(rank) + 1;
      ranks.wait(operation - 1);
      contribute(ranks, operation, values + begin, count);
      ranks.wait(operation);
      sum(ranks, operation, values + begin, count);
    }
  });
}

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def(
      "all_reduce(Tensor(a!) x, Tensor(b!) mapping, int rank, int world_size, int slot_bytes, float patience) -> ()");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("all_reduce", &all_reduce); }

}  // namespace llama2
