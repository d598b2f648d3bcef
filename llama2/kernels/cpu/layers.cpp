// Owns all layers of the model for a few rows: the steps that Layer in llama2/model.py names, one after the other,
// without Python in between and with one parallel region. That saves a tenth of a small model's step.
#include <torch/library.h>

#include <functional>
#include <limits>

#include "kernels.h"
#include "lora.h"

namespace llama2 {
namespace {

using at::BFloat16;

struct Layer {
  at::Tensor attention_norm, ffn_norm;
  c10::intrusive_ptr<Linear> wqkv, wo, w13, w2;
};

// Built once, from the weights in the layout of their products.
struct Layers : torch::CustomClassHolder {
  std::vector<Layer> all;
  float eps;
  std::function<void(const at::Tensor&)> sum_over_ranks;  // none in a group of one

  int64_t max_rows() const {
    int64_t most = std::numeric_limits<int64_t>::max();
    for (const auto& layer : all)
      for (const auto& linear : {layer.wqkv, layer.wo, layer.w13, layer.w2}) most = std::min(most, linear->max_rows);
    return most;
  }
};

// norms has attention_norm and ffn_norm of every layer, linears wqkv, wo, w13 and w2. With a mapping, all_reduce sums
// every branch over the ranks.
c10::intrusive_ptr<Layers> make_layers(const std::vector<at::Tensor>& norms,
                                       const std::vector<c10::intrusive_ptr<Linear>>& linears, double eps,
                                       const std::optional<at::Tensor>& mapping, int64_t rank, int64_t world_size,
                                       int64_t slot_bytes, double patience) {
  TORCH_CHECK(!norms.empty() && 2 * norms.size() == linears.size(), "layers take 2 norms and 4 linears each");
  auto layers = c10::make_intrusive<Layers>();
  layers->eps = static_cast<float>(eps);
  if (mapping)
    layers->sum_over_ranks = [=](const at::Tensor& x) {
      all_reduce(x, *mapping, rank, world_size, slot_bytes, patience);
    };
  for (size_t i = 0; i < norms.size() / 2; i++) {
    const auto* own = &linears[4 * i];
    const auto& [attention_norm, ffn_norm, wqkv, wo, w13, w2] =
        layers->all.emplace_back(Layer{norms[2 * i], norms[2 * i + 1], own[0], own[1], own[2], own[3]});
    for (const auto& norm : {attention_norm, ffn_norm})
      TORCH_CHECK(norm.scalar_type() == at::kBFloat16 && norm.numel() == wqkv->inputs && norm.is_contiguous(),
                  "layers take bf16 norms as wide as their rows");
    TORCH_CHECK(wo->outputs == wqkv->inputs && w13->inputs == wqkv->inputs && w2->outputs == wqkv->inputs &&
                    w13->outputs == 2 * w2->inputs,
                "layers: shapes do not fit");
  }
  return layers;
}

// Of every layer. Without scales where these are values of the model's type.
template <typename C>
std::vector<Cached<C>> caches(const std::vector<at::Tensor>& values, const std::vector<at::Tensor>& scales) {
  TORCH_CHECK(scales.empty() || scales.size() == values.size(), "layers take scales of each, or none");
  std::vector<Cached<C>> all;
  for (size_t i = 0; i < values.size(); i++)
    all.emplace_back(values[i], scales.empty() ? std::nullopt : std::optional(scales[i]));
  return all;
}

// lora has a product for each of the layers'.
void check_fits(const Layers& layers, const Lora& lora) {
  TORCH_CHECK(lora.products.size() == 4 * layers.all.size(), "layers take adapters for each product");
  auto each = lora.products.begin();
  for (const auto& layer : layers.all)
    for (const auto& linear : {layer.wqkv, layer.wo, layer.w13, layer.w2}) {
      TORCH_CHECK(each->inputs() == linear->inputs && each->all_outputs() == linear->outputs &&
                      each->a.scalar_type() == at::kBFloat16,
                  "layers: the adapters' shapes do not fit");
      each++;
    }
}

// Adds every branch but the last to x (T, C); returns the last (T, C), which the next norm adds. keys and values, and
// their scales if they have any, are one cache per layer. lora, with the slot of each row's adapter, is added to the
// products.
at::Tensor run_layers(const c10::intrusive_ptr<Layers>& layers, at::Tensor x, const at::Tensor& rope,
                      const at::Tensor& slots, const std::vector<at::Tensor>& keys,
                      const std::vector<at::Tensor>& values, const at::Tensor& tables, const at::Tensor& starts,
                      const at::Tensor& contexts, const std::vector<at::Tensor>& key_scales,
                      const std::vector<at::Tensor>& value_scales, const std::optional<c10::intrusive_ptr<Lora>>& lora,
                      const std::optional<at::Tensor>& lora_slots) {
  const auto& first = layers->all[0];
  TORCH_CHECK(keys.size() == layers->all.size() && values.size() == keys.size(), "layers take keys and values of each");
  const Heads heads{first.wo->inputs / keys[0].size(3), keys[0].size(2), keys[0].size(3)};
  const int64_t rows = x.size(0), dim = first.wqkv->inputs, qkv_dim = first.wqkv->outputs;
  const int64_t attended_dim = first.wo->inputs, hidden = first.w2->inputs;
  TORCH_CHECK(qkv_dim == (heads.heads + 2 * heads.kv_heads) * heads.dim, "layers: the cache has other heads");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous() && x.size(1) == dim,
              "layers take contiguous bf16 rows of ", dim);

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
  std::optional<LoraRows> adapted;  // none if no row has an adapter
  if (lora) {
    check_fits(*layers, **lora);
    TORCH_CHECK(lora_slots && lora_slots->numel() == rows, "layers take a slot for each row");
    adapted.emplace(*lora_slots, (*lora)->products);
    if (adapted->empty()) adapted.reset();
  }
  Attention attention(heads, keys[0].size(1), tables, starts, contexts);
  dispatch_cached<BFloat16>(keys[0].scalar_type(), [&](auto element) {
    const auto all_keys = caches<decltype(element)>(keys, key_scales);
    const auto all_values = caches<decltype(element)>(values, value_scales);
    Team::run(true, [&](const Team& team) {
      auto sum_over_ranks = [&] {
        if (layers->sum_over_ranks) team.alone([&] { layers->sum_over_ranks(result); });
      };
      const LoraProduct* next_lora = adapted ? (*lora)->products.data() : nullptr;
      auto product = [&](const Linear& linear, const BFloat16* from, BFloat16* to) {
        if (adapted) adapted->shrink(team, *next_lora, from);
        linear.run(team, from, to, rows, linear.outputs);
        if (adapted) adapted->expand(team, *next_lora++, to);
      };
      for (size_t i = 0; i < all_keys.size(); i++) {
        const auto& layer = layers->all[i];
        add_rms_norm(team, stream, i == 0 ? nullptr : branch, layer.attention_norm.const_data_ptr<BFloat16>(),
                     layers->eps, normed, rows, dim);
        product(*layer.wqkv, normed, qkv);
        rotate_and_store(team, qkv, turns, places, queries, all_keys[i], all_values[i], rows, heads);
        attention.run(team, queries, all_keys[i], all_values[i], attended);
        product(*layer.wo, attended, branch);
        sum_over_ranks();
        add_rms_norm(team, stream, branch, layer.ffn_norm.const_data_ptr<BFloat16>(), layers->eps, normed, rows, dim);
        product(*layer.w13, normed, gate_up);
        silu_mul(team, gate_up, gated, rows, hidden);
        product(*layer.w2, gated, branch);
        sum_over_ranks();
      }
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  define_linear(library);
  define_lora(library);
  library.class_<Layers>("Layers").def("max_rows", &Layers::max_rows).def("run", &run_layers);
  library.def("make_layers", &make_layers);
}

}  // namespace llama2
