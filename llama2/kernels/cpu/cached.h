// Owns what an element of the KV cache is: a value of the model's type, or a code of 8 bits. A head's keys of one
// token, or its values, are codes times a scale of their own, the smallest with which none is out of the codes' range.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/bit_cast.h>

#include <cmath>
#include <type_traits>

#include "lanes.h"

namespace llama2 {

// Keys or values of a layer: (blocks, block size, K, D), and (blocks, block size, K) if they are codes.
template <typename C>
struct Cached {
  C* values;
  float* scales;

  Cached(const at::Tensor& values, const std::optional<at::Tensor>& scales)
      : values(values.mutable_data_ptr<C>()),
        scales(scales ? scales->mutable_data_ptr<float>() : nullptr) {
    const bool has_scales = std::is_same_v<C, int8_t> || std::is_same_v<C, Fp8>;
    TORCH_CHECK(values.is_contiguous() && has_scales == scales.has_value(),
                "a cache is contiguous, and codes have scales");
    TORCH_CHECK(!scales || (scales->is_contiguous() && scales->sizes() == values.sizes().slice(0, 3)),
                "a cache has a scale for each token and head");
  }
};

// Calls `body` with a value of the type of the elements in a cache of a model of type T.
template <typename T, typename Body>
inline void dispatch_cached(at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kChar: return body(int8_t());
    case at::kFloat8_e4m3fn: return body(Fp8());
    default:
      TORCH_CHECK(type == c10::CppTypeToScalarType<T>::value, "a cache of ", type, " does not belong to this model");
      body(T());
  }
}

template <typename C>
constexpr float kLargest = std::is_same_v<C, int8_t> ? 127.f : 448.f;

// The nearest code, the even one of two, of a value in the codes' range.
inline void round_to(float value, int8_t& code) { code = static_cast<int8_t>(std::nearbyint(value)); }
inline void round_to(float value, Fp8& code) {
  const auto bits = c10::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude + 0x7ffff + (magnitude >> 20 & 1) - (120u << 23)) >> 20;
  // Below 2^-6 they are multiples of 2^-9, as sums with 2^14 are in fp32.
  const float shifted = c10::bit_cast<float>(magnitude) + 0x1p14f;
  const uint32_t subnormal = c10::bit_cast<uint32_t>(shifted) - c10::bit_cast<uint32_t>(0x1p14f);
  code.x = static_cast<uint8_t>((magnitude < 121u << 23 ? subnormal : normal) | (bits >> 24 & 0x80));
}

// `values` (dim) become codes; returns their scale.
template <typename T, typename C>
inline float encode(const T* values, int64_t dim, C* codes) {
  Floats highest(0.f);
  for_lanes(dim,
            [&](int64_t d, auto... count) { highest = at::vec::maximum(highest, load(values + d, count...).abs()); });
  const float scale =
      at::vec::vec_reduce_all<float>([](const Floats& a, const Floats& b) { return at::vec::maximum(a, b); }, highest) /
      kLargest<C>;
  const Floats divisor(scale > 0.f ? scale : 1.f), largest(kLargest<C>);
  for_lanes(dim, [&](int64_t d, auto... count) {
    float quotients[kFloats];
    C rounded[kFloats];
    at::vec::clamp(load(values + d, count...) / divisor, largest.neg(), largest).store(quotients);
    for (int64_t i = 0; i < kFloats; i++) round_to(quotients[i], rounded[i]);
    std::copy_n(rounded, std::min(kFloats, dim - d), codes + d);
  });
  return scale;
}

}  // namespace llama2
