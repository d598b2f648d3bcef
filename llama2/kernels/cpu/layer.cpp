// Owns a whole layer for a few rows: the steps that TransformerBlock in llama2/model.py names, one after the other,
// without Python in between. Of a small model's step that is a tenth.
#include <torch/library.h>

#include "kernels.h"

namespace llama2 {
namespace {

// x (T, C) takes up the branch before and attention's; returns the feed-forward's branch (T, C), which the next norm adds.
// With a mapping both branches are summed over the ranks, as all_reduce does.
at::Tensor layer(at::Tensor x, const std::optional<at::Tensor>& branch, const at::Tensor& attention_norm,
                 const at::Tensor& wqkv, const at::Tensor& wo, const at::Tensor& ffn_norm, const at::Tensor& w13,
                 const at::Tensor& w2, double eps, const at::Tensor& rope, const at::Tensor& slots, at::Tensor keys,
                 at::Tensor values, const at::Tensor& tables, const at::Tensor& starts, const at::Tensor& contexts,
                 const std::optional<at::Tensor>& mapping, int64_t rank, int64_t world_size, int64_t slot_bytes,
                 double patience) {
  auto over_ranks = [&](at::Tensor partial) {
    if (mapping) all_reduce(partial, *mapping, rank, world_size, slot_bytes, patience);
    return partial;
  };
  const auto qkv = llama2::linear(add_rms_norm(x, branch, attention_norm, eps), wqkv);
  const auto queries = rotate_and_store(qkv, rope, slots, keys, values);
  const auto attended = paged_attention(queries, keys, values, tables, starts, contexts).flatten(1);
  const auto normed = add_rms_norm(x, over_ranks(llama2::linear(attended, wo)), ffn_norm, eps);
  return over_ranks(llama2::linear(silu_mul(llama2::linear(normed, w13)), w2));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def(
      "layer(Tensor(a!) x, Tensor? branch, Tensor attention_norm, Tensor wqkv, Tensor wo, Tensor ffn_norm, Tensor w13, "
      "Tensor w2, float eps, Tensor rope, Tensor slots, Tensor(b!) keys, Tensor(c!) values, Tensor tables, "
      "Tensor starts, Tensor contexts, Tensor(d!)? mapping, int rank, int world_size, int slot_bytes, float patience) "
      "-> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("layer", &layer); }

}  // namespace llama2
