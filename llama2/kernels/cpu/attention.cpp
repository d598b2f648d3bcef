// Owns decoding's attention: one query row per sequence, over keys and values where they lie in the paged cache.
//
// The context is cut into parts of a fixed length, each with a softmax of its own, and the parts are merged (FlashDecoding,
// arXiv:2311.01282 and https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The cuts depend on nothing else, so that
// a sequence gets the same bits in whatever company and with however many threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>
#include <vector>

#include "lanes.h"

namespace llama2 {
namespace {

constexpr int64_t kPart = 256;  // positions
constexpr int64_t kRun = 32;    // positions whose scores are at hand at once

// What the tasks of one call have in common. queries (B, H, D), caches (blocks, block size, K, D), tables (B, N).
template <typename T>
struct Problem {
  const T *queries, *keys, *values;
  const int32_t* tables;
  int64_t table_width, block_size, heads, kv_heads, head_dim;

  int64_t group() const { return heads / kv_heads; }
  int64_t offset(int64_t sequence, int64_t position, int64_t kv_head) const {
    const int64_t block = tables[sequence * table_width + position / block_size];
    return ((block * block_size + position % block_size) * kv_heads + kv_head) * head_dim;
  }
};

// One part of one sequence's context, for the query heads that share a key head.
struct Part {
  int64_t sequence, kv_head, begin, end;
};

// A head's weighted sum of values, relative to its highest score, and the sum of its weights.
struct Softmax {
  float highest = -std::numeric_limits<float>::infinity(), weights = 0.f;

  // The factor for what was summed so far, now that a score of `other` has been seen.
  float raise(float other) {
    const float before = highest;
    highest = std::max(highest, other);
    return before == highest ? 1.f : std::exp(before - highest);
  }
};

// Scores of positions for G query heads, unscaled: scores[g][p] = query[g] · key[p].
template <int G, typename T>
inline void score(const T* query, const T* keys, const int64_t* offsets, int64_t count, int64_t dim,
                  float (&scores)[G][kRun]) {
  using L = Lanes<T>;
  const T* queries[G];
  for (int g = 0; g < G; g++) queries[g] = query + g * dim;
  for (int64_t p = 0; p < count; p += 4) {
    const T* four[4];  // the last ones again where fewer are left: their scores are not looked at
    for (int i = 0; i < 4; i++) four[i] = keys + offsets[std::min(p + i, count - 1)];
    typename L::Sum sums[G][4];
    for (auto& row : sums)
      for (auto& one : row) one = L::zero();
    dot(queries, four, dim, sums, [](const T*) {});
    for (int g = 0; g < G; g++) {
      const auto totals = L::totals(sums[g][0], sums[g][1], sums[g][2], sums[g][3]);
      std::copy(totals.begin(), totals.end(), scores[g] + p);
    }
  }
}

// out[g] = out[g] * shrink[g] + the weighted sum of the values.
template <int G, typename T>
inline void add_values(const float (&weights)[G][kRun], const float (&shrink)[G], const T* values,
                       const int64_t* offsets, int64_t count, int64_t dim, float* out) {
  for_lanes(dim, [&](int64_t d, auto... lanes) {
    Floats totals[G];
    for (int g = 0; g < G; g++) totals[g] = load(out + g * dim + d, lanes...) * Floats(shrink[g]);
    for (int64_t p = 0; p < count; p++) {
      const auto value = load(values + offsets[p] + d, lanes...);
      for (int g = 0; g < G; g++) totals[g] = at::vec::fmadd(Floats(weights[g][p]), value, totals[g]);
    }
    for (int g = 0; g < G; g++) store(out + g * dim + d, totals[g], lanes...);
  });
}

// G heads of the group, of which the first is `head`. out (G, D), softmax (G).
template <int G, typename T>
void attend(const Problem<T>& problem, const Part& part, int64_t head, float* out, Softmax* softmax) {
  const int64_t dim = problem.head_dim;
  const Floats scale(1.f / std::sqrt(static_cast<float>(dim)));
  const T* query = problem.queries + (part.sequence * problem.heads + part.kv_head * problem.group() + head) * dim;
  int64_t offsets[kRun];
  float scores[G][kRun], shrink[G];
  std::fill(out, out + G * dim, 0.f);
  for (int64_t first = part.begin; first < part.end; first += kRun) {
    const int64_t count = std::min(kRun, part.end - first);
    for (int64_t p = 0; p < count; p++) offsets[p] = problem.offset(part.sequence, first + p, part.kv_head);
    score<G>(query, problem.keys, offsets, count, dim, scores);
    for (int g = 0; g < G; g++) {
      float* weights = scores[g];
      for_lanes(count, [&](int64_t p, auto... lanes) { store(weights + p, load(weights + p, lanes...) * scale, lanes...); });
      shrink[g] = softmax[g].raise(*std::max_element(weights, weights + count));
      const Floats highest(softmax[g].highest);
      for_lanes(count, [&](int64_t p, auto... lanes) {
        store(weights + p, (load(weights + p, lanes...) - highest).exp_u20(), lanes...);
      });
      softmax[g].weights = softmax[g].weights * shrink[g] + std::accumulate(weights, weights + count, 0.f);
    }
    add_values<G>(scores, shrink, problem.values, offsets, count, dim, out);
  }
}

// All heads of the group, four at a time: their sums stay in registers. out (group, D), softmax (group).
template <typename T>
void attend_group(const Problem<T>& problem, const Part& part, float* out, Softmax* softmax) {
  const int64_t group = problem.group(), dim = problem.head_dim;
  int64_t head = 0;
  for (; head + 4 <= group; head += 4) attend<4>(problem, part, head, out + head * dim, softmax + head);
  switch (group - head) {
    case 3: attend<3>(problem, part, head, out + head * dim, softmax + head); break;
    case 2: attend<2>(problem, part, head, out + head * dim, softmax + head); break;
    case 1: attend<1>(problem, part, head, out + head * dim, softmax + head); break;
  }
}

// Merge the parts of one head into `to` (D); from one part to the next it is `heads` heads.
template <typename T>
void merge(const float* outs, const Softmax* softmaxes, int64_t parts, int64_t heads, int64_t dim, T* to) {
  Softmax all;
  for (int64_t i = 0; i < parts; i++) all.raise(softmaxes[i * heads].highest);
  for (int64_t i = 0; i < parts; i++)
    all.weights += softmaxes[i * heads].weights * std::exp(softmaxes[i * heads].highest - all.highest);
  for_lanes(dim, [&](int64_t d, auto... lanes) {
    Floats total(0.f);
    for (int64_t i = 0; i < parts; i++) {
      const Floats share(std::exp(softmaxes[i * heads].highest - all.highest) / all.weights);
      total = at::vec::fmadd(share, load(outs + i * heads * dim + d, lanes...), total);
    }
    store(to + d, total, lanes...);
  });
}

// queries (B, H, D), one row per sequence; keys, values (blocks, block size, K, D); tables (B, N) int32, the blocks;
// contexts (B) int32, the positions that the row sees, its own included. Returns (B, H, D).
at::Tensor paged_decode(const at::Tensor& queries, const at::Tensor& keys, const at::Tensor& values,
                        const at::Tensor& tables, const at::Tensor& contexts) {
  TORCH_CHECK(queries.is_contiguous() && keys.is_contiguous() && values.is_contiguous() && tables.is_contiguous());
  const int64_t batch = queries.size(0), heads = queries.size(1), dim = queries.size(2), kv_heads = keys.size(2);
  const int64_t group = heads / kv_heads;
  const auto* context = contexts.const_data_ptr<int32_t>();
  // Key heads innermost: they lie side by side, so that a thread finds the next one's cache lines fetched already.
  std::vector<Part> parts;
  std::vector<int64_t> first_part{0};  // of each sequence, and the end
  for (int64_t sequence = 0; sequence < batch; sequence++) {
    for (int64_t begin = 0; begin < context[sequence]; begin += kPart)
      for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++)
        parts.push_back({sequence, kv_head, begin, std::min<int64_t>(begin + kPart, context[sequence])});
    first_part.push_back(parts.size());
  }
  auto outs = at::empty({static_cast<int64_t>(parts.size()), group, dim}, queries.options().dtype(at::kFloat));
  auto* out = outs.mutable_data_ptr<float>();
  std::vector<Softmax> softmaxes(parts.size() * group);
  auto result = at::empty_like(queries);
  LLAMA2_DISPATCH(queries.scalar_type(), "paged_decode", [&] {
    const Problem<scalar_t> problem{
        queries.const_data_ptr<scalar_t>(), keys.const_data_ptr<scalar_t>(), values.const_data_ptr<scalar_t>(),
        tables.const_data_ptr<int32_t>(), tables.size(1), keys.size(1), heads, kv_heads, dim};
    at::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        attend_group(problem, parts[i], out + i * group * dim, softmaxes.data() + i * group);
    });
    auto* to = result.mutable_data_ptr<scalar_t>();
    for (int64_t sequence = 0; sequence < batch; sequence++)
      for (int64_t head = 0; head < heads; head++) {
        const int64_t first = first_part[sequence] * group + head, count = first_part[sequence + 1] - first_part[sequence];
        merge(out + first * dim, softmaxes.data() + first, count / kv_heads, heads, dim, to + (sequence * heads + head) * dim);
      }
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def("paged_decode(Tensor queries, Tensor keys, Tensor values, Tensor tables, Tensor contexts) -> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("paged_decode", &paged_decode); }

}  // namespace llama2
