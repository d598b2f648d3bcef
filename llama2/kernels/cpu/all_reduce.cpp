// Owns the sum over the ranks of one host, through memory that they share.
//
// The protocol is llama2/collectives.py's: a line per rank with its flag (operations contributed to) and the bytes in its
// slot of either buffer; then two buffers of one slot per rank. Operation n uses buffer n % 2.
#include <ATen/ATen.h>
#include <sched.h>
#include <torch/library.h>

#include <chrono>

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
  int64_t& bytes(int64_t operation, int64_t of) const { return header[of * kLine + 1 + operation % 2]; }

  // Has every rank contributed to `operation`? Waits for it; a rank that has no processor of its own lets others run.
  bool wait(int64_t operation) const {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    for (int64_t other = 0; other < world_size; other++)
      for (int64_t spins = 1; __atomic_load_n(header + other * kLine, __ATOMIC_ACQUIRE) < operation; spins++) {
        if (spins % 64 == 0) sched_yield();
        if (spins % (1 << 16) == 0 && std::chrono::steady_clock::now() > deadline) return false;
      }
    return true;
  }
};

template <typename T>
void sum(const Ranks& ranks, int64_t operation, T* to, int64_t count) {
  for_lanes(count, [&](int64_t i, auto... lanes) {
    Floats total(0.f);
    for (int64_t other = 0; other < ranks.world_size; other++)
      total = total + load(reinterpret_cast<const T*>(ranks.slot(operation, other)) + i, lanes...);
    store(to + i, total, lanes...);
  });
}

// x becomes the sum of all ranks', in rank order and in fp32, the same bits on each. `operation` is the number of the
// last one. Returns that of the last one now; or, when a rank does not come or brings another size, minus that of the
// operation at which this was seen.
int64_t all_reduce(at::Tensor x, at::Tensor mapping, int64_t rank, int64_t world_size, int64_t slot_bytes,
                   int64_t operation, double patience) {
  auto* memory = mapping.mutable_data_ptr<uint8_t>();
  const Ranks ranks{reinterpret_cast<int64_t*>(memory), memory + world_size * kLine * sizeof(int64_t), rank, world_size,
                    slot_bytes, std::chrono::duration<double>(patience)};
  LLAMA2_DISPATCH(x.scalar_type(), "all_reduce", [&] {
    auto* values = x.mutable_data_ptr<scalar_t>();
    const int64_t step = slot_bytes / sizeof(scalar_t);
    for (int64_t begin = 0; begin < x.numel() && operation >= 0; begin += step) {
      const int64_t count = std::min(step, x.numel() - begin);
      if (!ranks.wait(operation)) {
        operation = -operation;
        break;
      }
      operation++;
      std::copy(values + begin, values + begin + count, reinterpret_cast<scalar_t*>(ranks.slot(operation, rank)));
      ranks.bytes(operation, rank) = count * sizeof(scalar_t);
      __atomic_store_n(ranks.header + rank * kLine, operation, __ATOMIC_RELEASE);
      bool is_complete = ranks.wait(operation);
      for (int64_t other = 0; other < world_size; other++)
        is_complete = is_complete && ranks.bytes(operation, other) == ranks.bytes(operation, rank);
      if (is_complete)
        sum(ranks, operation, values + begin, count);
      else
        operation = -operation;
    }
  });
  return operation;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def(
      "all_reduce(Tensor(a!) x, Tensor(b!) mapping, int rank, int world_size, int slot_bytes, int operation, "
      "float patience) -> int");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("all_reduce", &all_reduce); }

}  // namespace llama2
