// The operators, for those that are made of others. Each is described where it is defined.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace llama2 {

at::Tensor linear(const at::Tensor& x, const at::Tensor& w);

at::Tensor add_rms_norm(at::Tensor x, const std::optional<at::Tensor>& branch, const at::Tensor& weight, double eps);

at::Tensor rotate_and_store(const at::Tensor& qkv, const at::Tensor& rope, const at::Tensor& slots, at::Tensor keys,
                            at::Tensor values);

at::Tensor paged_attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& tables, const at::Tensor& starts, const at::Tensor& contexts);

at::Tensor silu_mul(const at::Tensor& gate_up);

void all_reduce(at::Tensor x, at::Tensor mapping, int64_t rank, int64_t world_size, int64_t slot_bytes,
                double patience);

}  // namespace llama2
