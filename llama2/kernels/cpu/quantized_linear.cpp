// Owns the product of bf16 rows with a quantized weight. Codes become bf16 numbers, exactly but for the tables of some
// formats, in registers for a few rows, else in the nearest cache for all of them. The sum over a step, at most kStep
// inputs that share their scale, is multiplied by it in fp32. Every sum takes the inputs in order, so that a row's bits
// are the same in any batch.
#include <torch/library.h>

#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "codes.h"
#include "kernels.h"
#include "packing.h"

namespace llama2 {
namespace {

using at::BFloat16;

constexpr int kStep = 32, kSmallestStep = 16;
constexpr int kChunk = 128;    // inputs that are decoded at a time: 8 KB as bf16
constexpr int kManyRows = 96;  // that share what is decoded
#ifdef __AVX512BF16__
constexpr int kRows = 8;  // of a tile: their 16 sums stay in registers
#else
constexpr int kRows = 2;
#endif

using Part = std::optional<at::Tensor>;

// A packed part (outputs, columns), or none.
struct Column {
  const char* data = nullptr;
  at::ScalarType type{};
  int64_t columns = 0, size = 0;
  int steps = 0;  // for which a column is

  Column(const Part& part, int64_t all_steps) {
    if (!part) return;
    data = static_cast<const char*>(part->const_data_ptr());
    type = part->scalar_type();
    columns = part->size(1);
    size = part->element_size();
    steps = static_cast<int>(all_steps / columns);
  }

  explicit operator bool() const { return data != nullptr; }
};

// The numbers of a block of outputs in one part, step by step.
class Cursor {
 public:
  Cursor(const Column& column, int64_t output, const Width& width)
      : at_(column.data + output * column.columns * column.size),
        type_(column.type),
        jump_(width.width * column.size),
        steps_(column.steps),
        width_(width) {}

  Outputs next() {
    const auto* from = at_;
    if (++step_ == steps_) {
      step_ = 0;
      at_ += jump_;
    }
    __builtin_prefetch(from + kPage / 4);
    __builtin_prefetch(from + kPage / 4 + 64);
    switch (type_) {
      case at::kByte: return Outputs::load(reinterpret_cast<const uint8_t*>(from), width_);
      case at::kHalf: return Outputs::load(reinterpret_cast<const at::Half*>(from), width_);
      default: return Outputs::load(reinterpret_cast<const float*>(from), width_);
    }
  }

 private:
  const char* at_;
  at::ScalarType type_;
  int64_t jump_;
  int steps_, step_ = 0;
  const Width width_;
};

struct Factors {
  Outputs scales, mins;
};

// A value is scale · table[code] + min, in 8 bits scale · code + min. Scales and minima are multiplied by their super-
// scales, where there are any; a minimum may be given as the code that stands for 0.
struct QuantizedLinear final : Linear {
  const std::vector<Part> parts;  // own what the others point to
  const at::Tensor codes;
  const int bits, step;
  const int64_t all_steps;
  const Column scales, zeros, mins, super_scales, super_mins;
  const bool has_mins;
  const std::vector<float> table;

  QuantizedLinear(int64_t inputs, int step, int bits, at::Tensor codes, std::vector<Part> parts,
                  std::vector<float> table)
      : Linear(inputs, codes.size(0), std::numeric_limits<int64_t>::max()),
        parts(std::move(parts)),
        codes(std::move(codes)),
        bits(bits),
        step(step),
        all_steps(inputs / step),
        scales(this->parts[0], all_steps),
        zeros(this->parts[1], all_steps),
        mins(this->parts[2], all_steps),
        super_scales(this->parts[3], all_steps),
        super_mins(this->parts[4], all_steps),
        has_mins(zeros || mins),
        table(std::move(table)) {}

  void run(const Team& team, const BFloat16* x, BFloat16* y, int64_t rows, int64_t stride) const override;

  at::Tensor many_rows(const at::Tensor&) const override { TORCH_CHECK(false, "all rows are few"); }
};

// What the steps of a block of outputs are multiplied by, one step after the other.
class FactorCursor {
 public:
  FactorCursor(const QuantizedLinear& w, int64_t output, const Width& width)
      : w_(w),
        scales_(w.scales, output, width),
        zeros_(w.zeros, output, width),
        mins_(w.mins, output, width),
        super_scales_(w.super_scales, output, width),
        super_mins_(w.super_mins, output, width) {}

  template <bool HasMins>
  Factors next() {
    Factors result{scales_.next(), {}};
    if (w_.super_scales) result.scales = result.scales * super_scales_.next();
    if constexpr (HasMins) {
      if (w_.zeros) {
        result.mins = zeros_.next() * (result.scales * Outputs::same(-1));
      } else {
        result.mins = mins_.next();
        if (w_.super_mins) result.mins = result.mins * super_mins_.next();
      }
    }
    return result;
  }

 private:
  const QuantizedLinear& w_;
  Cursor scales_, zeros_, mins_, super_scales_, super_mins_;
};

// Totals are: they and the sums of a step do not fit into registers together.
C10_ALWAYS_INLINE void keep_in_memory() { asm volatile("" ::: "memory"); }

// Rows of x, with the sums of their steps where there are minima, and the place of their results.
struct Rows {
  const BFloat16* x;
  const float* sums;
  BFloat16* y;
  int64_t stride;

  Rows from(const QuantizedLinear& w, int64_t row) const {
    return {x + row * w.inputs, sums + row * w.all_steps, y + row * stride, stride};
  }
};

// total += the sums of a step, times its factors.
template <bool HasMins>
C10_ALWAYS_INLINE void add_step(Outputs& total, const Outputs& sum, const Factors& factors, const float* x_sum) {
  total = multiply_add(sum, factors.scales, total);
  if constexpr (HasMins) total = multiply_add(Outputs::same(*x_sum), factors.mins, total);
}

// The results of R rows for a block of outputs. Without the pragmas the compiler does not unroll such loops, and the
// sums go through memory.
template <int Bits, bool HasMins, int R>
void few_rows(const QuantizedLinear& w, int64_t output, const Width& width, const Rows& rows) {
  const Decoder<Bits> decoder(w.table.data());
  const auto* codes = static_cast<const char*>(w.codes.const_data_ptr()) + output * w.inputs * Bits / 8;
  const auto unit_bytes = width.width * decoder.kInputs * Bits / 8;
  const int64_t inputs = w.inputs, all_steps = w.all_steps;
  const int step = w.step;
  FactorCursor factors(w, output, width);
  const auto* x = rows.x;
  Outputs totals[R];
  for (int64_t s = 0; s < all_steps; s++, x += step) {
    if constexpr (R > kRows / 2) keep_in_memory();
    Outputs sums[R];
    for (int i = 0; i < step; i += decoder.kInputs, codes += unit_bytes)
      decoder.decode(codes, width, [&](int pair, const Weights& weights) {
#pragma GCC unroll kRows
        for (int m = 0; m < R; m++) add_products(sums[m], weights, x + m * inputs + i + pair);
      });
    const auto factor = factors.template next<HasMins>();
#pragma GCC unroll kRows
    for (int m = 0; m < R; m++) add_step<HasMins>(totals[m], sums[m], factor, rows.sums + m * all_steps + s);
  }
  for (int m = 0; m < R; m++) totals[m].store(rows.y + m * rows.stride, width);
}

template <int Bits, bool HasMins, int... I>
constexpr std::array<decltype(&few_rows<Bits, HasMins, 1>), sizeof...(I)> few_rows_up_to(
    std::integer_sequence<int, I...>) {
  return {few_rows<Bits, HasMins, I + 1>...};
}

// A chunk of a block of outputs.
struct Chunk {
  Weights weights[kChunk / 2];
  Factors factors[kChunk / kSmallestStep];
};

template <bool HasMins, int R>
void tile(const Chunk& chunk, const QuantizedLinear& w, int count, const Rows& rows, Outputs* totals) {
  const int64_t inputs = w.inputs, all_steps = w.all_steps;
  const int step = w.step;
  const auto* weights = chunk.weights;
  const auto* x = rows.x;
  for (int s = 0; s < count; s++, x += step) {
    if constexpr (R > kRows / 2) keep_in_memory();
    Outputs sums[R];
    for (int i = 0; i < step; i += 2, weights++)
#pragma GCC unroll kRows
      for (int m = 0; m < R; m++) add_products(sums[m], *weights, x + m * inputs + i);
#pragma GCC unroll kRows
    for (int m = 0; m < R; m++) add_step<HasMins>(totals[m], sums[m], chunk.factors[s], rows.sums + m * all_steps + s);
  }
}

template <bool HasMins, int... I>
constexpr std::array<decltype(&tile<HasMins, 1>), sizeof...(I)> tiles_up_to(std::integer_sequence<int, I...>) {
  return {tile<HasMins, I + 1>...};
}

template <int Bits, bool HasMins>
void many_rows(const QuantizedLinear& w, int64_t output, const Width& width, const Rows& rows, int64_t count) {
  constexpr auto tiles = tiles_up_to<HasMins>(std::make_integer_sequence<int, kRows>());
  const Decoder<Bits> decoder(w.table.data());
  const auto* codes = static_cast<const char*>(w.codes.const_data_ptr()) + output * w.inputs * Bits / 8;
  const auto unit_bytes = width.width * decoder.kInputs * Bits / 8;
  FactorCursor factors(w, output, width);
  thread_local Chunk chunk;
  Outputs totals[kManyRows];
  const int64_t num_tiles = ceil_div(count, kRows);
  for (int64_t first = 0; first < w.inputs; first += kChunk) {
    const int inputs = static_cast<int>(std::min<int64_t>(kChunk, w.inputs - first));
    for (int i = 0; i < inputs; i += decoder.kInputs, codes += unit_bytes)
      decoder.decode(codes, width, [&](int pair, const Weights& weights) { chunk.weights[(i + pair) / 2] = weights; });
    for (int s = 0; s < inputs / w.step; s++) chunk.factors[s] = factors.template next<HasMins>();
    for (int64_t t = 0; t < num_tiles; t++) {
      const int64_t row = count * t / num_tiles, size = count * (t + 1) / num_tiles - row;
      auto part = rows.from(w, row);
      part.x += first;
      part.sums += first / w.step;
      tiles[size - 1](chunk, w, inputs / w.step, part, totals + row);
    }
  }
  for (int64_t row = 0; row < count; row++) totals[row].store(rows.y + row * rows.stride, width);
}

template <int Bits, bool HasMins>
void multiply(const QuantizedLinear& w, int64_t output, const Width& width, const Rows& rows, int64_t count) {
  constexpr auto few = few_rows_up_to<Bits, HasMins>(std::make_integer_sequence<int, kRows>());
  if (count <= kRows)
    few[count - 1](w, output, width, rows);
  else
    many_rows<Bits, HasMins>(w, output, width, rows, count);
}

void QuantizedLinear::run(const Team& team, const BFloat16* x, BFloat16* y, int64_t rows, int64_t stride) const {
  const auto how = bits == 4  ? has_mins ? multiply<4, true> : multiply<4, false>
                   : has_mins ? multiply<8, true>
                              : multiply<8, false>;
  const int64_t blocks = ceil_div(outputs, kBlock), shares = ceil_div(rows, kManyRows);
  thread_local std::vector<float> sums;
  int64_t summed = -1;  // the share of the rows that `sums` are of
  // One share after the other: a thread sums up as few of them as can be.
  team.share(blocks * shares, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t share = i / blocks, output = i % blocks * kBlock;
      const int64_t row = rows * share / shares, count = rows * (share + 1) / shares - row;
      if (has_mins && share != summed) {
        sums.resize(count * all_steps);
        for (int64_t s = 0; s < count * all_steps; s++) sums[s] = sum_of(x + row * inputs + s * step, step);
        summed = share;
      }
      const Width width{static_cast<int>(std::min<int64_t>(kBlock, outputs - output))};
      how(*this, output, width, {x + row * inputs, sums.data(), y + row * stride + output, stride}, count);
    }
  });
}

// All parts are packed in place: nothing but the product may read them afterwards.
c10::intrusive_ptr<Linear> prepare_quantized(const at::Tensor& codes, const at::Tensor& scales, const Part& zeros,
                                             const Part& mins, const Part& super_scales, const Part& super_mins,
                                             const std::vector<double>& table) {
  const int bits = codes.scalar_type() == at::kChar ? 8 : 4;
  TORCH_CHECK(codes.dim() == 2 && (bits == 8 || codes.scalar_type() == at::kByte), "linear takes codes of two axes");
  TORCH_CHECK(table.size() == (bits == 4 ? 16u : 0u), "linear: codes of 4 bits have a table of 16 values");
  const int64_t inputs = codes.size(1) * 8 / bits;
  const std::vector<Part> parts{scales, zeros, mins, super_scales, super_mins};
  int step = kStep;
  auto check = [&](const at::Tensor& part) {
    TORCH_CHECK(part.dim() == 2 && part.size(0) == codes.size(0) && part.is_contiguous(),
                "linear takes contiguous parts with one row for each output");
  };
  check(codes);
  for (const Part& part : parts) {
    if (!part) continue;
    check(*part);
    const auto type = part->scalar_type();
    TORCH_CHECK(type == at::kHalf || type == at::kFloat || type == at::kByte,
                "linear takes scales of fp16, fp32 or uint8");
    TORCH_CHECK(part->size(1) > 0 && inputs % (part->size(1) * kSmallestStep) == 0,
                "linear takes groups of a multiple of ", kSmallestStep, " inputs");
    if (inputs / part->size(1) % kStep) step = kSmallestStep;
  }
  pack_codes(codes, bits);
  for (const Part& part : parts)
    if (part) pack_scales(*part);
  return c10::make_intrusive<QuantizedLinear>(inputs, step, bits, codes, parts,
                                              std::vector<float>(table.begin(), table.end()));
}

}  // namespace

void define_quantized_linear(torch::Library& library) { library.def("prepare_quantized", &prepare_quantized); }

}  // namespace llama2
