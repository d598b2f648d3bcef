// Owns the product of a few bf16 rows with a weight that is not packed: the weight streams through once, in its
// original layout. For many rows oneDNN (F.linear) is faster.
#include "kernels.h"
#include "lanes.h"

#ifndef LLAMA2_PACKS_WEIGHTS
namespace llama2 {
namespace {

constexpr int kOutputs = 4;  // outputs and rows of a tile: its 16 sums stay in registers
constexpr int kRows = 4;

// y[m][n] = x[m] · w[n] for R rows and kOutputs outputs. The first tile over a weight prefetches the next one's,
// sequentially: read by outputs, it would look like kOutputs short streams to the processor.
template <int R>
inline void tile(const BFloat16* x, const BFloat16* w, BFloat16* y, int64_t inputs, int64_t stride, bool is_first) {
  using L = Lanes<BFloat16>;
  const BFloat16 *xs[R], *ws[kOutputs];
  for (int m = 0; m < R; m++) xs[m] = x + m * inputs;
  for (int n = 0; n < kOutputs; n++) ws[n] = w + n * inputs;
  L::Sum sums[R][kOutputs];
  for (auto& row : sums)
    for (auto& one : row) one = L::zero();
  if (is_first)
    dot(xs, ws, inputs, sums, [next = w + kOutputs * inputs]() mutable {
      __builtin_prefetch(next);
      next += L::kCount;
    });
  else
    dot(xs, ws, inputs, sums, [] {});
  for (int m = 0; m < R; m++) store4(y + m * stride, L::totals(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
}

inline void all_rows(const BFloat16* x, const BFloat16* w, BFloat16* y, int64_t rows, int64_t inputs, int64_t stride) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows) tile<kRows>(x + m * inputs, w, y + m * stride, inputs, stride, m == 0);
  x += m * inputs;
  y += m * stride;
  switch (rows - m) {
    case 3: tile<3>(x, w, y, inputs, stride, m == 0); break;
    case 2: tile<2>(x, w, y, inputs, stride, m == 0); break;
    case 1: tile<1>(x, w, y, inputs, stride, m == 0); break;
  }
}

// One output of all rows, where the number of outputs is not a multiple of kOutputs.
inline void one_output(const BFloat16* x, const BFloat16* w, BFloat16* y, int64_t rows, int64_t inputs,
                       int64_t stride) {
  using L = Lanes<BFloat16>;
  for (int64_t m = 0; m < rows; m++) {
    const BFloat16 *xs[1] = {x + m * inputs}, *ws[1] = {w};
    L::Sum sums[1][1] = {{L::zero()}};
    dot(xs, ws, inputs, sums, [] {});
    y[m * stride] = L::totals(sums[0][0], L::zero(), L::zero(), L::zero())[0];
  }
}

}  // namespace

void linear(const Team& team, const BFloat16* x, const BFloat16* w, BFloat16* y, int64_t rows, int64_t inputs,
            int64_t outputs, int64_t stride) {
  team.share(ceil_div(outputs, kOutputs), [&](int64_t begin, int64_t end) {
    int64_t n = begin * kOutputs;
    for (const int64_t last = std::min(end * kOutputs, outputs); n < last;) {
      if (n + kOutputs <= last) {
        all_rows(x, w + n * inputs, y + n, rows, inputs, stride);
        n += kOutputs;
      } else {
        one_output(x, w + n * inputs, y + n, rows, inputs, stride);
        n += 1;
      }
    }
  });
}

}  // namespace llama2
#endif
