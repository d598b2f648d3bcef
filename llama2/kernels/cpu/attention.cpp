// Owns attention over keys and values where they lie in the paged cache, for decoding and prefill alike.
//
// The context is cut into parts of a fixed length, each with a softmax of its own, and the parts are merged
// (FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The cuts depend on nothing else, and neither
// does the order of any sum: a row gets the same bits in whatever company and with however many threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>
#include <vector>

#include "kernels.h"
#include "lanes.h"

namespace llama2 {
namespace {

constexpr int64_t kPart = 256;    // positions with a softmax of their own
constexpr int64_t kRun = 32;      // positions whose scores are at hand at once
constexpr int64_t kAlone = 4096;  // scores that one thread has sooner than it has woken another
constexpr int64_t kQueries = 12;  // queries that share what is read of a key head; at most, where a group is not larger

// What the tasks of one call have in common. queries (T, H, D), caches (blocks, block size, K, D), tables (S, N).
template <typename T>
struct Problem {
  const T *queries, *keys, *values;
  const int32_t* tables;
  int64_t table_width, block_size, heads, kv_heads, head_dim;

  int64_t offset(int64_t sequence, int64_t position, int64_t kv_head) const {
    const int64_t block = tables[sequence * table_width + position / block_size];
    return ((block * block_size + position % block_size) * kv_heads + kv_head) * head_dim;
  }
  void prefetch(int64_t offset) const {
    for (int64_t d = 0; d < head_dim; d += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(keys + offset + d);
      __builtin_prefetch(values + offset + d);
    }
  }
};

// Rows [row, row + rows) of a sequence, of which the first sees `context` positions and each next one more; of them the
// heads [head, head + heads), which share a key head; and of their contexts the positions [begin, end).
struct Part {
  int64_t sequence, row, rows, context, head, heads, begin, end;

  int64_t queries() const { return rows * heads; }
  // How many positions from `first` on query q sees, at most `count`.
  int64_t visible(int64_t q, int64_t first, int64_t count) const {
    return std::clamp<int64_t>(context + q / heads - first, 0, count);
  }
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

// The unscaled scores of `count` positions for N queries: scores[n][p] = queries[n] · key[p].
template <int N, typename T>
inline void score(const T* const (&queries)[N], const T* keys, const int64_t* offsets, int64_t count, int64_t dim,
                  float (*scores)[kRun]) {
  using L = Lanes<T>;
  for (int64_t p = 0; p < count; p += 4) {
    const T* four[4];  // the last one again where fewer are left: what comes of it is not looked at
    for (int i = 0; i < 4; i++) four[i] = keys + offsets[std::min(p + i, count - 1)];
    typename L::Sum sums[N][4];
    for (auto& row : sums)
      for (auto& one : row) one = L::zero();
    dot(queries, four, dim, sums, [](const T*) {});
    for (int n = 0; n < N; n++) store4(scores[n] + p, L::totals(sums[n][0], sums[n][1], sums[n][2], sums[n][3]));
  }
}

// out[n] = out[n] * shrink[n] + the weighted sum of the values, for N queries; C registers of features at a time.
template <int N, int C, typename T, typename... Lanes>
inline void add_values(const float (*weights)[kRun], const float* shrink, const T* values, const int64_t* offsets,
                       int64_t count, int64_t dim, float* out, Lanes... lanes) {
  Floats totals[N][C];
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++) totals[n][c] = load(out + n * dim + c * kFloats, lanes...) * Floats(shrink[n]);
  for (int64_t p = 0; p < count; p++) {
    Floats value[C];
    for (int c = 0; c < C; c++) value[c] = load(values + offsets[p] + c * kFloats, lanes...);
    for (int n = 0; n < N; n++)
      for (int c = 0; c < C; c++) totals[n][c] = at::vec::fmadd(Floats(weights[n][p]), value[c], totals[n][c]);
  }
  for (int n = 0; n < N; n++)
    for (int c = 0; c < C; c++) store(out + n * dim + c * kFloats, totals[n][c], lanes...);
}

template <int N, typename T>
inline void add_values(const float (*weights)[kRun], const float* shrink, const T* values, const int64_t* offsets,
                       int64_t count, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + 2 * kFloats <= dim; d += 2 * kFloats)
    add_values<N, 2>(weights, shrink, values + d, offsets, count, dim, out + d);
  for (; d + kFloats <= dim; d += kFloats) add_values<N, 1>(weights, shrink, values + d, offsets, count, dim, out + d);
  if (d < dim) add_values<N, 1>(weights, shrink, values + d, offsets, count, dim, out + d, dim - d);
}

// Calls `step(first, N)` with N as a constant: fours, then what is left.
template <typename Step>
inline void by_four(int64_t size, const Step& step) {
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) step(i, std::integral_constant<int, 4>());
  switch (size - i) {
    case 3: step(i, std::integral_constant<int, 3>()); break;
    case 2: step(i, std::integral_constant<int, 2>()); break;
    case 1: step(i, std::integral_constant<int, 1>()); break;
  }
}

// Scores become weights, relative to the query's highest score so far; returns the factor for what was summed before.
inline float weigh(float* scores, int64_t visible, int64_t count, float scale, Softmax& softmax) {
  std::fill(scores + visible, scores + count, -std::numeric_limits<float>::infinity());
  if (visible == 0) {
    std::fill(scores, scores + count, 0.f);
    return 1.f;
  }
  for_lanes(count, [&](int64_t p, auto... lanes) { store(scores + p, load(scores + p, lanes...) * Floats(scale), lanes...); });
  const float shrink = softmax.raise(*std::max_element(scores, scores + visible));
  const Floats highest(softmax.highest);
  for_lanes(count, [&](int64_t p, auto... lanes) {
    store(scores + p, (load(scores + p, lanes...) - highest).exp_u20(), lanes...);
  });
  std::fill(scores + visible, scores + count, 0.f);
  softmax.weights = softmax.weights * shrink + std::accumulate(scores, scores + visible, 0.f);
  return shrink;
}

// out (queries, D) and softmax (queries) of one part.
template <typename T>
void attend(const Problem<T>& problem, const Part& part, float* out, Softmax* softmax) {
  const int64_t dim = problem.head_dim, kv_head = part.head / (problem.heads / problem.kv_heads);
  const float scale = 1.f / std::sqrt(static_cast<float>(dim));
  auto query = [&](int64_t q) {
    return problem.queries + ((part.row + q / part.heads) * problem.heads + part.head + q % part.heads) * dim;
  };
  int64_t offsets[kRun];
  float scores[kQueries][kRun], shrink[kQueries];
  std::fill(out, out + part.queries() * dim, 0.f);
  for (int64_t first = part.begin; first < part.end; first += kRun) {
    const int64_t count = std::min(kRun, part.end - first);
    for (int64_t p = 0; p < count; p++) offsets[p] = problem.offset(part.sequence, first + p, kv_head);
    // A head's rows lie apart from each other, which processors do not foresee: ask for those of the next run, or of the
    // next head's first one.
    const bool is_last = first + kRun >= part.end;
    if (const int64_t head = kv_head + is_last; head < problem.kv_heads) {
      const int64_t from = is_last ? part.begin : first + kRun;
      for (int64_t position = from; position < std::min(from + kRun, part.end); position++)
        problem.prefetch(problem.offset(part.sequence, position, head));
    }
    by_four(part.queries(), [&](int64_t q, auto n) {
      const T* queries[n];
      for (int i = 0; i < n; i++) queries[i] = query(q + i);
      score(queries, problem.keys, offsets, count, dim, scores + q);
    });
    for (int64_t q = 0; q < part.queries(); q++)
      shrink[q] = weigh(scores[q], part.visible(q, first, count), count, scale, softmax[q]);
    by_four(part.queries(), [&](int64_t q, auto n) {
      add_values<n>(scores + q, shrink + q, problem.values, offsets, count, dim, out + q * dim);
    });
  }
}

// Merges the `count` parts of one query into `to` (D); from one part to the next it is `stride` queries.
template <typename T>
void merge(const float* outs, const Softmax* softmaxes, int64_t count, int64_t stride, int64_t dim, T* to) {
  Softmax all;
  for (int64_t i = 0; i < count; i++) all.raise(softmaxes[i * stride].highest);
  for (int64_t i = 0; i < count; i++)
    all.weights += softmaxes[i * stride].weights * std::exp(softmaxes[i * stride].highest - all.highest);
  for_lanes(dim, [&](int64_t d, auto... lanes) {
    Floats total(0.f);
    for (int64_t i = 0; i < count; i++) {
      const Floats share(std::exp(softmaxes[i * stride].highest - all.highest) / all.weights);
      total = at::vec::fmadd(share, load(outs + i * stride * dim + d, lanes...), total);
    }
    store(to + d, total, lanes...);
  });
}

}  // namespace

// queries (T, H, D); keys, values (blocks, block size, K, D); tables (S, N), contexts (S) and starts (S + 1), int32:
// sequence s has the rows [starts[s], starts[s + 1]), sees contexts[s] positions at the last of them and one less at each
// before, and finds them in the blocks of tables[s]. Returns (T, H, D).
at::Tensor paged_attention(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                           const at::Tensor& tables, const at::Tensor& starts, const at::Tensor& contexts) {
  TORCH_CHECK(queries.is_contiguous() && keys.is_contiguous() && values.is_contiguous() && tables.is_contiguous(),
              "paged_attention takes contiguous tensors");
  const int64_t heads = queries.size(1), dim = queries.size(2), kv_heads = keys.size(2), group = heads / kv_heads;
  const auto* start = starts.const_data_ptr<int32_t>();
  const auto* context = contexts.const_data_ptr<int32_t>();

  // A tile is the rows and heads of a part. Its parts lie one after the other; heads innermost: key heads lie side by
  // side, so that a thread finds the cache lines of the next fetched already.
  struct Tile {
    Part first;
    int64_t part, count;
  };
  std::vector<Tile> tiles;
  std::vector<Part> parts;
  std::vector<int64_t> place{0};  // of each part's first query among all of them, and the end
  int64_t scores = 0;
  for (int64_t sequence = 0; sequence < contexts.size(0); sequence++) {
    const int64_t rows = start[sequence + 1] - start[sequence];
    const int64_t heads_at_once = std::min(group, kQueries), rows_at_once = std::max<int64_t>(1, kQueries / group);
    for (int64_t row = 0; row < rows; row += rows_at_once) {
      const int64_t some = std::min(rows_at_once, rows - row), seen = context[sequence] - rows + row + 1;
      const int64_t last = seen + some - 1, cuts = ceil_div(last, kPart), slices = kv_heads * ceil_div(group, heads_at_once);
      const int64_t first_part = parts.size();
      for (int64_t begin = 0; begin < last; begin += kPart)
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++)
          for (int64_t head = 0; head < group; head += heads_at_once) {
            parts.push_back({sequence, start[sequence] + row, some, seen, kv_head * group + head,
                             std::min(heads_at_once, group - head), begin, std::min(begin + kPart, last)});
            place.push_back(place.back() + parts.back().queries());
            scores += parts.back().queries() * (parts.back().end - begin);
          }
      for (int64_t slice = 0; slice < slices; slice++)
        tiles.push_back({parts[first_part + slice], first_part + slice, cuts});
    }
  }
  auto outs = at::empty({place.back(), dim}, queries.options().dtype(at::kFloat));
  auto* out = outs.mutable_data_ptr<float>();
  std::vector<Softmax> softmaxes(place.back());
  auto result = at::empty_like(queries);
  LLAMA2_DISPATCH(queries.scalar_type(), "paged_attention", [&] {
    const Problem<scalar_t> problem{
        queries.const_data_ptr<scalar_t>(), keys.const_data_ptr<scalar_t>(), values.const_data_ptr<scalar_t>(),
        tables.const_data_ptr<int32_t>(), tables.size(1), keys.size(1), heads, kv_heads, dim};
    at::parallel_for(0, parts.size(), scores < kAlone ? parts.size() : 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) attend(problem, parts[i], out + place[i] * dim, &softmaxes[place[i]]);
    });
    auto* to = result.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, tiles.size(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const auto& [part, first, count] = tiles[i];
        // Every cut of a tile has the same slices: the next one's queries are as far as those of all slices together.
        const int64_t stride = part.rows * heads;
        for (int64_t q = 0; q < part.queries(); q++)
          merge(out + (place[first] + q) * dim, &softmaxes[place[first] + q], count, stride, dim,
                to + ((part.row + q / part.heads) * heads + part.head + q % part.heads) * dim);
      }
    });
  });
  return result;
}

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def(
      "paged_attention(Tensor queries, Tensor keys, Tensor values, Tensor tables, Tensor starts, Tensor contexts) "
      "-> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("paged_attention", &paged_attention); }

}  // namespace llama2
