// What adapters (LoRA) add to the products of a batch: their memory, and which rows have which. Described in lora.cpp.
#pragma once

#include <ATen/ATen.h>
#include <torch/custom_class.h>

#include <vector>

#include "team.h"

namespace llama2 {

// One product, as LoraProduct in llama2/adapters/products.py describes it.
struct LoraProduct {
  const at::Tensor a, b, ranks, scales;
  const std::vector<int64_t> outputs;  // of each part

  LoraProduct(const at::Tensor& a, const at::Tensor& b, const at::Tensor& ranks, const at::Tensor& scales,
              std::vector<int64_t> outputs);

  int64_t slots() const { return a.size(0); }
  int64_t parts() const { return a.size(1); }
  int64_t max_rank() const { return a.size(2); }
  int64_t inputs() const { return a.size(3); }
  int64_t all_outputs() const { return b.size(2); }
};

// Those of all layers, in the order in which a layer makes its products. Built once.
struct Lora : torch::CustomClassHolder {
  std::vector<LoraProduct> products;
};

// The rows of a batch that have adapters. The same for every product: built once per batch, then run with each.
class LoraRows {
 public:
  // slots (T), int32, is -1 for rows that have none.
  LoraRows(const at::Tensor& slots, const std::vector<LoraProduct>& products);

  bool empty() const { return tiles_.empty(); }

  // Before a product that reads x (T, inputs) and ends with a barrier.
  template <typename T>
  void shrink(const Team& team, const LoraProduct& product, const T* x);

  // After it: adds to its y (T, outputs).
  template <typename T>
  void expand(const Team& team, const LoraProduct& product, T* y) const;

 private:
  static constexpr int kRows = 4;

  // Rows of one slot, which share each of its values that they load.
  struct Tile {
    int64_t slot;
    int count;
    int64_t rows[kRows];
  };

  // `count` ranks or outputs of a part from `first` on, for the rows of a tile.
  struct Piece {
    int64_t tile, part, first, count, rank;
  };

  // What there is to do for a product: of each part `step` ranks or, with `by_outputs`, outputs at once.
  std::vector<Piece> pieces(const LoraProduct& product, bool by_outputs, int64_t step) const;

  std::vector<Tile> tiles_;
  std::vector<float> shrunk_;  // (tiles, kRows, parts, max rank), with room for the largest product
};

// Must come before any operator that takes a Lora.
void define_lora(torch::Library& library);

}  // namespace llama2
