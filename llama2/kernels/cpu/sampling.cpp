// Owns the search for the weight at which a nucleus ends: what cuda/sampling.py does on a GPU, in the same steps.
//
// One thread computes a row, always in the same order: its bits do not depend on the other rows. Weights are compared
// by their bits, whose order as integers is that of the numbers from 0 to inf.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/bit_cast.h>
#include <torch/library.h>

#include <algorithm>

namespace llama2 {
namespace {

constexpr int32_t kInfinity = 0x7F800000, kNone = 0x7FFFFFFF;

// The number of weights above a given one, or their sum; the largest weight up to it, and the smallest above it.
struct Split {
  double beyond;
  int32_t below, above;
};

template <bool kSums>
Split split(const float* row, int64_t size, int32_t middle) {
  double beyond = 0;
  int32_t below = -1, above = kNone;
#pragma omp simd reduction(+ : beyond) reduction(max : below) reduction(min : above)
  for (int64_t i = 0; i < size; i++) {
    const auto bits = c10::bit_cast<int32_t>(row[i]);
    beyond += bits > middle ? (kSums ? row[i] : 1.f) : 0.f;
    below = std::max(below, bits > middle ? -1 : bits);
    above = std::min(above, bits > middle ? bits : kNone);
  }
  return {beyond, below, above};
}

// The smallest weight, from `first` on, with less than `limit` above it. Bisection in which both bounds move to weights
// of the row: 31 steps at most.
template <bool kSums>
int32_t least(const float* row, int64_t size, int32_t first, double limit) {
  int32_t last = kInfinity;
  while (first < last) {
    const auto parts = split<kSums>(row, size, first + (last - first) / 2);
    if (parts.beyond < limit)
      last = parts.below;
    else
      first = parts.above;
  }
  return last;
}

float floor_of(const float* row, int64_t size, int64_t top_k, double top_p) {
  int32_t found = 0;
  if (top_k < size) found = least<false>(row, size, found, top_k);
  if (top_p < 1) {
    const double total = split<true>(row, size, found - 1).beyond;
    // However small top_p is, the largest weight stays.
    found = least<true>(row, size, found, std::max(top_p * total, 1e-300));
  }
  return c10::bit_cast<float>(found);
}

}  // namespace

// See llama2/engine/nucleus.py.
at::Tensor nucleus_floor(const at::Tensor& weights, const at::Tensor& top_k, const at::Tensor& top_p) {
  TORCH_CHECK(weights.dim() == 2 && weights.is_contiguous(), "nucleus_floor takes contiguous rows");
  const int64_t rows = weights.size(0), size = weights.size(1);
  auto floors = at::empty({rows}, weights.options());
  const auto* values = weights.const_data_ptr<float>();
  const auto* k = top_k.const_data_ptr<int64_t>();
  const auto* p = top_p.const_data_ptr<double>();
  auto* result = floors.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) result[i] = floor_of(values + i * size, size, k[i], p[i]);
  });
  return floors;
}

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def("nucleus_floor(Tensor weights, Tensor top_k, Tensor top_p) -> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("nucleus_floor", &nucleus_floor); }

}  // namespace llama2
