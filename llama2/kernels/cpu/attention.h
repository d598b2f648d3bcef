// Attention of a batch: its parts and their state. Described in attention.cpp.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cached.h"
#include "team.h"

namespace llama2 {

// Queries are (T, H, D), caches (blocks, block size, K, D).
struct Heads {
  int64_t heads, kv_heads, dim;
};

// Rows [row, row + rows) of a sequence, of which the first sees `context` positions and each next row one more; their
// heads [head, head + heads), which share a key head; and the positions [begin, end) of their contexts.
struct Part {
  int64_t sequence, row, rows, context, head, heads, begin, end;

  int64_t queries() const { return rows * heads; }
};

// A query's highest score, and the sum of its weights relative to that.
struct Softmax {
  float highest = -std::numeric_limits<float>::infinity(), weights = 0.f;

  // Takes in a score of `other`; returns the factor for what was summed so far.
  float raise(float other) {
    const float before = highest;
    highest = std::max(highest, other);
    return before == highest ? 1.f : std::exp(before - highest);
  }
};

// The same for every layer: built once per batch, then run with each layer's queries and caches.
class Attention {
 public:
  // tables (S, N), contexts (S) and starts (S + 1), int32: sequence s has the rows [starts[s], starts[s + 1]), sees
  // contexts[s] positions at the last of them and one less at each before, and finds them in the blocks of tables[s].
  Attention(const Heads& heads, int64_t block_size, const at::Tensor& tables, const at::Tensor& starts,
            const at::Tensor& contexts);

  bool is_worth_waking() const;

  // queries, result (T, H, D).
  template <typename T, typename C>
  void run(const Team& team, const T* queries, const Cached<C>& keys, const Cached<C>& values, T* result);

 private:
  // The rows and heads of a part, over the whole context. Heads are innermost in the order of parts: key heads are
  // adjacent in memory, so that a thread finds the next one's cache lines already fetched.
  struct Tile {
    Part first;
    int64_t part, count;
  };

  Heads heads_;
  int64_t block_size_, table_width_, scores_ = 0;
  const int32_t* tables_;
  std::vector<Tile> tiles_;
  std::vector<Part> parts_;
  std::vector<int64_t> place_{0};  // index of each part's first query among all queries, and the end
  std::vector<Softmax> softmaxes_;
  at::Tensor outs_;  // (queries of all parts, D)
};

}  // namespace llama2
