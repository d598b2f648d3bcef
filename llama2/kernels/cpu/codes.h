// Owns what products with a quantized weight share: fp32 numbers for all outputs of a block at once, and the kinds of
// codes. `packing.h` says how codes and scales are packed, `bf16_codes.h` and `int8_codes.h` how codes are decoded.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "lanes.h"

namespace llama2 {

constexpr int kBlock = 32;       // outputs of a block
constexpr int64_t kPage = 4096;  // where hardware prefetchers stop

// What a code stands for, before it is scaled.
enum class Codes {
  kTable4,  // a value of a table of 16
  kZeros4,  // code - zero: every group has a code that stands for 0, of 0 to kMaxZero
  kInt8,    // itself, with a sign
};
constexpr int kMaxZero = 16;

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

// For each output of a block kMaxZero less the zero of its codes, in every place where a code is to be shifted by it.
struct Shifts {
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();

  // `places` has a 1 at each.
  static Shifts load(const uint8_t* zeros, const Width& width, int places) {
    auto shifts = [&](__m128i bytes) {
      const auto shift = _mm512_sub_epi32(_mm512_set1_epi32(kMaxZero), _mm512_cvtepu8_epi32(bytes));
      return _mm512_mullo_epi32(shift, _mm512_set1_epi32(places));
    };
    return {shifts(_mm_maskz_loadu_epi8(width.low, zeros)), shifts(_mm_maskz_loadu_epi8(width.high, zeros + 16))};
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

struct Shifts {
  std::array<int, kBlock> values{};

  static Shifts load(const uint8_t* zeros, const Width& width, int) {
    Shifts result;
    for (int o = 0; o < width.width; o++) result.values[o] = kMaxZero - zeros[o];
    return result;
  }
};

#endif

// What a step of a row is, beside its inputs: their sum, by which minima are multiplied; for inputs that are whole
// numbers, what these are multiplied by, and where their products' sum begins.
struct StepOfRow {
  float sum, scale;
  int32_t start;
};

}  // namespace llama2
