// Attention of a batch: where its parts lie, and what is known of them. Described in attention.cpp.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "team.h"

namespace llama2 {

// Queries are (T, H, D), caches (blocks, block size, K, D).
struct Heads {
  int64_t heads, kv_heads, dim;
};

// Rows [row, row + rows) of a sequence, of which the first sees `context` positions and each next one more; of them the
// heads [head, head + heads), which share a key head; and of their contexts the positions [begin, end).
struct Part {
  int64_t sequence, row, rows, context, head, heads, begin, end;

  int64_t queries() const { return rows * heads; }
};

// A query's highest score, and the sum of its weights relative to that.
struct Softmax {
  float highest = -std::numeric_limits<float>::infinity(), weights = 0.f;

  // The factor for what was summed so far, now that a score of `other` has been seen.
  float raise(float other) {
    const float before = highest;
    highest = std::max(highest, other);
    return before == highest ? 1.f : std::exp(before - highest);
  }
};

// The same for every layer: made once, then run with the layer's queries and caches.
class Attention {
 public:
  // tables (S, N), contexts (S) and starts (S + 1), int32: sequence s has the rows [starts[s], starts[s + 1]), sees
  // contexts[s] positions at the last of them and one less at each before, and finds them in the blocks of tables[s].
  Attention(const Heads& heads, int64_t block_size, const at::Tensor& tables, const at::Tensor& starts,
            const at::Tensor& contexts);

  bool is_worth_waking() const;

  // queries, result (T, H, D); keys, values (blocks, block size, K, D).
  template <typename T>
  void run(const Team& team, const T* queries, const T* keys, const T* values, T* result);

 private:
  // The rows and heads of a part. Its parts lie one after the other; heads innermost: key heads lie side by side, so
  // that a thread finds the cache lines of the next fetched already.
  struct Tile {
    Part first;
    int64_t part, count;
  };

  Heads heads_;
  int64_t block_size_, table_width_, scores_ = 0;
  const int32_t* tables_;
  std::vector<Tile> tiles_;
  std::vector<Part> parts_;
  std::vector<int64_t> place_{0};  // of each part's first query among all of them, and the end
  std::vector<Softmax> softmaxes_;
  at::Tensor outs_;  // (queries of all parts, D)
};

}  // namespace llama2
