// Owns the arithmetic of products with rows of bf16, the reference: codes become bf16 numbers, exactly but for tables
// of other numbers, and dot products are summed in fp32.
#pragma once

#include "codes.h"

namespace llama2 {

struct Bf16Rows {
  using X = BFloat16;
  using Sums = Outputs;
  static constexpr int kTerms = 2;  // inputs that are added at a time

  static Sums begin(const StepOfRow&) { return {}; }

  // total + the sums of a step, scaled.
  static C10_ALWAYS_INLINE Outputs fold(const Outputs& total, const Sums& sums, const Outputs& scales,
                                        const StepOfRow&) {
    return multiply_add(sums, scales, total);
  }

#ifdef __AVX512BF16__

  // Two inputs' values for each output of a block.
  struct Weights {
    __m512bh low, high;
  };

  static C10_ALWAYS_INLINE void add(Sums& sums, const Weights& weights, const X* x) {
    int pair;
    std::memcpy(&pair, x, sizeof pair);
    const auto both = (__m512bh)_mm512_set1_epi32(pair);
    sums.low = _mm512_dpbf16_ps(sums.low, both, weights.low);
    sums.high = _mm512_dpbf16_ps(sums.high, both, weights.high);
  }

  static float sum(const X* x, int count) {
    const auto ones = (__m512bh)_mm512_set1_epi16(BFloat16(1.f).x);
    auto total = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 32) {
      const auto mask = count - i >= 32 ? __mmask32(-1) : (__mmask32(1) << (count - i)) - 1;
      total = _mm512_dpbf16_ps(total, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i), ones);
    }
    return _mm512_reduce_add_ps(total);
  }

#else

  struct Weights {
    Outputs first, second;
  };

  static void add(Sums& sums, const Weights& weights, const X* x) {
    sums = multiply_add(Outputs::same(x[0]), weights.first, sums);
    sums = multiply_add(Outputs::same(x[1]), weights.second, sums);
  }

  static float sum(const X* x, int count) {
    float total = 0;
    for (int i = 0; i < count; i++) total += float(x[i]);
    return total;
  }

#endif

  template <Codes>
  struct Decoder;
};

#ifdef __AVX512BF16__

// Calls `use(i, weights)` for the inputs i and i + 1 of a unit of 8. `look_up` finds the values of the low four bits of
// each 16, for the first or the second half of a block.
template <typename LookUp, typename Use>
C10_ALWAYS_INLINE void decode_nibbles(const char* codes, const Width& width, const LookUp& look_up, const Use& use) {
  const auto low = _mm512_maskz_loadu_epi32(width.low, codes), high = _mm512_maskz_loadu_epi32(width.high, codes + 64);
  __builtin_prefetch(codes + kPage);
  __builtin_prefetch(codes + kPage + 64);
  auto both = [&](__m512i low, __m512i high) { return Bf16Rows::Weights{look_up(low, false), look_up(high, true)}; };
  use(0, both(low, high));
  use(2, both(_mm512_srli_epi16(low, 4), _mm512_srli_epi16(high, 4)));
  use(4, both(_mm512_srli_epi16(low, 8), _mm512_srli_epi16(high, 8)));
  use(6, both(_mm512_srli_epi16(low, 12), _mm512_srli_epi16(high, 12)));
}

template <>
struct Bf16Rows::Decoder<Codes::kTable4> {
  static constexpr int kInputs = 8;  // of a unit
  __m512i values;

  // A place in a register of 32 has five bits, of which one belongs to the next code.
  explicit Decoder(const float* table) {
    alignas(64) BFloat16 twice[32];
    for (int i = 0; i < 32; i++) twice[i] = table[i % 16];
    values = _mm512_load_si512(twice);
  }

  template <typename Use>
  C10_ALWAYS_INLINE void decode(const char* codes, const Width& width, const Shifts&, const Use& use) const {
    decode_nibbles(
        codes, width, [&](__m512i places, bool) { return (__m512bh)_mm512_permutexvar_epi16(places, values); }, use);
  }
};

template <>
struct Bf16Rows::Decoder<Codes::kZeros4> {
  static constexpr int kInputs = 8, kPlaces = 0x00010001;
  __m512i differences;

  explicit Decoder(const float*) {
    alignas(64) BFloat16 values[32];
    for (int i = 0; i < 32; i++) values[i] = i - kMaxZero;
    differences = _mm512_load_si512(values);
  }

  template <typename Use>
  C10_ALWAYS_INLINE void decode(const char* codes, const Width& width, const Shifts& shifts, const Use& use) const {
    auto look_up = [&](__m512i codes, bool second) {
      const auto nibbles = _mm512_and_si512(codes, _mm512_set1_epi16(15));
      const auto places = _mm512_add_epi16(nibbles, second ? shifts.high : shifts.low);
      return (__m512bh)_mm512_permutexvar_epi16(places, differences);
    };
    decode_nibbles(codes, width, look_up, use);
  }
};

template <>
struct Bf16Rows::Decoder<Codes::kInt8> {
  static constexpr int kInputs = 2;

  explicit Decoder(const float*) {}

  template <typename Use>
  C10_ALWAYS_INLINE void decode(const char* codes, const Width& width, const Shifts&, const Use& use) const {
    __builtin_prefetch(codes + kPage);
    auto half = [](__m128i codes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)); };
    auto widen = [&](__m256i codes) {
      return _mm512_cvtne2ps_pbh(half(_mm256_extracti128_si256(codes, 1)), half(_mm256_castsi256_si128(codes)));
    };
    use(0, Weights{widen(_mm256_maskz_loadu_epi16(width.low, codes)),
                   widen(_mm256_maskz_loadu_epi16(width.high, codes + 32))});
  }
};

#else

template <Codes C>
struct Bf16Rows::Decoder {
  static constexpr int kInputs = C == Codes::kInt8 ? 2 : 8, kPlaces = 0;
  const float* table;

  explicit Decoder(const float* table) : table(table) {}

  template <typename Use>
  void decode(const char* codes, const Width& width, const Shifts& shifts, const Use& use) const {
    auto values = [&](int input) {
      float values[kBlock] = {};
      for (int o = 0; o < width.width; o++) {
        if constexpr (C == Codes::kInt8) {
          values[o] = static_cast<int8_t>(codes[2 * o + input]);
        } else {
          uint32_t unit;
          std::memcpy(&unit, codes + 4 * o, sizeof unit);
          const int code = unit >> (input % 2 * 16 + input / 2 * 4) & 15;
          values[o] = C == Codes::kTable4 ? table[code] : code + shifts.values[o] - kMaxZero;
        }
      }
      return Outputs::of(values);
    };
    for (int i = 0; i < kInputs; i += 2) use(i, Weights{values(i), values(i + 1)});
  }
};

#endif

}  // namespace llama2
