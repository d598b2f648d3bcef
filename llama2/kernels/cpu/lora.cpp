// Owns what adapters (LoRA) add to a product: y += scale B (A x) by each row's slot, in two steps. The first makes a
// few fp32 values of each row for every part of the product, and is independent of the product itself; the second adds
// what follows from them to the product's outputs. Every sum takes its terms in order, in lanes of its own, so that a
// row's bits do not depend on the rows with which it shares a tile.
#include "lora.h"

#include <torch/library.h>

#include <numeric>
#include <utility>

#include "kernels.h"
#include "lanes.h"

namespace llama2 {
namespace {

constexpr int kRanks = 4;            // that are summed at once
constexpr int64_t kOutputs = 256;    // that one thread takes at once
constexpr int64_t kAlone = 1 << 15;  // up to this many values, one thread is faster than waking another

// shrunk[m][n] = scale a[n] · x[m] for M rows and the first `count` of kRanks ranks; ranks beyond are not read. Fetches
// as many values from `next` on.
template <typename T, int M>
void shrink_tile(const T* const (&xs)[M], const T* a, int64_t inputs, int64_t count, float scale, float* shrunk,
                 int64_t stride, const T* next) {
  const T* ranks[kRanks];
  for (int64_t n = 0; n < kRanks; n++) ranks[n] = a + std::min(n, count - 1) * inputs;
  typename Lanes<T>::Sum sums[M][kRanks];
  for (auto& row : sums)
    for (auto& each : row) each = Lanes<T>::zero();
  dot<T, T>(xs, ranks, inputs, sums, [&] {
    __builtin_prefetch(next);
    next += Lanes<T>::kCount;
  });
  for (int m = 0; m < M; m++) {
    const auto totals = Lanes<T>::totals(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
    for (int64_t n = 0; n < count; n++) shrunk[m * stride + n] = scale * totals[n];
  }
}

// ys[m] += shrunk[m] b for M rows and `size` outputs; b (rank, outputs) has its rows `stride` apart. Fetches as many
// outputs from `next` on.
template <typename T, int M>
void expand_tile(T* const (&ys)[M], const T* b, int64_t stride, int64_t rank, const float* const (&shrunk)[M],
                 int64_t size, const T* next) {
  int64_t f = 0;
  for (; f + 2 * kFloats <= size; f += 2 * kFloats) {
    Floats sums[M][2];
    for (auto& row : sums) row[0] = row[1] = Floats(0.f);
    for (int64_t r = 0; r < rank; r++) {
      __builtin_prefetch(next + r * stride + f);
      const auto low = load(b + r * stride + f), high = load(b + r * stride + f + kFloats);
      for (int m = 0; m < M; m++) {
        const Floats factor(shrunk[m][r]);
        sums[m][0] = at::vec::fmadd(factor, low, sums[m][0]);
        sums[m][1] = at::vec::fmadd(factor, high, sums[m][1]);
      }
    }
    for (int m = 0; m < M; m++) store2(ys[m] + f, load(ys[m] + f) + sums[m][0], load(ys[m] + f + kFloats) + sums[m][1]);
  }
  for_lanes(size - f, [&](int64_t i, auto... count) {
    for (int m = 0; m < M; m++) {
      Floats sum(0.f);
      for (int64_t r = 0; r < rank; r++)
        sum = at::vec::fmadd(Floats(shrunk[m][r]), load(b + r * stride + f + i, count...), sum);
      store(ys[m] + f + i, load(ys[m] + f + i, count...) + sum, count...);
    }
  });
}

// Calls `step` with the number of rows as a constant.
template <typename Step>
C10_ALWAYS_INLINE void with_rows(int count, const Step& step) {
  switch (count) {
    case 1: return step(std::integral_constant<int, 1>());
    case 2: return step(std::integral_constant<int, 2>());
    case 3: return step(std::integral_constant<int, 3>());
    default: return step(std::integral_constant<int, 4>());
  }
}

}  // namespace

LoraProduct::LoraProduct(const at::Tensor& a, const at::Tensor& b, const at::Tensor& ranks, const at::Tensor& scales,
                         std::vector<int64_t> outputs)
    : a(a),
      b(b),
      ranks(ranks),
      scales(scales),
      outputs(std::move(outputs)) {
  TORCH_CHECK(a.dim() == 4 && b.dim() == 3 && a.scalar_type() == b.scalar_type() && a.size(0) == b.size(0) &&
                  a.size(2) == b.size(1) && a[0].is_contiguous() && b[0].is_contiguous(),
              "lora: a (S, P, R, C) and b (S, R, F) do not fit");
  for (const auto& [each, type] : {std::pair(&ranks, at::kInt), std::pair(&scales, at::kFloat)})
    TORCH_CHECK(each->scalar_type() == type && each->dim() == 2 && each->size(0) == slots() &&
                    each->size(1) == parts() && each->stride(1) == 1,
                "lora: ranks and scales (S, P) do not fit");
  const auto& sizes = this->outputs;
  TORCH_CHECK(static_cast<int64_t>(sizes.size()) == parts() &&
                  std::accumulate(sizes.begin(), sizes.end(), int64_t{0}) == all_outputs(),
              "lora: the parts' outputs do not fit");
}

LoraRows::LoraRows(const at::Tensor& slots, const std::vector<LoraProduct>& products) {
  TORCH_CHECK(slots.scalar_type() == at::kInt && slots.is_contiguous(), "lora takes slots as int32");
  const auto* of = slots.const_data_ptr<int32_t>();
  std::vector<int64_t> order;
  for (int64_t row = 0; row < slots.numel(); row++)
    if (of[row] >= 0) order.push_back(row);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return of[a] < of[b]; });
  for (const auto row : order) {
    if (tiles_.empty() || tiles_.back().slot != of[row] || tiles_.back().count == kRows)
      tiles_.push_back({of[row], 0, {}});
    auto& tile = tiles_.back();
    tile.rows[tile.count++] = row;
  }
  int64_t room = 0;
  for (const auto& each : products) {
    TORCH_CHECK(tiles_.empty() || tiles_.back().slot < each.slots(), "lora: there is no slot ", tiles_.back().slot);
    room = std::max(room, each.parts() * each.max_rank());
  }
  shrunk_.resize(tiles_.size() * kRows * room);
}

std::vector<LoraRows::Piece> LoraRows::pieces(const LoraProduct& product, bool by_outputs, int64_t step) const {
  const auto* ranks = product.ranks.const_data_ptr<int32_t>();
  std::vector<Piece> all;
  all.reserve(tiles_.size() * product.parts() * 4);
  for (size_t tile = 0; tile < tiles_.size(); tile++)
    for (int64_t part = 0; part < product.parts(); part++) {
      const int64_t rank = ranks[tiles_[tile].slot * product.ranks.stride(0) + part];
      if (rank == 0) continue;
      const int64_t size = by_outputs ? product.outputs[part] : rank;
      for (int64_t first = 0; first < size; first += step)
        all.push_back({static_cast<int64_t>(tile), part, first, std::min(step, size - first), rank});
    }
  return all;
}

template <typename T>
void LoraRows::shrink(const Team& team, const LoraProduct& product, const T* x) {
  const int64_t parts = product.parts(), max_rank = product.max_rank(), inputs = product.inputs();
  const auto* a = product.a.const_data_ptr<T>();
  const auto* scales = product.scales.const_data_ptr<float>();
  const auto all = pieces(product, false, kRanks);
  auto address = [&](const Piece& piece) {
    return a + tiles_[piece.tile].slot * product.a.stride(0) + (piece.part * max_rank + piece.first) * inputs;
  };
  team.share_without_meeting(all.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const auto& piece = all[i];
      const auto& tile = tiles_[piece.tile];
      const float scale = scales[tile.slot * product.scales.stride(0) + piece.part];
      float* to = shrunk_.data() + (piece.tile * kRows * parts + piece.part) * max_rank + piece.first;
      const T* next = address(all[std::min(i + 1, end - 1)]);
      with_rows(tile.count, [&](auto rows) {
        const T* xs[rows];
        for (int m = 0; m < rows; m++) xs[m] = x + tile.rows[m] * inputs;
        shrink_tile<T, rows>(xs, address(piece), inputs, piece.count, scale, to, parts * max_rank, next);
      });
    }
  });
}

template <typename T>
void LoraRows::expand(const Team& team, const LoraProduct& product, T* y) const {
  const int64_t parts = product.parts(), max_rank = product.max_rank(), outputs = product.all_outputs();
  const auto* b = product.b.const_data_ptr<T>();
  const auto all = pieces(product, true, kOutputs);
  std::vector<int64_t> starts(parts);
  std::partial_sum(product.outputs.begin(), product.outputs.end() - 1, starts.begin() + 1);
  auto address = [&](const Piece& piece) {
    return b + tiles_[piece.tile].slot * product.b.stride(0) + starts[piece.part] + piece.first;
  };
  team.share(all.size(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const auto& piece = all[i];
      const auto& tile = tiles_[piece.tile];
      const T* next = address(all[std::min(i + 1, end - 1)]);
      with_rows(tile.count, [&](auto rows) {
        T* ys[rows];
        const float* shrunk[rows];
        for (int m = 0; m < rows; m++) {
          ys[m] = y + tile.rows[m] * outputs + starts[piece.part] + piece.first;
          shrunk[m] = shrunk_.data() + ((piece.tile * kRows + m) * parts + piece.part) * max_rank;
        }
        expand_tile<T, rows>(ys, address(piece), outputs, piece.rank, shrunk, piece.count, next);
      });
    }
  });
}

template void LoraRows::shrink(const Team&, const LoraProduct&, const BFloat16*);
template void LoraRows::expand(const Team&, const LoraProduct&, BFloat16*) const;

namespace {

// Each list has one of every product.
c10::intrusive_ptr<Lora> make_lora(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b,
                                   const std::vector<at::Tensor>& ranks, const std::vector<at::Tensor>& scales,
                                   const std::vector<std::vector<int64_t>>& outputs) {
  TORCH_CHECK(!a.empty() && a.size() == b.size() && a.size() == ranks.size() && a.size() == scales.size() &&
                  a.size() == outputs.size(),
              "lora takes as many of each");
  auto lora = c10::make_intrusive<Lora>();
  for (size_t i = 0; i < a.size(); i++) lora->products.emplace_back(a[i], b[i], ranks[i], scales[i], outputs[i]);
  return lora;
}

// The whole, on a product y of x.
void add_lora(at::Tensor y, const at::Tensor& x, const at::Tensor& a, const at::Tensor& b, const at::Tensor& ranks,
              const at::Tensor& scales, at::IntArrayRef outputs, const at::Tensor& slots) {
  const std::vector<LoraProduct> products{{a, b, ranks, scales, outputs.vec()}};
  const auto& product = products[0];
  for (const auto& [each, width] :
       {std::pair(&x, product.inputs()), std::pair(&std::as_const(y), product.all_outputs())})
    TORCH_CHECK(each->scalar_type() == a.scalar_type() && each->is_contiguous() && each->dim() == 2 &&
                    each->size(0) == slots.numel() && each->size(1) == width,
                "lora takes contiguous rows of ", width, " in its own type");
  LoraRows rows(slots, products);
  LLAMA2_DISPATCH(y.scalar_type(), "add_lora", [&] {
    Team::run(y.numel() > kAlone, [&](const Team& team) {
      rows.shrink(team, product, x.const_data_ptr<scalar_t>());
      team.meet();
      rows.expand(team, product, y.mutable_data_ptr<scalar_t>());
    });
  });
}

}  // namespace

void define_lora(torch::Library& library) {
  library.class_<Lora>("Lora");
  library.def("make_lora", &make_lora);
}

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def(
      "add_lora(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor ranks, Tensor scales, int[] outputs, Tensor slots) "
      "-> ()");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) { library.impl("add_lora", &add_lora); }

}  // namespace llama2
