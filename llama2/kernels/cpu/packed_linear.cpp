// Owns the product of bf16 rows with a packed weight: the layout, and the order of the work. Memory is read
// sequentially, which is fastest on every processor, and no sum crosses the lanes of a register.
//
// A weight (outputs, inputs) is cut into blocks of kOutputs outputs; the last may be narrower. A block takes the place
// of its outputs, ordered by pairs of inputs: two inputs of its first output, the same two of its second, and so on.
// The last of an odd number of inputs is stored alone. Every sum takes the inputs in order, in one register, so that a
// row's bits are the same in any batch.
#include "kernels.h"
#include "lanes.h"

#ifdef LLAMA2_PACKS_WEIGHTS
#include <cstring>
#include <utility>
#include <vector>

namespace llama2 {
namespace {

constexpr int kLanes = 16, kOutputs = 2 * kLanes;
constexpr int kRows = 12;  // of a tile: its 24 sums fit into registers, with two for weights and one for inputs
constexpr int64_t kAhead = 4096 / sizeof(BFloat16);  // a page: hardware prefetchers stop at its end

constexpr int64_t kFetching = 4;  // up to this many tiles, their sums take no longer than the block's way from memory

struct Block {
  const BFloat16* weights;
  int64_t inputs;
  int outputs;
};

// What a tile fetches for the tiles after it: `pace` numbers for each pair of inputs.
struct Fetch {
  const BFloat16* weights;
  int64_t pace;
};

// A mask of the first `count` lanes.
__mmask16 first(int64_t count) { return static_cast<__mmask16>((1 << count) - 1); }

// sums[m] += the products of one pair of inputs of R rows, for all outputs; `at` finds the pair in a row.
template <int R, typename At>
C10_ALWAYS_INLINE void add(__m512 (&sums)[R][2], __m512bh low, __m512bh high, const BFloat16* x, int64_t inputs,
                           const At& at) {
#pragma GCC unroll kRows
  for (int m = 0; m < R; m++) {
    const auto pair = (__m512bh)_mm512_set1_epi32(at(x + m * inputs));
    sums[m][0] = _mm512_dpbf16_ps(sums[m][0], pair, low);
    sums[m][1] = _mm512_dpbf16_ps(sums[m][1], pair, high);
  }
}

// y[m] = block · x[m] for R rows; stride is the distance between rows of y. Without the pragmas the compiler does not
// unroll such long loops, and the sums go through memory.
template <bool Fetches, int R>
void tile(const Block& block, Fetch fetch, const BFloat16* x, BFloat16* y, int64_t stride) {
  const auto low = first(std::min(block.outputs, kLanes)), high = first(std::max(block.outputs - kLanes, 0));
  const int64_t inputs = block.inputs;
  const auto* weights = block.weights;
  __m512 sums[R][2];
#pragma GCC unroll kRows
  for (int m = 0; m < R; m++) sums[m][0] = sums[m][1] = _mm512_setzero_ps();
  for (int64_t i = 0; i + 2 <= inputs; i += 2, weights += 2 * block.outputs) {
    __builtin_prefetch(weights + kAhead);
    __builtin_prefetch(weights + kAhead + kOutputs);
    if constexpr (Fetches) {
      __builtin_prefetch(fetch.weights, 0, 2);
      fetch.weights += fetch.pace;
    }
    add(sums, (__m512bh)_mm512_maskz_loadu_epi32(low, weights),
        (__m512bh)_mm512_maskz_loadu_epi32(high, weights + kOutputs), x, inputs, [i](const BFloat16* row) {
          int pair;
          std::memcpy(&pair, row + i, sizeof pair);
          return pair;
        });
  }
  if (inputs % 2) {
    auto widen = [](__mmask16 mask, const BFloat16* from) {
      return (__m512bh)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
    };
    add(sums, widen(low, weights), widen(high, weights + kLanes), x, inputs,
        [inputs](const BFloat16* row) { return row[inputs - 1].x; });
  }
#pragma GCC unroll kRows
  for (int m = 0; m < R; m++) {
    _mm256_mask_storeu_epi16(y + m * stride, low, (__m256i)_mm512_cvtneps_pbh(sums[m][0]));
    _mm256_mask_storeu_epi16(y + m * stride + kLanes, high, (__m256i)_mm512_cvtneps_pbh(sums[m][1]));
  }
}

// Rows become columns. A value's index is its row's four bits and its lane's four: a round rotates the eight by one.
void transpose(__m512i (&square)[kLanes]) {
  const auto low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const auto high = _mm512_add_epi32(low, _mm512_set1_epi32(kLanes / 2));
#pragma GCC unroll 4
  for (int round = 0; round < 4; round++) {
    __m512i turned[kLanes];
#pragma GCC unroll kLanes
    for (int row = 0; row < kLanes / 2; row++) {
      turned[2 * row] = _mm512_permutex2var_epi32(square[row], low, square[row + kLanes / 2]);
      turned[2 * row + 1] = _mm512_permutex2var_epi32(square[row], high, square[row + kLanes / 2]);
    }
    std::copy(turned, turned + kLanes, square);
  }
}

template <bool Fetches, int... I>
constexpr std::array<decltype(&tile<Fetches, 1>), sizeof...(I)> tiles_up_to(std::integer_sequence<int, I...>) {
  return {tile<Fetches, I + 1>...};
}

}  // namespace

void linear(const Team& team, const BFloat16* x, const BFloat16* w, BFloat16* y, int64_t rows, int64_t inputs,
            int64_t outputs, int64_t stride) {
  constexpr auto sizes = std::make_integer_sequence<int, kRows>();
  constexpr auto plain = tiles_up_to<false>(sizes), fetching = tiles_up_to<true>(sizes);
  // Tiles of equal size: one of few rows waits for its own sums.
  const int64_t count = ceil_div(rows, kRows), pace = ceil_div(2 * kOutputs, std::max<int64_t>(count, 1));
  // The first tile of a block waits for memory and the others only compute, unless each fetches a part of the next
  // block.
  const auto& tiles = count > 1 && count <= kFetching ? fetching : plain;
  team.share(ceil_div(outputs, kOutputs) * count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / count * kOutputs, m = rows * (i % count) / count, next = rows * (i % count + 1) / count;
      const Block block{w + n * inputs, inputs, static_cast<int>(std::min<int64_t>(kOutputs, outputs - n))};
      const auto* part = block.weights + (i + count < end ? kOutputs * inputs + i % count * (inputs / 2) * pace : 0);
      tiles[next - m - 1](block, {part, pace}, x + m * inputs, y + m * stride + n, stride);
    }
  });
}

void pack(BFloat16* w, int64_t outputs, int64_t inputs) {
  const int64_t pairs = inputs / 2;
  std::vector<BFloat16> packed(kOutputs * inputs);
  for (int64_t n = 0; n < outputs; n += kOutputs) {
    auto* block = w + n * inputs;
    const int64_t width = std::min<int64_t>(kOutputs, outputs - n);
    const auto* next = block + width * inputs;  // hardware prefetchers do not follow rows read in turns
    for (int64_t begin = 0; begin < pairs; begin += kLanes)
      for (int64_t o = 0; o < width; o += kLanes) {
        const int64_t wide = std::min<int64_t>(kLanes, width - o), high = std::min<int64_t>(kLanes, pairs - begin);
        __m512i square[kLanes];
#pragma GCC unroll kLanes
        for (int row = 0; row < kLanes; row++) {
          const auto* from = block + (o + row) * inputs + 2 * begin;
          square[row] = _mm512_maskz_loadu_epi32(row < wide ? first(high) : 0, from);
          __builtin_prefetch(next += 2 * kLanes);
        }
        transpose(square);
#pragma GCC unroll kLanes
        for (int row = 0; row < kLanes; row++)
          if (row < high) _mm512_mask_storeu_epi32(&packed[2 * ((begin + row) * width + o)], first(wide), square[row]);
      }
    if (inputs % 2)
      for (int64_t o = 0; o < width; o++) packed[2 * pairs * width + o] = block[o * inputs + inputs - 1];
    std::copy_n(packed.begin(), width * inputs, block);
  }
}

}  // namespace llama2
#endif
