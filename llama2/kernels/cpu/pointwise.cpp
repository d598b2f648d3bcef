// Owns the small steps between the products: residual and norm, rotary embedding on the way into the cache, and the
// gate. Each reads and writes its tensors once, in fp32 within.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "kernels.h"
#include "lanes.h"

namespace llama2 {
namespace {

// Work below this many values is not worth waking a thread for.
constexpr int64_t kGrain = 16384;

}  // namespace

// x (T, C) += branch (T, C) if there is one, rounded; returns the RMS norm of x, times weight (C).
at::Tensor add_rms_norm(at::Tensor x, const std::optional<at::Tensor>& branch, const at::Tensor& weight, double eps) {
  const int64_t rows = x.size(0), dim = x.size(1);
  auto result = at::empty_like(x);
  LLAMA2_DISPATCH(x.scalar_type(), "add_rms_norm", [&] {
    auto* xs = x.mutable_data_ptr<scalar_t>();
    const auto* branches = branch ? branch->const_data_ptr<scalar_t>() : nullptr;
    const auto* weights = weight.const_data_ptr<scalar_t>();
    auto* results = result.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) {
        auto* values = xs + row * dim;
        Floats squares(0.f);
        for_lanes(dim, [&](int64_t c, auto... count) {
          auto value = load(values + c, count...);
          if (branches) {
            store(values + c, value + load(branches + row * dim + c, count...), count...);
            value = load(values + c, count...);
          }
          squares = at::vec::fmadd(value, value, squares);
        });
        const Floats scale(1.f / std::sqrt(sum(squares) / dim + static_cast<float>(eps)));
        for_lanes(dim, [&](int64_t c, auto... count) {
          store(results + row * dim + c, load(values + c, count...) * scale * load(weights + c, count...), count...);
        });
      }
    });
  });
  return result;
}

// qkv (T, (H + 2 K) D): the rotated queries are returned (T, H, D); rotated keys and values go to `slots` (T) of the
// caches (blocks, block size, K, D). rope (T, D / 2, 2) holds cos and sin for pairs of neighbours.
at::Tensor rotate_and_store(
    const at::Tensor& qkv, const at::Tensor& rope, const at::Tensor& slots, at::Tensor keys, at::Tensor values) {
  const int64_t tokens = qkv.size(0), kv_heads = keys.size(2), head_dim = keys.size(3);
  const int64_t heads = qkv.size(1) / head_dim - 2 * kv_heads;
  auto queries = at::empty({tokens, heads, head_dim}, qkv.options());
  const auto* turns = rope.const_data_ptr<float>();
  const auto* slot = slots.const_data_ptr<int64_t>();
  LLAMA2_DISPATCH(qkv.scalar_type(), "rotate_and_store", [&] {
    const auto* from = qkv.const_data_ptr<scalar_t>();
    auto* query = queries.mutable_data_ptr<scalar_t>();
    auto* key = keys.mutable_data_ptr<scalar_t>();
    auto* value = values.mutable_data_ptr<scalar_t>();
    auto rotate = [&](const scalar_t* in, const float* turn, scalar_t* out) {
      for (int64_t d = 0; d < head_dim; d += 2) {
        const float even = in[d], odd = in[d + 1], cos = turn[d], sin = turn[d + 1];
        out[d] = even * cos - odd * sin;
        out[d + 1] = even * sin + odd * cos;
      }
    };
    at::parallel_for(0, tokens, std::max<int64_t>(1, kGrain / qkv.size(1)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++) {
        const auto* in = from + t * qkv.size(1);
        const auto* turn = turns + t * head_dim;
        const int64_t at = slot[t] * kv_heads * head_dim;
        for (int64_t h = 0; h < heads; h++) rotate(in + h * head_dim, turn, query + (t * heads + h) * head_dim);
        in += heads * head_dim;
        for (int64_t h = 0; h < kv_heads; h++) rotate(in + h * head_dim, turn, key + at + h * head_dim);
        in += kv_heads * head_dim;
        std::copy(in, in + kv_heads * head_dim, value + at);
      }
    });
  });
  return queries;
}

// gate_up (T, 2 F): silu of the first half, times the second.
at::Tensor silu_mul(const at::Tensor& gate_up) {
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  auto result = at::empty({rows, width}, gate_up.options());
  LLAMA2_DISPATCH(gate_up.scalar_type(), "silu_mul", [&] {
    const auto* from = gate_up.const_data_ptr<scalar_t>();
    auto* to = result.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / (8 * width)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        for_lanes(width, [&](int64_t f, auto... count) {
          const auto gate = load(from + row * 2 * width + f, count...);
          const auto up = load(from + (row * 2 + 1) * width + f, count...);
          store(to + row * width + f, gate / (Floats(1.f) + gate.neg().exp_u20()) * up, count...);
        });
    });
  });
  return result;
}

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def("add_rms_norm(Tensor(a!) x, Tensor? branch, Tensor weight, float eps) -> Tensor");
  library.def("rotate_and_store(Tensor qkv, Tensor rope, Tensor slots, Tensor(a!) keys, Tensor(b!) values) -> Tensor");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) {
  library.impl("add_rms_norm", &add_rms_norm);
  library.impl("rotate_and_store", &rotate_and_store);
  library.impl("silu_mul", &silu_mul);
}

}  // namespace llama2
