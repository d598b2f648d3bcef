// Owns the operators for products with the weights of linear layers. The products themselves are in packed_linear.cpp
// or, for processors that gain nothing from packing, in streamed_linear.cpp.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>

#include "kernels.h"

namespace llama2 {
namespace {

using at::BFloat16;

constexpr int64_t kAlone = 64;  // up to this many outputs, one thread is faster than waking another

#ifdef LLAMA2_PACKS_WEIGHTS
constexpr bool kPacks = true;
constexpr int64_t kMaxRows = std::numeric_limits<int64_t>::max();
#else
// Up to this many rows reading the weight takes most of the time; beyond, oneDNN's blocked products are faster.
constexpr bool kPacks = false;
constexpr int64_t kMaxRows = 64;
#endif

struct Bf16Linear final : Linear {
  const at::Tensor weight;

  explicit Bf16Linear(const at::Tensor& w) : Linear(w.size(1), w.size(0), kMaxRows), weight(w) {}

  void run(const Team& team, const BFloat16* x, BFloat16* y, int64_t rows, int64_t stride) const override {
    linear(team, x, weight.const_data_ptr<BFloat16>(), y, rows, inputs, outputs, stride);
  }

  at::Tensor many_rows(const at::Tensor& x) const override { return at::linear(x, weight); }
};

// x (rows, inputs) times w (outputs, inputs), transposed.
at::Tensor product(const c10::intrusive_ptr<Linear>& w, const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous(), "linear takes contiguous bf16 rows");
  TORCH_CHECK(x.dim() == 2 && x.size(1) == w->inputs, "linear: shapes do not fit");
  if (x.size(0) > w->max_rows) return w->many_rows(x);
  auto y = at::empty({x.size(0), w->outputs}, x.options());
  Team::run(w->outputs > kAlone, [&](const Team& team) {
    w->run(team, x.const_data_ptr<BFloat16>(), y.mutable_data_ptr<BFloat16>(), x.size(0), w->outputs);
  });
  return y;
}

// Weights of one input: the outputs of one come after those of the one before it.
struct Several final : Linear {
  const std::vector<c10::intrusive_ptr<Linear>> all;

  explicit Several(std::vector<c10::intrusive_ptr<Linear>> linears, int64_t outputs, int64_t max_rows)
      : Linear(linears[0]->inputs, outputs, max_rows),
        all(std::move(linears)) {}

  void run(const Team& team, const BFloat16* x, BFloat16* y, int64_t rows, int64_t stride) const override {
    for (const auto& each : all) {
      each->run(team, x, y, rows, stride);
      y += each->outputs;
    }
  }

  at::Tensor many_rows(const at::Tensor& x) const override {
    std::vector<at::Tensor> parts;
    for (const auto& each : all) parts.push_back(product(each, x));
    return at::cat(parts, 1);
  }
};

c10::intrusive_ptr<Linear> join(const std::vector<c10::intrusive_ptr<Linear>>& linears) {
  TORCH_CHECK(!linears.empty(), "linear: nothing to join");
  int64_t outputs = 0, max_rows = std::numeric_limits<int64_t>::max();
  for (const auto& each : linears) {
    TORCH_CHECK(each->inputs == linears[0]->inputs, "linear joins weights of one input");
    outputs += each->outputs;
    max_rows = std::min(max_rows, each->max_rows);
  }
  return c10::make_intrusive<Several>(linears, outputs, max_rows);
}

// w (outputs, inputs) may be packed in place: nothing but the product may read it afterwards.
c10::intrusive_ptr<Linear> prepare_bf16(at::Tensor w) {
  TORCH_CHECK(w.scalar_type() == at::kBFloat16 && w.dim() == 2 && w.is_contiguous(),
              "linear takes contiguous bf16 weights of two axes");
#ifdef LLAMA2_PACKS_WEIGHTS
  pack(w.mutable_data_ptr<BFloat16>(), w.size(0), w.size(1));
#endif
  return c10::make_intrusive<Bf16Linear>(w);
}

}  // namespace

void define_linear(torch::Library& library) {
  // A method, since an operator that takes objects looks at each of its arguments in Python, before every call.
  library.class_<Linear>("Linear").def("product", &product);
  library.def("packs_weights() -> bool", [] { return kPacks; });
  library.def("prepare_bf16", &prepare_bf16);
  library.def("join", &join);
  define_quantized_linear(library);
}

}  // namespace llama2
