// Owns the arithmetic of products with rows of int8, of which each step has a scale: codes become whole numbers of
// eight bits without a sign, larger by an offset than what they stand for, and dot products are summed exactly. The
// offset times the sum of a step's inputs is where its sum begins, so that it cancels out.
#pragma once

#include <cmath>

#include "codes.h"

namespace llama2 {

struct Int8Rows {
  using X = int8_t;
  static constexpr int kTerms = 4;
  static constexpr int kLargest = 127;

#ifdef __AVX512BF16__

  // Four inputs' codes for each output of a block.
  struct Weights {
    __m512i low, high;
  };
  using Sums = Weights;

  static Sums begin(const StepOfRow& step) { return {_mm512_set1_epi32(step.start), _mm512_set1_epi32(step.start)}; }

  // For the intrinsic GCC 12 copies every sum from register to register.
  static C10_ALWAYS_INLINE __m512i added(__m512i sum, __m512i weights, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(x));
    return sum;
  }

  static C10_ALWAYS_INLINE void add(Sums& sums, const Weights& weights, const X* x) {
    int four;
    std::memcpy(&four, x, sizeof four);
    const auto all = _mm512_set1_epi32(four);
    sums = {added(sums.low, weights.low, all), added(sums.high, weights.high, all)};
  }

  static C10_ALWAYS_INLINE Outputs fold(const Outputs& total, const Sums& sums, const Outputs& scales,
                                        const StepOfRow& step) {
    return multiply_add({_mm512_cvtepi32_ps(sums.low), _mm512_cvtepi32_ps(sums.high)},
                        scales * Outputs::same(step.scale), total);
  }

#else

  // Four after four, output by output.
  struct Weights {
    std::array<uint8_t, 4 * kBlock> values{};
  };
  struct Sums {
    std::array<int32_t, kBlock> values;
  };

  static Sums begin(const StepOfRow& step) {
    Sums sums;
    sums.values.fill(step.start);
    return sums;
  }

  static void add(Sums& sums, const Weights& weights, const X* x) {
    for (int o = 0; o < kBlock; o++)
      for (int i = 0; i < 4; i++) sums.values[o] += weights.values[4 * o + i] * x[i];
  }

  static Outputs fold(const Outputs& total, const Sums& sums, const Outputs& scales, const StepOfRow& step) {
    float values[kBlock];
    std::copy(sums.values.begin(), sums.values.end(), values);
    return multiply_add(Outputs::of(values), scales * Outputs::same(step.scale), total);
  }

#endif

  // By how much the numbers of a weight exceed what they stand for.
  static int offset(Codes codes, const float* table) {
    switch (codes) {
      case Codes::kTable4: return -static_cast<int>(std::min(*std::min_element(table, table + 16), 0.f));
      case Codes::kZeros4: return kMaxZero;
      default: return 128;
    }
  }

  // Are the values of a table whole numbers that fit?
  static bool takes(const float* table) {
    return std::all_of(table, table + 16,
                       [](float value) { return value == std::round(value) && std::abs(value) < 128; });
  }

  // Rounds the inputs of a step, a multiple of 16, and puts them into the order in which the codes are decoded.
  template <Codes C>
  static StepOfRow round(int offset, const BFloat16* x, int count, X* to) {
    float largest = 0;
    int sum = 0;
#ifdef __AVX512BF16__
    auto load = [&](int i) {
      const auto bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    };
    auto absolute = _mm512_setzero_ps();
    for (int i = 0; i < count; i += 16) absolute = _mm512_max_ps(absolute, _mm512_abs_ps(load(i)));
    largest = _mm512_reduce_max_ps(absolute);
    const auto inverse = _mm512_set1_ps(largest > 0 ? kLargest / largest : 0);
    const auto order = C == Codes::kInt8 ? _mm_set_epi64x(0x0f0e0d0c0b0a0908, 0x0706050403020100)
                                         : _mm_set_epi64x(0x0f0b0e0a0d090c08, 0x0703060205010400);
    auto total = _mm512_setzero_si512();
    for (int i = 0; i < count; i += 16) {
      const auto values = _mm512_cvtps_epi32(_mm512_mul_ps(load(i), inverse));
      total = _mm512_add_epi32(total, values);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(values), order));
    }
    sum = _mm512_reduce_add_epi32(total);
#else
    for (int i = 0; i < count; i++) largest = std::max(largest, std::abs(float(x[i])));
    const float inverse = largest > 0 ? kLargest / largest : 0;
    for (int i = 0; i < count; i++) {
      const auto value = static_cast<int>(std::nearbyint(x[i] * inverse));
      to[C == Codes::kInt8 ? i : i / 8 * 8 + i % 4 * 2 + i / 4 % 2] = static_cast<X>(value);
      sum += value;
    }
#endif
    return {0, largest / kLargest, -offset * sum};
  }

  template <Codes>
  struct Decoder;
};

#ifdef __AVX512BF16__

// Calls `use(i, weights)` for the inputs 0 to 3 and 4 to 7, in the order of `Int8Rows::round`, of a unit of 8.
// `look_up` finds what the low four bits of each byte stand for, for the first or the second half of a block.
template <typename LookUp, typename Use>
C10_ALWAYS_INLINE void decode_bytes(const char* codes, const Width& width, const LookUp& look_up, const Use& use) {
  const auto low = _mm512_maskz_loadu_epi32(width.low, codes), high = _mm512_maskz_loadu_epi32(width.high, codes + 64);
  __builtin_prefetch(codes + kPage);
  __builtin_prefetch(codes + kPage + 64);
  auto nibbles = [&](__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); };
  use(0, Int8Rows::Weights{look_up(nibbles(low), false), look_up(nibbles(high), true)});
  use(4, Int8Rows::Weights{look_up(nibbles(_mm512_srli_epi16(low, 4)), false),
                           look_up(nibbles(_mm512_srli_epi16(high, 4)), true)});
}

template <>
struct Int8Rows::Decoder<Codes::kTable4> {
  static constexpr int kInputs = 8;
  __m512i values;

  explicit Decoder(const float* table) {
    const int offset = Int8Rows::offset(Codes::kTable4, table);
    alignas(16) uint8_t bytes[16];
    for (int i = 0; i < 16; i++) bytes[i] = static_cast<uint8_t>(static_cast<int>(table[i]) + offset);
    values = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }

  template <typename Use>
  C10_ALWAYS_INLINE void decode(const char* codes, const Width& width, const Shifts&, const Use& use) const {
    decode_bytes(codes, width, [&](__m512i places, bool) { return _mm512_shuffle_epi8(values, places); }, use);
  }
};

template <>
struct Int8Rows::Decoder<Codes::kZeros4> {
  static constexpr int kInputs = 8, kPlaces = 0x01010101;

  explicit Decoder(const float*) {}

  template <typename Use>
  C10_ALWAYS_INLINE void decode(const char* codes, const Width& width, const Shifts& shifts, const Use& use) const {
    auto look_up = [&](__m512i nibbles, bool second) {
      return _mm512_add_epi8(nibbles, second ? shifts.high : shifts.low);
    };
    decode_bytes(codes, width, look_up, use);
  }
};

// A unit of codes are two inputs: two units are four.
template <>
struct Int8Rows::Decoder<Codes::kInt8> {
  static constexpr int kInputs = 4;
  __m512i first, second;

  explicit Decoder(const float*) {
    alignas(64) uint16_t places[32];
    for (int i = 0; i < 32; i++) places[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    first = _mm512_load_si512(places);
    second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  }

  template <typename Use>
  C10_ALWAYS_INLINE void decode(const char* codes, const Width& width, const Shifts&, const Use& use) const {
    const auto mask = static_cast<__mmask32>(width.low) | static_cast<__mmask32>(width.high) << 16;
    const auto a = _mm512_maskz_loadu_epi16(mask, codes), b = _mm512_maskz_loadu_epi16(mask, codes + 2 * width.width);
    __builtin_prefetch(codes + kPage);
    __builtin_prefetch(codes + kPage + 64);
    const auto offset = _mm512_set1_epi8(static_cast<char>(128));
    use(0, Weights{_mm512_xor_si512(_mm512_permutex2var_epi16(a, first, b), offset),
                   _mm512_xor_si512(_mm512_permutex2var_epi16(a, second, b), offset)});
  }
};

#else

template <Codes C>
struct Int8Rows::Decoder {
  static constexpr int kInputs = C == Codes::kInt8 ? 4 : 8, kPlaces = 0;
  const float* table;
  const int offset;

  explicit Decoder(const float* table) : table(table), offset(Int8Rows::offset(C, table)) {}

  template <typename Use>
  void decode(const char* codes, const Width& width, const Shifts& shifts, const Use& use) const {
    for (int begin = 0; begin < kInputs; begin += 4) {
      Weights weights;
      for (int o = 0; o < width.width; o++)
        for (int i = 0; i < 4; i++) {
          int value;
          if constexpr (C == Codes::kInt8) {
            value = static_cast<int8_t>(codes[i / 2 * 2 * width.width + 2 * o + i % 2]);
          } else {
            const int code = codes[4 * o + i] >> begin & 15;
            value = C == Codes::kTable4 ? static_cast<int>(table[code]) : code + shifts.values[o] - kMaxZero;
          }
          weights.values[4 * o + i] = static_cast<uint8_t>(value + offset);
        }
      use(begin, weights);
    }
  }
};

#endif

}  // namespace llama2
