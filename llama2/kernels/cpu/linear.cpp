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

  void run(const Team& team, const BFloat16* x, BFloat16* y, int64_t rows) const override {
    linear(team, x, weight.const_data_ptr<BFloat16>(), y, rows, inputs, outputs);
  }

  at::Tensor many_rows(const at::Tensor& x) const override { return at::linear(x, weight); }
};

// w (outputs, inputs) may be packed in place: nothing but the product may read it afterwards.
c10::intrusive_ptr<Linear> prepare_bf16(at::Tensor w) {
  TORCH_CHECK(w.scalar_type() == at::kBFloat16 && w.dim() == 2 && w.is_contiguous(),
              "linear takes contiguous bf16 weights of two axes");
#ifdef LLAMA2_PACKS_WEIGHTS
  pack(w.mutable_data_ptr<BFloat16>(), w.size(0), w.size(1));
#endif
  return c10::make_intrusive<Bf16Linear>(w);
}

// x (rows, inputs) times w (outputs, inputs), transposed.
at::Tensor product(const c10::intrusive_ptr<Linear>& w, const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous(), "linear takes contiguous bf16 rows");
  TORCH_CHECK(x.dim() == 2 && x.size(1) == w->inputs, "linear: shapes do not fit");
  if (x.size(0) > w->max_rows) return w->many_rows(x);
  auto y = at::empty({x.size(0), w->outputs}, x.options());
  Team::run(w->outputs > kAlone, [&](const Team& team) {
    w->run(team, x.const_data_ptr<BFloat16>(), y.mutable_data_ptr<BFloat16>(), x.size(0));
  });
  return y;
}

}  // namespace

void define_linear(torch::Library& library) {
  // A method, since an operator that takes objects looks at each of its arguments in Python, before every call.
  library.class_<Linear>("Linear").def("product", &product);
  library.def("packs_weights() -> bool", [] { return kPacks; });
  library.def("prepare_bf16", &prepare_bf16);
}

}  // namespace llama2
