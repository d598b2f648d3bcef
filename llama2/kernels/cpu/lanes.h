// Owns what the kernels know of the processor: loading values as fp32 lanes, and the dot products of rows in
// bf16 and fp32 with rows in the same type or in 8 bits.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Float8_e4m3fn.h>

#include <algorithm>
#include <array>
#if defined(__AVX512BF16__) || defined(__F16C__)
#include <immintrin.h>
#endif

// Compiles the body for each dtype that a model may have on a CPU, as scalar_t.
#define LLAMA2_DISPATCH(TYPE, NAME, ...) \
  AT_DISPATCH_SWITCH(TYPE, NAME, AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__))

namespace llama2 {

using at::BFloat16;
using Fp8 = at::Float8_e4m3fn;
using Floats = at::vec::Vectorized<float>;
constexpr int64_t kFloats = Floats::size();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Values as fp32, whole registers or the first `count`; lanes beyond are 0.
inline Floats load(const float* from) { return Floats::loadu(from); }
inline Floats load(const float* from, int64_t count) { return Floats::loadu(from, count); }

inline Floats load(const BFloat16* from) {
  Floats result;
  at::vec::load_to_float<BFloat16>(from, result);
  return result;
}

#if defined(CPU_CAPABILITY_AVX512)
inline Floats load(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
// In the place of fp16's digits they are 2^-8 of their values: the exponents have another bias. The sign is moved there
// by doubling it and clearing the lower one.
inline Floats load(const Fp8* from) {
  const __m256i codes = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i moved = _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 1);
  const Floats small = _mm512_cvtph_ps(_mm256_and_si256(moved, _mm256_set1_epi16(static_cast<short>(0xbf80))));
  return small * Floats(256.f);
}
#elif defined(CPU_CAPABILITY_AVX2) && defined(__F16C__)
inline Floats load(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Floats load(const Fp8* from) {
  const __m128i codes = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i moved = _mm_srai_epi16(_mm_slli_epi16(codes, 8), 1);
  const Floats small = _mm256_cvtph_ps(_mm_and_si128(moved, _mm_set1_epi16(static_cast<short>(0xbf80))));
  return small * Floats(256.f);
}
#else
template <typename C>
inline Floats load_codes(const C* from) {
  float values[kFloats];
  std::copy_n(from, kFloats, values);
  return load(values);
}
// No templates: c10 has one of the same name.
inline Floats load(const int8_t* from) { return load_codes(from); }
inline Floats load(const Fp8* from) { return load_codes(from); }
#endif

template <typename T>
inline Floats load(const T* from, int64_t count) {
  T values[kFloats] = {};
  std::copy(from, from + count, values);
  return load(values);
}

inline void store(float* to, const Floats& values, int64_t count = kFloats) { values.store(to, count); }
inline void store(BFloat16* to, const Floats& values, int64_t count = kFloats) {
  at::vec::convert_from_float<BFloat16>(values, values).store(to, count);
}

// Stores two registers, one after the other.
inline void store2(float* to, const Floats& a, const Floats& b) {
  store(to, a);
  store(to + kFloats, b);
}
inline void store2(BFloat16* to, const Floats& a, const Floats& b) {
#ifdef __AVX512BF16__
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
  at::vec::convert_from_float<BFloat16>(a, b).store(to);
#endif
}

// Calls `step(i)` for every whole register below `size`, then `step(i, count)` for the remainder.
template <typename Step>
inline void for_lanes(int64_t size, const Step& step) {
  int64_t i = 0;
  for (; i + kFloats <= size; i += kFloats) step(i);
  if (i < size) step(i, size - i);
}

// Stores four values, rounded to the type.
inline void store4(float* to, const std::array<float, 4>& values) { std::copy(values.begin(), values.end(), to); }
inline void store4(BFloat16* to, const std::array<float, 4>& values) {
#ifdef __AVX512BF16__
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(values.data())));
#else
  std::copy(values.begin(), values.end(), to);
#endif
}

inline float sum(const Floats& values) {
  return at::vec::vec_reduce_all<float>([](const Floats& a, const Floats& b) { return a + b; }, values);
}

// A register of T values, and sums of products of two such, in fp32.
template <typename T>
struct Lanes;

template <>
struct Lanes<float> {
  using Values = Floats;
  using Sum = Floats;
  static constexpr int64_t kCount = kFloats;

  template <typename C, typename... Count>
  static Values load(const C* from, Count... count) {
    return llama2::load(from, count...);
  }
  static Sum zero() { return Floats(0.f); }
  static Sum add_products(const Sum& sum, const Values& a, const Values& b) { return at::vec::fmadd(a, b, sum); }
  static std::array<float, 4> totals(const Sum& a, const Sum& b, const Sum& c, const Sum& d) {
    return {sum(a), sum(b), sum(c), sum(d)};
  }
};

#ifdef __AVX512BF16__
template <>
struct Lanes<BFloat16> {
  using Values = __m512bh;
  using Sum = __m512;
  static constexpr int64_t kCount = 32;

  static Values load(const BFloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }
  static Values load(const BFloat16* from, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, from);
  }
  template <typename C>
  static Values load(const C* from) {
    float values[kCount];  // every code is exact in bf16
    for (int64_t i = 0; i < kCount; i += kFloats) llama2::load(from + i).store(values + i);
    return _mm512_cvtne2ps_pbh(_mm512_loadu_ps(values + 16), _mm512_loadu_ps(values));
  }
  template <typename C>
  static Values load(const C* from, int64_t count) {
    C values[kCount] = {};
    std::copy(from, from + count, values);
    return load(values);
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add_products(Sum sum, Values a, Values b) { return _mm512_dpbf16_ps(sum, a, b); }
  static std::array<float, 4> totals(Sum a, Sum b, Sum c, Sum d) {
    auto halve = [](Sum x) { return _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1)); };
    const __m256 quads = _mm256_hadd_ps(_mm256_hadd_ps(halve(a), halve(b)), _mm256_hadd_ps(halve(c), halve(d)));
    std::array<float, 4> result;
    _mm_storeu_ps(result.data(), _mm_add_ps(_mm256_castps256_ps128(quads), _mm256_extractf128_ps(quads, 1)));
    return result;
  }
};
#else
template <>
struct Lanes<BFloat16> {
  using Values = std::array<Floats, 2>;
  using Sum = Floats;
  static constexpr int64_t kCount = 2 * kFloats;

  template <typename C>
  static Values load(const C* from) {
    return {llama2::load(from), llama2::load(from + kFloats)};
  }
  template <typename C>
  static Values load(const C* from, int64_t count) {
    C values[kCount] = {};
    std::copy(from, from + count, values);
    return load(values);
  }
  static Sum zero() { return Floats(0.f); }
  static Sum add_products(const Sum& sum, const Values& a, const Values& b) {
    return at::vec::fmadd(a[1], b[1], at::vec::fmadd(a[0], b[0], sum));
  }
  static std::array<float, 4> totals(const Sum& a, const Sum& b, const Sum& c, const Sum& d) {
    return Lanes<float>::totals(a, b, c, d);
  }
};
#endif

// sums[m][n] += the products of xs[m] and ys[n], rows of `size` values. `ahead` is called before each register of ys.
template <typename T, typename C, int M, int N, typename Ahead>
inline void dot(const T* const (&xs)[M], const C* const (&ys)[N], int64_t size, typename Lanes<T>::Sum (&sums)[M][N],
                Ahead ahead) {
  using L = Lanes<T>;
  auto step = [&](int64_t i, auto... count) C10_ALWAYS_INLINE_ATTRIBUTE {
    typename L::Values x[M];
    for (int m = 0; m < M; m++) x[m] = L::load(xs[m] + i, count...);
    for (int n = 0; n < N; n++) {
      ahead();
      const auto y = L::load(ys[n] + i, count...);
      for (int m = 0; m < M; m++) sums[m][n] = L::add_products(sums[m][n], x[m], y);
    }
  };
  int64_t i = 0;
  for (; i + L::kCount <= size; i += L::kCount) step(i);
  if (i < size) step(i, size - i);
}

}  // namespace llama2
