// Owns the small steps between the products: residual and norm, rotary embedding on the way into the cache, and the
// gate. Each reads and writes its tensors once, in fp32 within.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "kernels.h"
#include "lanes.h"

namespace llama2 {
namespace {

constexpr int64_t kAlone = 16384;  // up to this many values, one thread is faster than waking another
constexpr int64_t kPiece = 256;    // values of a row that one thread takes at once

}  // namespace

// x (T, C) += branch (T, C) if there is one, rounded; result is the RMS norm of x, times weight (C).
template <typename T>
void add_rms_norm(const Team& team, T* x, const T* branch, const T* weight, float eps, T* result, int64_t rows,
                  int64_t dim) {
  team.share(rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      auto* values = x + row * dim;
      Floats squares(0.f);
      for_lanes(dim, [&](int64_t c, auto... count) {
        auto value = load(values + c, count...);
        if (branch) {
          store(values + c, value + load(branch + row * dim + c, count...), count...);
          value = load(values + c, count...);
        }
        squares = at::vec::fmadd(value, value, squares);
      });
      const Floats scale(1.f / std::sqrt(sum(squares) / dim + eps));
      for_lanes(dim, [&](int64_t c, auto... count) {
        store(result + row * dim + c, load(values + c, count...) * scale * load(weight + c, count...), count...);
      });
    }
  });
}

// out (D) becomes in (D) with each pair of neighbours turned by its angle; turns (D / 2, 2) holds cos and sin.
template <typename T>
inline void rotate(const T* in, const float* turns, int64_t dim, T* out) {
  int64_t d = 0;
  for (; d + 2 * kFloats <= dim; d += 2 * kFloats) {
    const auto [even, odd] = at::vec::deinterleave2(load(in + d), load(in + d + kFloats));
    const auto [cos, sin] = at::vec::deinterleave2(load(turns + d), load(turns + d + kFloats));
    const auto [low, high] =
        at::vec::interleave2(at::vec::fmsub(even, cos, odd * sin), at::vec::fmadd(even, sin, odd * cos));
    store(out + d, low);
    store(out + d + kFloats, high);
  }
  for (; d < dim; d += 2) {
    const float even = in[d], odd = in[d + 1], cos = turns[d], sin = turns[d + 1];
    out[d] = std::fma(even, cos, -(odd * sin));
    out[d + 1] = std::fma(even, sin, odd * cos);
  }
}

// qkv (T, (H + 2 K) D): its queries go, rotated, to queries (T, H, D), rotated keys and values to `slots` (T) of the
// caches. rope is (T, D / 2, 2).
template <typename T, typename C>
void rotate_and_store(const Team& team, const T* qkv, const float* rope, const int64_t* slots, T* queries,
                      const Cached<C>& keys, const Cached<C>& values, int64_t tokens, const Heads& heads) {
  const int64_t dim = heads.dim, all = heads.heads + 2 * heads.kv_heads;
  constexpr bool kEncodes = !std::is_same_v<T, C>;
  team.share(tokens * all, [&](int64_t begin, int64_t end) {
    std::vector<T> rotated(kEncodes ? dim : 0);
    for (int64_t i = begin; i < end; i++) {
      const int64_t token = i / all, head = i % all, kv_head = head - heads.heads;
      const T* in = qkv + i * dim;
      const float* turns = rope + token * dim;
      const int64_t row = slots[token] * heads.kv_heads + kv_head;  // of keys
      if (kv_head < 0) {
        rotate(in, turns, dim, queries + (token * heads.heads + head) * dim);
      } else if (kv_head < heads.kv_heads) {
        if constexpr (kEncodes) {
          rotate(in, turns, dim, rotated.data());
          keys.scales[row] = encode(rotated.data(), dim, keys.values + row * dim);
        } else {
          rotate(in, turns, dim, keys.values + row * dim);
        }
      } else {
        C* out = values.values + (row - heads.kv_heads) * dim;
        if constexpr (kEncodes)
          values.scales[row - heads.kv_heads] = encode(in, dim, out);
        else
          std::copy(in, in + dim, out);
      }
    }
  });
}

// gate_up (T, 2 F): result (T, F) becomes silu of the first half, times the second.
template <typename T>
void silu_mul(const Team& team, const T* gate_up, T* result, int64_t rows, int64_t width) {
  const int64_t pieces = ceil_div(width, kPiece);
  team.share(rows * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t row = i / pieces, first = i % pieces * kPiece;
      const T *gates = gate_up + row * 2 * width + first, *ups = gates + width;
      T* to = result + row * width + first;
      for_lanes(std::min(kPiece, width - first), [&](int64_t f, auto... count) {
        const auto gate = load(gates + f, count...);
        store(to + f, gate / (Floats(1.f) + gate.neg().exp_u20()) * load(ups + f, count...), count...);
      });
    }
  });
}

template void add_rms_norm(const Team&, BFloat16*, const BFloat16*, const BFloat16*, float, BFloat16*, int64_t,
                           int64_t);
template void rotate_and_store(const Team&, const BFloat16*, const float*, const int64_t*, BFloat16*,
                               const Cached<BFloat16>&, const Cached<BFloat16>&, int64_t, const Heads&);
template void rotate_and_store(const Team&, const BFloat16*, const float*, const int64_t*, BFloat16*,
                               const Cached<int8_t>&, const Cached<int8_t>&, int64_t, const Heads&);
template void rotate_and_store(const Team&, const BFloat16*, const float*, const int64_t*, BFloat16*,
                               const Cached<Fp8>&, const Cached<Fp8>&, int64_t, const Heads&);
template void silu_mul(const Team&, const BFloat16*, BFloat16*, int64_t, int64_t);

// The same on tensors, as operators that return their results.
namespace {

at::Tensor add_rms_norm_op(at::Tensor x, const std::optional<at::Tensor>& branch, const at::Tensor& weight,
                           double eps) {
  auto result = at::empty_like(x);
  LLAMA2_DISPATCH(x.scalar_type(), "add_rms_norm", [&] {
    Team::run(x.numel() > kAlone, [&](const Team& team) {
      add_rms_norm(team, x.mutable_data_ptr<scalar_t>(), branch ? branch->const_data_ptr<scalar_t>() : nullptr,
                   weight.const_data_ptr<scalar_t>(), static_cast<float>(eps), result.mutable_data_ptr<scalar_t>(),
                   x.size(0), x.size(1));
    });
  });
  return result;
}

at::Tensor rotate_and_store_op(const at::Tensor& qkv, const at::Tensor& rope, const at::Tensor& slots, at::Tensor keys,
                               at::Tensor values, const std::optional<at::Tensor>& key_scales,
                               const std::optional<at::Tensor>& value_scales) {
  const int64_t tokens = qkv.size(0), kv_heads = keys.size(2), dim = keys.size(3);
  const Heads heads{qkv.size(1) / dim - 2 * kv_heads, kv_heads, dim};
  auto queries = at::empty({tokens, heads.heads, dim}, qkv.options());
  LLAMA2_DISPATCH(qkv.scalar_type(), "rotate_and_store", [&] {
    dispatch_cached<scalar_t>(keys.scalar_type(), [&](auto element) {
      const Cached<decltype(element)> own_keys(keys, key_scales), own_values(values, value_scales);
      Team::run(qkv.numel() > kAlone, [&](const Team& team) {
        rotate_and_store(team, qkv.const_data_ptr<scalar_t>(), rope.const_data_ptr<float>(),
                         slots.const_data_ptr<int64_t>(), queries.mutable_data_ptr<scalar_t>(), own_keys, own_values,
                         tokens, heads);
      });
    });
  });
  return queries;
}

at::Tensor silu_mul_op(const at::Tensor& gate_up) {
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  auto result = at::empty({rows, width}, gate_up.options());
  LLAMA2_DISPATCH(gate_up.scalar_type(), "silu_mul", [&] {
    Team::run(8 * result.numel() > kAlone, [&](const Team& team) {
      silu_mul(team, gate_up.const_data_ptr<scalar_t>(), result.mutable_data_ptr<scalar_t>(), rows, width);
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def("add_rms_norm(Tensor(a!) x, Tensor? branch, Tensor weight, float eps) -> Tensor");
  library.def(
      "rotate_and_store(Tensor qkv, Tensor rope, Tensor slots, Tensor(a!) keys, Tensor(b!) values, "
      "Tensor(c!)? key_scales=None, Tensor(d!)? value_scales=None) -> Tensor");
  library.def("silu_mul(Tensor gate_up) -> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) {
  library.impl("add_rms_norm", &add_rms_norm_op);
  library.impl("rotate_and_store", &rotate_and_store_op);
  library.impl("silu_mul", &silu_mul_op);
}

}  // namespace llama2
