// Owns what the product with a quantized weight knows of the processor: numbers for all outputs of a block at once, and
// the way to them from packed codes and scales. `packing.h` says how these are packed.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "lanes.h"

namespace llama2 {

constexpr int kBlock = 32;       // outputs of a block
constexpr int64_t kPage = 4096;  // where hardware prefetchers stop

#ifdef __AVX512BF16__

// The first `width` outputs of a block, of which there may be fewer than kBlock.
struct Width {
  int width;
  __mmask16 low = first(std::min(width, 16)), high = first(std::max(width - 16, 0));

  static __mmask16 first(int count) { return static_cast<__mmask16>((1 << count) - 1); }
};

// An fp32 number for each output of a block.
struct Outputs {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();

  static Outputs load(const float* from, const Width& width) {
    return {_mm512_maskz_loadu_ps(width.low, from), _mm512_maskz_loadu_ps(width.high, from + 16)};
  }
  static Outputs load(const at::Half* from, const Width& width) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(width.low, from)),
            _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(width.high, from + 16))};
  }
  static Outputs load(const uint8_t* from, const Width& width) {
    auto widen = [](__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); };
    return {widen(_mm_maskz_loadu_epi8(width.low, from)), widen(_mm_maskz_loadu_epi8(width.high, from + 16))};
  }
  static Outputs same(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(value)}; }

  void store(BFloat16* to, const Width& width) const {
    _mm256_mask_storeu_epi16(to, width.low, (__m256i)_mm512_cvtneps_pbh(low));
    _mm256_mask_storeu_epi16(to + 16, width.high, (__m256i)_mm512_cvtneps_pbh(high));
  }
};

inline Outputs operator*(const Outputs& a, const Outputs& b) {
  return {_mm512_mul_ps(a.low, b.low), _mm512_mul_ps(a.high, b.high)};
}
inline Outputs multiply_add(const Outputs& a, const Outputs& b, const Outputs& c) {
  return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
}

// The values of two inputs for each output of a block.
struct Weights {
  __m512bh low, high;
};

// sum += the products of two inputs.
inline void add_products(Outputs& sum, const Weights& weights, const BFloat16* x) {
  int pair;
  std::memcpy(&pair, x, sizeof pair);
  const auto both = (__m512bh)_mm512_set1_epi32(pair);
  sum.low = _mm512_dpbf16_ps(sum.low, both, weights.low);
  sum.high = _mm512_dpbf16_ps(sum.high, both, weights.high);
}

inline float sum_of(const BFloat16* x, int count) {
  const auto mask = count == 32 ? __mmask32(-1) : (__mmask32(1) << count) - 1;
  const auto ones = (__m512bh)_mm512_set1_epi16(BFloat16(1.f).x);
  return _mm512_reduce_add_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), (__m512bh)_mm512_maskz_loadu_epi16(mask, x), ones));
}

template <int Bits>
struct Decoder;

template <>
struct Decoder<4> {
  static constexpr int kInputs = 8;  // of a unit
  __m512i values;

  // A place in a register of 32 has five bits, of which one belongs to the next code.
  explicit Decoder(const float* table) {
    alignas(64) BFloat16 twice[32];
    for (int i = 0; i < 32; i++) twice[i] = table[i % 16];
    values = _mm512_load_si512(twice);
  }

  // Calls `use(i, weights)` for the inputs i and i + 1 of a unit.
  template <typename Use>
  C10_ALWAYS_INLINE void decode(const char* codes, const Width& width, const Use& use) const {
    const auto low = _mm512_maskz_loadu_epi32(width.low, codes),
               high = _mm512_maskz_loadu_epi32(width.high, codes + 64);
    __builtin_prefetch(codes + kPage);
    __builtin_prefetch(codes + kPage + 64);
    auto look_up = [&](__m512i places) { return (__m512bh)_mm512_permutexvar_epi16(places, values); };
    use(0, Weights{look_up(low), look_up(high)});
    use(2, Weights{look_up(_mm512_srli_epi16(low, 4)), look_up(_mm512_srli_epi16(high, 4))});
    use(4, Weights{look_up(_mm512_srli_epi16(low, 8)), look_up(_mm512_srli_epi16(high, 8))});
    use(6, Weights{look_up(_mm512_srli_epi16(low, 12)), look_up(_mm512_srli_epi16(high, 12))});
  }
};

template <>
struct Decoder<8> {
  static constexpr int kInputs = 2;

  explicit Decoder(const float*) {}

  template <typename Use>
  C10_ALWAYS_INLINE void decode(const char* codes, const Width& width, const Use& use) const {
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

struct Width {
  int width;
};

struct Outputs {
  std::array<Floats, kBlock / kFloats> parts{};

  template <typename T>
  static Outputs load(const T* from, const Width& width) {
    float values[kBlock] = {};
    for (int o = 0; o < width.width; o++) values[o] = from[o];
    return of(values);
  }
  static Outputs of(const float* values) {
    Outputs result;
    for (size_t i = 0; i < result.parts.size(); i++) result.parts[i] = Floats::loadu(values + i * kFloats);
    return result;
  }
  static Outputs same(float value) {
    Outputs result;
    result.parts.fill(Floats(value));
    return result;
  }

  void store(BFloat16* to, const Width& width) const {
    float values[kBlock];
    for (size_t i = 0; i < parts.size(); i++) parts[i].store(values + i * kFloats);
    std::copy_n(values, width.width, to);
  }
};

inline Outputs multiply_add(const Outputs& a, const Outputs& b, const Outputs& c) {
  Outputs result;
  for (size_t i = 0; i < c.parts.size(); i++) result.parts[i] = at::vec::fmadd(a.parts[i], b.parts[i], c.parts[i]);
  return result;
}
inline Outputs operator*(const Outputs& a, const Outputs& b) { return multiply_add(a, b, Outputs()); }

struct Weights {
  Outputs first, second;
};

inline void add_products(Outputs& sum, const Weights& weights, const BFloat16* x) {
  sum = multiply_add(Outputs::same(x[0]), weights.first, sum);
  sum = multiply_add(Outputs::same(x[1]), weights.second, sum);
}

inline float sum_of(const BFloat16* x, int count) {
  float sum = 0;
  for (int i = 0; i < count; i++) sum += float(x[i]);
  return sum;
}

template <int Bits>
struct Decoder {
  static constexpr int kInputs = Bits == 4 ? 8 : 2;
  const float* table;

  explicit Decoder(const float* table) : table(table) {}

  template <typename Use>
  void decode(const char* codes, const Width& width, const Use& use) const {
    auto values = [&](int input) {
      float values[kBlock] = {};
      for (int o = 0; o < width.width; o++) {
        if constexpr (Bits == 4) {
          uint32_t unit;
          std::memcpy(&unit, codes + 4 * o, sizeof unit);
          values[o] = table[unit >> (input % 2 * 16 + input / 2 * 4) & 15];
        } else {
          values[o] = static_cast<int8_t>(codes[2 * o + input]);
        }
      }
      return Outputs::of(values);
    };
    for (int i = 0; i < kInputs; i += 2) use(i, Weights{values(i), values(i + 1)});
  }
};

#endif

}  // namespace llama2
