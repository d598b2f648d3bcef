// Owns a quantized weight: its packed parts, and what the steps of a block of outputs are multiplied by.
#pragma once

#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "codes.h"
#include "kernels.h"

namespace llama2 {

constexpr int kStep = 64, kSmallestStep = 16;  // the most and the fewest inputs that are summed before they are scaled

using WeightPart = std::optional<at::Tensor>;

// A packed part (outputs, columns), or none.
struct Column {
  const char* data = nullptr;
  at::ScalarType type{};
  int64_t columns = 0, size = 0;
  int steps = 0;  // for which a column is

  Column(const WeightPart& part, int64_t all_steps) {
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
    const auto* from = advance();
    switch (type_) {
      case at::kByte: return Outputs::load(reinterpret_cast<const uint8_t*>(from), width_);
      case at::kHalf: return Outputs::load(reinterpret_cast<const at::Half*>(from), width_);
      default: return Outputs::load(reinterpret_cast<const float*>(from), width_);
    }
  }

  Shifts next_shifts(int places) { return Shifts::load(reinterpret_cast<const uint8_t*>(advance()), width_, places); }

 private:
  const char* advance() {
    const auto* from = at_;
    if (++step_ == steps_) {
      step_ = 0;
      at_ += jump_;
    }
    __builtin_prefetch(from + kPage / 4);
    __builtin_prefetch(from + kPage / 4 + 64);
    return from;
  }

  const char* at_;
  at::ScalarType type_;
  int64_t jump_;
  int steps_, step_ = 0;
  const Width width_;
};

struct Factors {
  Outputs scales, mins;
};

// A value is scale · code + min, of what a code stands for. Scales and minima are multiplied by their super-scales,
// where there are any; in 8 bits a minimum may be given as the code that stands for 0.
struct QuantizedWeight {
  const int64_t inputs, outputs;
  const std::vector<WeightPart> parts;  // own what the others point to
  const at::Tensor codes;
  const Codes kind;
  const int step;
  const int64_t all_steps;
  const Column scales, zeros, mins, super_scales, super_mins;
  const bool has_mins;
  const std::vector<float> table;

  QuantizedWeight(int64_t inputs, int step, Codes kind, at::Tensor codes, std::vector<WeightPart> parts,
                  std::vector<float> table)
      : inputs(inputs),
        outputs(codes.size(0)),
        parts(std::move(parts)),
        codes(std::move(codes)),
        kind(kind),
        step(step),
        all_steps(inputs / step),
        scales(this->parts[0], all_steps),
        zeros(this->parts[1], all_steps),
        mins(this->parts[2], all_steps),
        super_scales(this->parts[3], all_steps),
        super_mins(this->parts[4], all_steps),
        has_mins(mins || (zeros && kind != Codes::kZeros4)),
        table(std::move(table)) {}

  const char* codes_of(int64_t output) const {
    return static_cast<const char*>(codes.const_data_ptr()) + output * codes.size(1);
  }
};

// What the steps of a block of outputs are multiplied by, one step after the other.
class FactorCursor {
 public:
  FactorCursor(const QuantizedWeight& w, int64_t output, const Width& width)
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

  Shifts next_shifts(int places) { return zeros_.next_shifts(places); }

 private:
  const QuantizedWeight& w_;
  Cursor scales_, zeros_, mins_, super_scales_, super_mins_;
};

}  // namespace llama2
