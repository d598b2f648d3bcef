// Owns all layers of the model for a few rows: the steps that TransformerBlock in llama2/model.py names, one after the
// other, without Python in between. Of a small model's step that is a tenth.
#include <torch/library.h>

#include "kernels.h"

namespace llama2 {
namespace {

constexpr int64_t kWeights = 6;  // of a layer

// x (T, C) takes up every branch but the last; returns that (T, C), which the next norm adds. weights are those of all
// layers: attention_norm, wqkv, wo, ffn_norm, w13, w2. keys and values hold a layer's cache each. With a mapping every
// branch is summed over the ranks, as all_reduce does.
at::Tensor layers(at::Tensor x, at::TensorList weights, double eps, const at::Tensor& rope, const at::Tensor& slots,
                  at::TensorList keys, at::TensorList values, const at::Tensor& tables, const at::Tensor& starts,
                  const at::Tensor& contexts, const std::optional<at::Tensor>& mapping, int64_t rank,
                  int64_t world_size, int64_t slot_bytes, double patience) {
  auto over_ranks = [&](at::Tensor partial) {
    if (mapping) all_reduce(partial, *mapping, rank, world_size, slot_bytes, patience);
    return partial;
  };
  const int64_t count = keys.size();
  TORCH_CHECK(count > 0 && values.size() == keys.size() && static_cast<int64_t>(weights.size()) == count * kWeights,
              "layers takes keys, values and ", kWeights, " weights of each");
  std::optional<at::Tensor> branch;
  for (int64_t layer = 0; layer < count; layer++) {
    const auto* weight = &weights[layer * kWeights];
    const auto &attention_norm = weight[0], &wqkv = weight[1], &wo = weight[2];
    const auto &ffn_norm = weight[3], &w13 = weight[4], &w2 = weight[5];
    const auto qkv = llama2::linear(add_rms_norm(x, branch, attention_norm, eps), wqkv);
    const auto queries = rotate_and_store(qkv, rope, slots, keys[layer], values[layer]);
    const auto attended = paged_attention(queries, keys[layer], values[layer], tables, starts, contexts).flatten(1);
    const auto normed = add_rms_norm(x, over_ranks(llama2::linear(attended, wo)), ffn_norm, eps);
    branch = over_ranks(llama2::linear(silu_mul(llama2::linear(normed, w13)), w2));
  }
  return *branch;
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
