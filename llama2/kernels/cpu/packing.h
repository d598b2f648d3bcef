// Owns the layout of a quantized weight's parts. The rows of each are cut into blocks of kBlock; the last may be
// narrower. A block takes the place of its rows, ordered by units: the first unit of its first output, the first of its
// second, and so on. A unit of codes are 8 inputs in 4 bits, the even ones before the odd ones, or 2 in 8 bits; a unit
// of scales is one.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "codes.h"

namespace llama2 {

// Lays out a part in units of U, each of which `change` may change, in the same memory.
template <typename U, typename Change>
inline void pack(const at::Tensor& part, const Change& change) {
  const int64_t outputs = part.size(0), units = part.size(1) * part.element_size() / sizeof(U);
  auto* rows = static_cast<char*>(part.mutable_data_ptr());
  std::vector<U> packed(kBlock * units);
  for (int64_t n = 0; n < outputs; n += kBlock) {
    auto* block = rows + n * units * sizeof(U);
    const int64_t width = std::min<int64_t>(kBlock, outputs - n);
    for (int64_t u = 0; u < units; u++)
      for (int64_t o = 0; o < width; o++) {
        U unit;
        std::memcpy(&unit, block + (o * units + u) * sizeof unit, sizeof unit);
        packed[u * width + o] = change(unit);
      }
    std::memcpy(block, packed.data(), width * units * sizeof(U));
  }
}

inline void pack_scales(const at::Tensor& part) {
  auto same = [](auto unit) { return unit; };
  switch (part.element_size()) {
    case 1: return pack<uint8_t>(part, same);
    case 2: return pack<uint16_t>(part, same);
    default: return pack<uint32_t>(part, same);
  }
}

inline void pack_codes(const at::Tensor& codes, int bits) {
  if (bits == 8) return pack<uint16_t>(codes, [](uint16_t unit) { return unit; });
  pack<uint32_t>(codes, [](uint32_t unit) {
    auto gather = [](uint32_t nibbles) {
      nibbles &= 0x0f0f0f0f;
      nibbles = (nibbles | nibbles >> 4) & 0x00ff00ff;
      return (nibbles | nibbles >> 8) & 0xffff;
    };
    return gather(unit) | gather(unit >> 4) << 16;
  });
}

}  // namespace llama2
