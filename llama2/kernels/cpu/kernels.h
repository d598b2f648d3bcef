// The steps that a team shares, for the operator made of them. Each is described at its definition.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/BFloat16.h>
#include <torch/custom_class.h>

#include "attention.h"
#include "team.h"

// Weights are packed where bf16 products are vector instructions. Where they are matrix instructions (AMX), oneDNN is
// several times faster at many rows, and does not take this layout; without either, packing is not known to help.
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define LLAMA2_PACKS_WEIGHTS
#endif

namespace llama2 {

// The weight of a linear layer, laid out for its product. Another format or layout is another subclass.
struct Linear : torch::CustomClassHolder {
  const int64_t inputs, outputs, max_rows;  // beyond max_rows, `many_rows` computes the product

  Linear(int64_t inputs, int64_t outputs, int64_t max_rows) : inputs(inputs), outputs(outputs), max_rows(max_rows) {}

  // y (rows, outputs) becomes x (rows, inputs) times the weight, transposed, summed in fp32; `stride` is the distance
  // between rows of y. A row's result has the same bits in any batch.
  virtual void run(const Team& team, const at::BFloat16* x, at::BFloat16* y, int64_t rows, int64_t stride) const = 0;

  // The same by PyTorch, outside of a team.
  virtual at::Tensor many_rows(const at::Tensor& x) const = 0;
};

// Must come before any operator that takes a Linear.
void define_linear(torch::Library& library);
void define_quantized_linear(torch::Library& library);

#ifdef LLAMA2_PACKS_WEIGHTS
// Lays out a weight (outputs, inputs) as `linear` reads it, in the same memory.
void pack(at::BFloat16* w, int64_t outputs, int64_t inputs);
#endif

// x (rows, inputs), w (outputs, inputs), packed if need be; y (rows, outputs), whose rows are `stride` apart, becomes
// x wᵀ, summed in fp32. A row's result has the same bits in any batch.
void linear(const Team& team, const at::BFloat16* x, const at::BFloat16* w, at::BFloat16* y, int64_t rows,
            int64_t inputs, int64_t outputs, int64_t stride);

template <typename T>
void add_rms_norm(const Team& team, T* x, const T* branch, const T* weight, float eps, T* result, int64_t rows,
                  int64_t dim);

template <typename T, typename C>
void rotate_and_store(const Team& team, const T* qkv, const float* rope, const int64_t* slots, T* queries,
                      const Cached<C>& keys, const Cached<C>& values, int64_t tokens, const Heads& heads);

template <typename T>
void silu_mul(const Team& team, const T* gate_up, T* result, int64_t rows, int64_t width);

void all_reduce(at::Tensor x, at::Tensor mapping, int64_t rank, int64_t world_size, int64_t slot_bytes,
                double patience);

}  // namespace llama2
