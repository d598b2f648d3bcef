// Owns the product of bf16 rows with a quantized weight: the order of the work. Codes are decoded in registers for a
// few rows, else into the nearest cache for all of them. The sum over a step, some inputs that share their scale, is
// multiplied by it in fp32. Every sum takes the inputs in order, so that a row's bits are the same in any batch.
#include <torch/library.h>

#include "bf16_codes.h"
#include "int8_codes.h"
#include "packing.h"
#include "quantized_weight.h"

namespace llama2 {
namespace {

constexpr int kChunk = 128;     // inputs that are decoded at a time: 8 KB as bf16
constexpr int kManyRows = 128;  // that share what is decoded
#ifdef __AVX512BF16__
constexpr int kRows = 8;  // of a tile: their 16 sums stay in registers
#else
constexpr int kRows = 2;
#endif

// Totals are: they and the sums of a step do not fit into registers together.
C10_ALWAYS_INLINE void keep_in_memory() { asm volatile("" ::: "memory"); }

// Rows of x as the arithmetic A takes them, with what their steps are, and the place of their results.
template <typename A>
struct Rows {
  const typename A::X* x;
  const StepOfRow* steps;
  BFloat16* y;
  int64_t inputs, all_steps, stride;

  Rows from(int64_t row, int64_t step, int64_t input) const {
    return {x + row * inputs + input, steps + row * all_steps + step, y + row * stride, inputs, all_steps, stride};
  }
};

// total += the sums of a step, times its factors.
template <typename A, bool HasMins>
C10_ALWAYS_INLINE void add_step(Outputs& total, const typename A::Sums& sums, const Factors& factors,
                                const StepOfRow& step) {
  total = A::fold(total, sums, factors.scales, step);
  if constexpr (HasMins) total = multiply_add(Outputs::same(step.sum), factors.mins, total);
}

// The results of R rows for a block of outputs. Without the pragmas the compiler does not unroll such loops, and the
// sums go through memory.
template <typename A, Codes C, bool HasMins, int R>
void few_rows(const QuantizedWeight& w, int64_t output, const Width& width, const Rows<A>& rows) {
  using Decoder = typename A::template Decoder<C>;
  const Decoder decoder(w.table.data());
  const auto* codes = w.codes_of(output);
  const auto unit_bytes = width.width * Decoder::kInputs * (C == Codes::kInt8 ? 2 : 1) / 2;
  const int64_t inputs = w.inputs, all_steps = w.all_steps;
  const int step = w.step;
  FactorCursor factors(w, output, width);
  const auto* x = rows.x;
  Outputs totals[R];
  for (int64_t s = 0; s < all_steps; s++, x += step) {
    if constexpr (R > kRows / 2) keep_in_memory();
    Shifts shifts;
    if constexpr (C == Codes::kZeros4) shifts = factors.next_shifts(Decoder::kPlaces);
    typename A::Sums sums[R];
#pragma GCC unroll kRows
    for (int m = 0; m < R; m++) sums[m] = A::begin(rows.steps[m * all_steps + s]);
    for (int i = 0; i < step; i += Decoder::kInputs, codes += unit_bytes)
      decoder.decode(codes, width, shifts, [&](int term, const typename A::Weights& weights) {
#pragma GCC unroll kRows
        for (int m = 0; m < R; m++) A::add(sums[m], weights, x + m * inputs + i + term);
      });
    const auto factor = factors.template next<HasMins>();
#pragma GCC unroll kRows
    for (int m = 0; m < R; m++) add_step<A, HasMins>(totals[m], sums[m], factor, rows.steps[m * all_steps + s]);
  }
  for (int m = 0; m < R; m++) totals[m].store(rows.y + m * rows.stride, width);
}

template <typename A, Codes C, bool HasMins, int... I>
constexpr std::array<decltype(&few_rows<A, C, HasMins, 1>), sizeof...(I)> few_rows_up_to(
    std::integer_sequence<int, I...>) {
  return {few_rows<A, C, HasMins, I + 1>...};
}

// A chunk of a block of outputs.
template <typename A>
struct Chunk {
  typename A::Weights weights[kChunk / A::kTerms];
  Factors factors[kChunk / kSmallestStep];
};

template <typename A, bool HasMins, int R>
void tile(const Chunk<A>& chunk, int count, int step, const Rows<A>& rows, Outputs* totals) {
  const int64_t inputs = rows.inputs, all_steps = rows.all_steps;
  const auto* weights = chunk.weights;
  const auto* x = rows.x;
  for (int s = 0; s < count; s++, x += step) {
    if constexpr (R > kRows / 2) keep_in_memory();
    typename A::Sums sums[R];
#pragma GCC unroll kRows
    for (int m = 0; m < R; m++) sums[m] = A::begin(rows.steps[m * all_steps + s]);
    for (int i = 0; i < step; i += A::kTerms, weights++)
#pragma GCC unroll kRows
      for (int m = 0; m < R; m++) A::add(sums[m], *weights, x + m * inputs + i);
#pragma GCC unroll kRows
    for (int m = 0; m < R; m++)
      add_step<A, HasMins>(totals[m], sums[m], chunk.factors[s], rows.steps[m * all_steps + s]);
  }
}

template <typename A, bool HasMins, int... I>
constexpr std::array<decltype(&tile<A, HasMins, 1>), sizeof...(I)> tiles_up_to(std::integer_sequence<int, I...>) {
  return {tile<A, HasMins, I + 1>...};
}

template <typename A, Codes C, bool HasMins>
void many_rows(const QuantizedWeight& w, int64_t output, const Width& width, const Rows<A>& rows, int64_t count) {
  using Decoder = typename A::template Decoder<C>;
  constexpr auto tiles = tiles_up_to<A, HasMins>(std::make_integer_sequence<int, kRows>());
  const Decoder decoder(w.table.data());
  const auto* codes = w.codes_of(output);
  const auto unit_bytes = width.width * Decoder::kInputs * (C == Codes::kInt8 ? 2 : 1) / 2;
  const int step = w.step;
  FactorCursor factors(w, output, width);
  thread_local Chunk<A> chunk;
  Outputs totals[kManyRows];
  const int64_t num_tiles = ceil_div(count, kRows);
  for (int64_t first = 0; first < w.inputs; first += kChunk) {
    const int num_steps = static_cast<int>(std::min<int64_t>(kChunk, w.inputs - first)) / step;
    auto* weights = chunk.weights;
    for (int s = 0; s < num_steps; s++, weights += step / A::kTerms) {
      Shifts shifts;
      if constexpr (C == Codes::kZeros4) shifts = factors.next_shifts(Decoder::kPlaces);
      for (int i = 0; i < step; i += Decoder::kInputs, codes += unit_bytes)
        decoder.decode(codes, width, shifts, [&](int term, const typename A::Weights& decoded) {
          weights[(i + term) / A::kTerms] = decoded;
        });
      chunk.factors[s] = factors.template next<HasMins>();
    }
    for (int64_t t = 0; t < num_tiles; t++) {
      const int64_t row = count * t / num_tiles, size = count * (t + 1) / num_tiles - row;
      tiles[size - 1](chunk, num_steps, step, rows.from(row, first / step, first), totals + row);
    }
  }
  for (int64_t row = 0; row < count; row++) totals[row].store(rows.y + row * rows.stride, width);
}

template <Codes C>
Rows<Bf16Rows> prepare_rows(const QuantizedWeight& w, const BFloat16* x, int64_t count, Bf16Rows) {
  thread_local std::vector<StepOfRow> steps;
  steps.resize(std::max<size_t>(steps.size(), count * w.all_steps));
  if (w.has_mins)
    for (int64_t s = 0; s < count * w.all_steps; s++) steps[s].sum = Bf16Rows::sum(x + s * w.step, w.step);
  return {x, steps.data(), nullptr, w.inputs, w.all_steps, 0};
}

template <Codes C>
Rows<Int8Rows> prepare_rows(const QuantizedWeight& w, const BFloat16* x, int64_t count, Int8Rows) {
  thread_local std::vector<StepOfRow> steps;
  thread_local std::vector<int8_t> rounded;
  steps.resize(std::max<size_t>(steps.size(), count * w.all_steps));
  rounded.resize(std::max<size_t>(rounded.size(), count * w.inputs));
  const int offset = Int8Rows::offset(C, w.table.data());
  for (int64_t s = 0; s < count * w.all_steps; s++) {
    steps[s] = Int8Rows::round<C>(offset, x + s * w.step, w.step, rounded.data() + s * w.step);
    if (w.has_mins) steps[s].sum = Bf16Rows::sum(x + s * w.step, w.step);
  }
  return {rounded.data(), steps.data(), nullptr, w.inputs, w.all_steps, 0};
}

template <typename A, Codes C, bool HasMins>
void multiply(const QuantizedWeight& w, const Team& team, const BFloat16* x, BFloat16* y, int64_t rows,
              int64_t stride) {
  constexpr auto few = few_rows_up_to<A, C, HasMins>(std::make_integer_sequence<int, kRows>());
  const int64_t blocks = ceil_div(w.outputs, kBlock), shares = ceil_div(rows, kManyRows);
  // One share of the rows after the other: a thread prepares as few of them as can be.
  team.share(blocks * shares, [&](int64_t begin, int64_t end) {
    Rows<A> prepared;
    int64_t latest = -1;
    for (int64_t i = begin; i < end; i++) {
      const int64_t share = i / blocks, output = i % blocks * kBlock;
      const int64_t row = rows * share / shares, count = rows * (share + 1) / shares - row;
      if (share != latest) prepared = prepare_rows<C>(w, x + row * w.inputs, count, A());
      latest = share;
      prepared.y = y + row * stride + output;
      prepared.stride = stride;
      const Width width{static_cast<int>(std::min<int64_t>(kBlock, w.outputs - output))};
      if (count <= kRows)
        few[count - 1](w, output, width, prepared);
      else
        many_rows<A, C, HasMins>(w, output, width, prepared, count);
    }
  });
}

using Multiply = decltype(&multiply<Bf16Rows, Codes::kInt8, false>);

template <typename A>
Multiply choose(const QuantizedWeight& w) {
  switch (w.kind) {
    case Codes::kTable4: return w.has_mins ? multiply<A, Codes::kTable4, true> : multiply<A, Codes::kTable4, false>;
    case Codes::kZeros4: return multiply<A, Codes::kZeros4, false>;
    default: return w.has_mins ? multiply<A, Codes::kInt8, true> : multiply<A, Codes::kInt8, false>;
  }
}

struct QuantizedLinear final : Linear {
  const QuantizedWeight weight;
  const Multiply multiply;

  QuantizedLinear(QuantizedWeight weight, bool int8_rows)
      : Linear(weight.inputs, weight.outputs, std::numeric_limits<int64_t>::max()),
        weight(std::move(weight)),
        multiply(int8_rows ? choose<Int8Rows>(this->weight) : choose<Bf16Rows>(this->weight)) {}

  void run(const Team& team, const BFloat16* x, BFloat16* y, int64_t rows, int64_t stride) const override {
    multiply(weight, team, x, y, rows, stride);
  }

  at::Tensor many_rows(const at::Tensor&) const override { TORCH_CHECK(false, "all rows are few"); }
};

Codes kind_of(const at::Tensor& codes, const WeightPart& zeros) {
  return codes.scalar_type() == at::kChar ? Codes::kInt8 : zeros ? Codes::kZeros4 : Codes::kTable4;
}

// All parts are packed in place: nothing but the product may read them afterwards. With `int8_rows`, rows are rounded
// to int8, where the codes stand for whole numbers.
c10::intrusive_ptr<Linear> prepare_quantized(const at::Tensor& codes, const at::Tensor& scales, const WeightPart& zeros,
                                             const WeightPart& mins, const WeightPart& super_scales,
                                             const WeightPart& super_mins, const std::vector<double>& table,
                                             bool int8_rows) {
  const auto kind = kind_of(codes, zeros);
  const int bits = kind == Codes::kInt8 ? 8 : 4;
  TORCH_CHECK(codes.dim() == 2 && (bits == 8 || codes.scalar_type() == at::kByte), "linear takes codes of two axes");
  TORCH_CHECK(table.size() == (bits == 4 ? 16u : 0u), "linear: codes of 4 bits have a table of 16 values");
  const int64_t inputs = codes.size(1) * 8 / bits;
  std::vector<WeightPart> parts{scales, zeros, mins, super_scales, super_mins};
  int step = kStep;
  auto check = [&](const at::Tensor& part) {
    TORCH_CHECK(part.dim() == 2 && part.size(0) == codes.size(0) && part.is_contiguous(),
                "linear takes contiguous parts with one row for each output");
  };
  check(codes);
  for (const WeightPart& part : parts) {
    if (!part) continue;
    check(*part);
    const auto type = part->scalar_type();
    TORCH_CHECK(type == at::kHalf || type == at::kFloat || type == at::kByte,
                "linear takes scales of fp16, fp32 or uint8");
    TORCH_CHECK(part->size(1) > 0 && inputs % (part->size(1) * kSmallestStep) == 0,
                "linear takes groups of a multiple of ", kSmallestStep, " inputs");
    while (inputs / part->size(1) % step) step /= 2;
  }
  if (kind == Codes::kZeros4)
    TORCH_CHECK(
        !mins && zeros->scalar_type() == at::kByte && (zeros->numel() == 0 || zeros->max().item<int>() <= kMaxZero),
        "linear: zeros of codes of 4 bits are 0 to ", kMaxZero, " of uint8, without minima");
  pack_codes(codes, bits);
  for (const WeightPart& part : parts)
    if (part) pack_scales(*part);
  std::vector<float> values(table.begin(), table.end());
  int8_rows = int8_rows && (kind != Codes::kTable4 || Int8Rows::takes(values.data()));
  return c10::make_intrusive<QuantizedLinear>(
      QuantizedWeight(inputs, step, kind, codes, std::move(parts), std::move(values)), int8_rows);
}

}  // namespace

void define_quantized_linear(torch::Library& library) { library.def("prepare_quantized", &prepare_quantized); }

}  // namespace llama2
