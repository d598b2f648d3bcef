// Owns attention over keys and values where they lie in the paged cache, for decoding and prefill alike.
//
// The context is cut into parts of a fixed length, each with a softmax of its own, and the parts are merged
// (FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The cuts depend on nothing else, and
// neither does the order of any sum: a row gets the same bits in any batch and with any number of threads.
#include <torch/library.h>

#include "attention.h"
#include "lanes.h"

namespace llama2 {
namespace {

constexpr int64_t kPart = 256;    // positions with a softmax of their own
constexpr int64_t kRun = 32;      // positions whose scores are computed together: whole registers
constexpr int64_t kAlone = 4096;  // up to this many scores, one thread is faster than waking another
constexpr int64_t kQueries = 12;  // at most this many queries share the reads of a key head

// The positions whose scores are computed together: the places of their scales, and of their keys and values.
struct Run {
  int64_t count, rows[kRun], offsets[kRun];
};

// What the tasks of one call have in common. queries (T, H, D), tables (S, N).
template <typename T, typename C>
struct Problem {
  static constexpr bool kHasScales = !std::is_same_v<T, C>;

  const T* queries;
  const Cached<C>&keys, &values;
  const int32_t* tables;
  int64_t table_width, block_size, heads, kv_heads, head_dim;

  // The `count` positions of a sequence from `first` on.
  void locate(int64_t sequence, int64_t first, int64_t count, int64_t kv_head, Run& run) const {
    run.count = count;
    const auto* block = tables + sequence * table_width + first / block_size;
    int64_t slot = first % block_size;
    for (int64_t p = 0; p < count; p++) {
      run.rows[p] = (*block * block_size + slot) * kv_heads + kv_head;
      run.offsets[p] = run.rows[p] * head_dim;
      if (++slot == block_size) {
        slot = 0;
        block++;
      }
    }
  }
  // The positions [begin, end) of a run, as many of them as there are. Only inlined: GCC takes a function that does
  // nothing else for one without effect.
  C10_ALWAYS_INLINE void prefetch(const Run& run, int64_t begin, int64_t end) const {
    for (int64_t p = begin; p < std::min(end, run.count); p++) {
      for (int64_t d = 0; d < head_dim; d += 64 / static_cast<int64_t>(sizeof(C))) {
        __builtin_prefetch(keys.values + run.offsets[p] + d);
        __builtin_prefetch(values.values + run.offsets[p] + d);
      }
      if constexpr (kHasScales) {
        __builtin_prefetch(keys.scales + run.rows[p]);
        __builtin_prefetch(values.scales + run.rows[p]);
      }
    }
  }
};

// The unscaled scores of four keys for N queries: scores[n][p] = queries[n] · keys[p].
template <int N, typename T, typename C>
C10_ALWAYS_INLINE void score(const T* const (&queries)[N], const C* const (&keys)[4], int64_t dim,
                             float (*scores)[kRun], int64_t p) {
  using L = Lanes<T>;
  typename L::Sum sums[N][4];
  for (auto& row : sums)
    for (auto& one : row) one = L::zero();
  dot(queries, keys, dim, sums, [] {});
  for (int n = 0; n < N; n++) store4(scores[n] + p, L::totals(sums[n][0], sums[n][1], sums[n][2], sums[n][3]));
}

// out[n] = out[n] * shrink[n] + the weighted sum of the values, for N queries and R registers of features.
template <int N, int R, typename C, typename... Lanes>
C10_ALWAYS_INLINE void add_values(const float (*weights)[kRun], const float* shrink, const C* values,
                                  const int64_t* offsets, int64_t count, int64_t dim, float* out, Lanes... lanes) {
  Floats totals[N][R];
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) totals[n][r] = load(out + n * dim + r * kFloats, lanes...) * Floats(shrink[n]);
  for (int64_t p = 0; p < count; p++) {
    Floats value[R];
    for (int r = 0; r < R; r++) value[r] = load(values + offsets[p] + r * kFloats, lanes...);
    for (int n = 0; n < N; n++)
      for (int r = 0; r < R; r++) totals[n][r] = at::vec::fmadd(Floats(weights[n][p]), value[r], totals[n][r]);
  }
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) store(out + n * dim + r * kFloats, totals[n][r], lanes...);
}

template <int N, typename C>
C10_ALWAYS_INLINE void add_values(const float (*weights)[kRun], const float* shrink, const C* values,
                                  const int64_t* offsets, int64_t count, int64_t dim, float* out) {
  int64_t d = 0;
  for (; d + 2 * kFloats <= dim; d += 2 * kFloats)
    add_values<N, 2>(weights, shrink, values + d, offsets, count, dim, out + d);
  for (; d + kFloats <= dim; d += kFloats) add_values<N, 1>(weights, shrink, values + d, offsets, count, dim, out + d);
  if (d < dim) add_values<N, 1>(weights, shrink, values + d, offsets, count, dim, out + d, dim - d);
}

// Calls `step(first, N)` with N as a constant: fours, then the remainder.
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

// The kRun scores, of which a query sees the first `visible`, become weights relative to its highest score so far;
// returns the factor for what was summed before.
C10_ALWAYS_INLINE float weigh(float* scores, int64_t visible, float scale, Softmax& softmax) {
  if (visible == 0) {
    std::fill_n(scores, kRun, 0.f);
    return 1.f;
  }
  std::fill(scores + visible, scores + kRun, -std::numeric_limits<float>::infinity());
  Floats highest(-std::numeric_limits<float>::infinity());
  for (int64_t p = 0; p < kRun; p += kFloats) {
    const auto scaled = load(scores + p) * Floats(scale);
    store(scores + p, scaled);
    highest = at::vec::maximum(highest, scaled);
  }
  const float shrink = softmax.raise(
      at::vec::vec_reduce_all<float>([](const Floats& a, const Floats& b) { return at::vec::maximum(a, b); }, highest));
  for (int64_t p = 0; p < kRun; p += kFloats) store(scores + p, (load(scores + p) - Floats(softmax.highest)).exp_u20());
  std::fill(scores + visible, scores + kRun, 0.f);
  Floats weights(0.f);
  for (int64_t p = 0; p < kRun; p += kFloats) weights = weights + load(scores + p);
  softmax.weights = softmax.weights * shrink + sum(weights);
  return shrink;
}

// The scales of a run, 0 where it has no position.
inline void gather(const float* scales, const Run& run, float* to) {
  for (int64_t p = 0; p < run.count; p++) to[p] = scales[run.rows[p]];
  std::fill(to + run.count, to + kRun, 0.f);
}

inline void multiply(float* scores, const float* scales) {
  for (int64_t p = 0; p < kRun; p++) scores[p] *= scales[p];
}

// out (queries, D) and softmax (queries) of `part`, after which the same thread attends to `next`, if there is one.
template <typename T, typename C>
void attend(const Problem<T, C>& problem, const Part& part, const Part* next, float* out, Softmax* softmax) {
  const int64_t dim = problem.head_dim, group = problem.heads / problem.kv_heads;
  const float scale = 1.f / std::sqrt(static_cast<float>(dim));
  const T* rows[kQueries];
  int64_t contexts[kQueries];
  for (int64_t q = 0; q < part.queries(); q++) {
    const int64_t row = q / part.heads;
    rows[q] = problem.queries + ((part.row + row) * problem.heads + part.head + q % part.heads) * dim;
    contexts[q] = part.context + row;
  }
  auto find = [&](const Part& of, int64_t first, Run& run) {
    problem.locate(of.sequence, first, std::min(kRun, of.end - first), of.head / group, run);
  };
  constexpr bool kHasScales = Problem<T, C>::kHasScales;
  Run runs[2], *run = &runs[0], *ahead = &runs[1];
  float scores[kQueries][kRun], shrink[kQueries];
  [[maybe_unused]] float key_scales[kRun], value_scales[kRun];
  std::fill(out, out + part.queries() * dim, 0.f);
  std::fill(softmax, softmax + part.queries(), Softmax());
  find(part, part.begin, *run);
  for (int64_t first = part.begin; first < part.end; first += kRun, std::swap(run, ahead)) {
    if (first + kRun < part.end)
      find(part, first + kRun, *ahead);
    else if (next)
      find(*next, next->begin, *ahead);
    else
      ahead->count = 0;
    for (int64_t p = 0; p < std::max(run->count, ahead->count); p += 4) {
      // A head's rows are not contiguous, which hardware prefetchers do not follow: prefetch those of the next run, as
      // many at once as can be in flight.
      problem.prefetch(*ahead, p, p + 4);
      if (p >= run->count) continue;
      const C* keys[4];  // the last one again where fewer are left: its result is not used
      for (int i = 0; i < 4; i++) keys[i] = problem.keys.values + run->offsets[std::min(p + i, run->count - 1)];
      by_four(part.queries(), [&](int64_t q, auto n) {
        const T* queries[n];
        std::copy_n(rows + q, n, queries);
        score(queries, keys, dim, scores + q, p);
      });
    }
    if constexpr (kHasScales) {
      gather(problem.keys.scales, *run, key_scales);
      gather(problem.values.scales, *run, value_scales);
    }
    for (int64_t q = 0; q < part.queries(); q++) {
      if constexpr (kHasScales) multiply(scores[q], key_scales);
      shrink[q] = weigh(scores[q], std::clamp<int64_t>(contexts[q] - first, 0, run->count), scale, softmax[q]);
      if constexpr (kHasScales) multiply(scores[q], value_scales);
    }
    by_four(part.queries(), [&](int64_t q, auto n) {
      add_values<n>(scores + q, shrink + q, problem.values.values, run->offsets, run->count, dim, out + q * dim);
    });
  }
}

// Merges the `count` parts of one query into `to` (D); the parts are `stride` queries apart.
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

Attention::Attention(const Heads& heads, int64_t block_size, const at::Tensor& tables, const at::Tensor& starts,
                     const at::Tensor& contexts)
    : heads_(heads),
      block_size_(block_size),
      table_width_(tables.size(1)),
      tables_(tables.const_data_ptr<int32_t>()) {
  TORCH_CHECK(tables.is_contiguous(), "attention takes contiguous tables");
  const int64_t group = heads.heads / heads.kv_heads;
  const auto* start = starts.const_data_ptr<int32_t>();
  const auto* context = contexts.const_data_ptr<int32_t>();
  for (int64_t sequence = 0; sequence < contexts.size(0); sequence++) {
    const int64_t rows = start[sequence + 1] - start[sequence];
    const int64_t heads_at_once = std::min(group, kQueries), rows_at_once = std::max<int64_t>(1, kQueries / group);
    const int64_t slices = heads.kv_heads * ceil_div(group, heads_at_once);
    for (int64_t row = 0; row < rows; row += rows_at_once) {
      const int64_t some = std::min(rows_at_once, rows - row), seen = context[sequence] - rows + row + 1;
      const int64_t last = seen + some - 1, first_part = parts_.size();
      for (int64_t begin = 0; begin < last; begin += kPart)
        for (int64_t kv_head = 0; kv_head < heads.kv_heads; kv_head++)
          for (int64_t head = 0; head < group; head += heads_at_once) {
            parts_.push_back({sequence, start[sequence] + row, some, seen, kv_head * group + head,
                              std::min(heads_at_once, group - head), begin, std::min(begin + kPart, last)});
            place_.push_back(place_.back() + parts_.back().queries());
            scores_ += parts_.back().queries() * (parts_.back().end - begin);
          }
      for (int64_t slice = 0; slice < slices; slice++)
        tiles_.push_back({parts_[first_part + slice], first_part + slice, ceil_div(last, kPart)});
    }
  }
  softmaxes_.resize(place_.back());
  outs_ = at::empty({place_.back(), heads.dim}, at::kFloat);
}

bool Attention::is_worth_waking() const { return scores_ >= kAlone; }

template <typename T, typename C>
void Attention::run(const Team& team, const T* queries, const Cached<C>& keys, const Cached<C>& values, T* result) {
  const int64_t heads = heads_.heads, dim = heads_.dim;
  const Problem<T, C> problem{queries, keys, values, tables_, table_width_, block_size_, heads, heads_.kv_heads, dim};
  auto* out = outs_.mutable_data_ptr<float>();
  auto finish = [&](int64_t tile) {
    const auto& [part, first, count] = tiles_[tile];
    // Every part of a tile has the same slices, so its next part is the queries of all slices further on.
    const int64_t stride = part.rows * heads;
    for (int64_t q = 0; q < part.queries(); q++)
      merge(out + (place_[first] + q) * dim, &softmaxes_[place_[first] + q], count, stride, dim,
            result + ((part.row + q / part.heads) * heads + part.head + q % part.heads) * dim);
  };
  const bool is_cut = parts_.size() > tiles_.size();  // if not, each tile is one part
  team.share(parts_.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      attend(problem, parts_[i], i + 1 < end ? &parts_[i + 1] : nullptr, out + place_[i] * dim, &softmaxes_[place_[i]]);
      if (!is_cut) finish(i);
    }
  });
  if (is_cut)
    team.share(tiles_.size(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) finish(i);
    });
}

template void Attention::run(const Team&, const BFloat16*, const Cached<BFloat16>&, const Cached<BFloat16>&, BFloat16*);
template void Attention::run(const Team&, const BFloat16*, const Cached<int8_t>&, const Cached<int8_t>&, BFloat16*);
template void Attention::run(const Team&, const BFloat16*, const Cached<Fp8>&, const Cached<Fp8>&, BFloat16*);

namespace {

// The same for tensors, as an operator that returns the result.
at::Tensor paged_attention_op(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                              const at::Tensor& tables, const at::Tensor& starts, const at::Tensor& contexts,
                              const std::optional<at::Tensor>& key_scales,
                              const std::optional<at::Tensor>& value_scales) {
  TORCH_CHECK(queries.is_contiguous(), "paged_attention takes contiguous tensors");
  auto result = at::empty_like(queries);
  Attention attention({queries.size(1), keys.size(2), queries.size(2)}, keys.size(1), tables, starts, contexts);
  LLAMA2_DISPATCH(queries.scalar_type(), "paged_attention", [&] {
    dispatch_cached<scalar_t>(keys.scalar_type(), [&](auto element) {
      const Cached<decltype(element)> own_keys(keys, key_scales), own_values(values, value_scales);
      Team::run(attention.is_worth_waking(), [&](const Team& team) {
        attention.run(team, queries.const_data_ptr<scalar_t>(), own_keys, own_values,
                      result.mutable_data_ptr<scalar_t>());
      });
    });
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def(
      "paged_attention(Tensor queries, Tensor keys, Tensor values, Tensor tables, Tensor starts, Tensor contexts, "
      "Tensor? key_scales=None, Tensor? value_scales=None) -> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("paged_attention", &paged_attention_op); }

}  // namespace llama2
