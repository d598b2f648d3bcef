// Owns all layers of the model for a few rows: the steps that TransformerBlock in llama2/model.py names, one after the
// other, without Python in between and by threads that come together once. Of a small model's step that is a tenth.
#include <torch/library.h>

#include "kernels.h"

namespace llama2 {
namespace {

using at::BFloat16;

struct Layer {
  const BFloat16 *attention_norm, *wqkv, *wo, *ffn_norm, *w13, *w2;
  BFloat16 *keys, *values;
};

const BFloat16* weight_of(const at::Tensor& weight, at::IntArrayRef shape) {
  TORCH_CHECK(weight.sizes() == shape && weight.is_contiguous(), "layers: a weight is not (", shape, ")");
  return weight.const_data_ptr<BFloat16>();
}

// x (T, C) takes up every branch but the last; returns that (T, C), which the next norm adds. weights are those of all
// layers: attention_norm, wqkv, wo, ffn_norm, w13, w2. keys and values hold a layer's cache each. With a mapping every
// branch is summed over the ranks, as all_reduce does.
at::Tensor layers(at::Tensor x, at::TensorList weights, double eps, const at::Tensor& rope, const at::Tensor& slots,
                  at::TensorList keys, at::TensorList values, const at::Tensor& tables, const at::Tensor& starts,
                  const at::Tensor& contexts, const std::optional<at::Tensor>& mapping, int64_t rank,
                  int64_t world_size, int64_t slot_bytes, double patience) {
  TORCH_CHECK(!keys.empty() && values.size() == keys.size() && weights.size() == 6 * keys.size(),
              "layers takes keys, values and 6 weights of each");
  const Heads heads{weights[2].size(1) / keys[0].size(3), keys[0].size(2), keys[0].size(3)};
  const int64_t rows = x.size(0), dim = x.size(1), attended_dim = heads.heads * heads.dim;
  const int64_t qkv_dim = (heads.heads + 2 * heads.kv_heads) * heads.dim, hidden = weights[5].size(1);
  std::vector<Layer> all;
  for (size_t i = 0; i < keys.size(); i++) {
    TORCH_CHECK(keys[i].is_contiguous() && values[i].is_contiguous(), "layers takes contiguous caches");
    const auto* of = &weights[6 * i];
    all.push_back({weight_of(of[0], {dim}), weight_of(of[1], {qkv_dim, dim}), weight_of(of[2], {dim, attended_dim}),
                   weight_of(of[3], {dim}), weight_of(of[4], {2 * hidden, dim}), weight_of(of[5], {dim, hidden}),
                   keys[i].mutable_data_ptr<BFloat16>(), values[i].mutable_data_ptr<BFloat16>()});
  }

  std::vector<at::Tensor> rooms;
  auto room = [&](int64_t width) {
    return rooms.emplace_back(at::empty({rows, width}, x.options())).mutable_data_ptr<BFloat16>();
  };
  auto *normed = room(dim), *qkv = room(qkv_dim), *queries = room(attended_dim), *attended = room(attended_dim);
  auto *gate_up = room(2 * hidden), *gated = room(hidden), *branch = room(dim);
  const auto result = rooms.back();
  auto* stream = x.mutable_data_ptr<BFloat16>();
  const auto* turns = rope.const_data_ptr<float>();
  const auto* places = slots.const_data_ptr<int64_t>();
  Attention attention(heads, keys[0].size(1), tables, starts, contexts);
  Team::run(true, [&](const Team& team) {
    auto sum_over_ranks = [&] {
      if (mapping) team.alone([&] { all_reduce(result, *mapping, rank, world_size, slot_bytes, patience); });
    };
    for (const auto& layer : all) {
      const auto* before = &layer == &all.front() ? nullptr : branch;
      add_rms_norm(team, stream, before, layer.attention_norm, eps, normed, rows, dim);
      linear(team, normed, layer.wqkv, qkv, rows, dim, qkv_dim);
      rotate_and_store(team, qkv, turns, places, queries, layer.keys, layer.values, rows, heads);
      attention.run(team, queries, layer.keys, layer.values, attended);
      linear(team, attended, layer.wo, branch, rows, attended_dim, dim);
      sum_over_ranks();
      add_rms_norm(team, stream, branch, layer.ffn_norm, eps, normed, rows, dim);
      linear(team, normed, layer.w13, gate_up, rows, dim, 2 * hidden);
      silu_mul(team, gate_up, gated, rows, hidden);
      linear(team, gated, layer.w2, branch, rows, hidden, dim);
      sum_over_ranks();
    }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def(
      "layers(Tensor(a!) x, Tensor[] weights, float eps, Tensor rope, Tensor slots, Tensor(b!)[] keys, "
      "Tensor(c!)[] values, Tensor tables, Tensor starts, Tensor contexts, Tensor(d!)? mapping, int rank, "
      "int world_size, int slot_bytes, float patience) -> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("layers", &layers); }

}  // namespace llama2
