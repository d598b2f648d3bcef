// Owns the operators for products with the weights of linear layers. The products themselves are in packed_linear.cpp
// or, for processors that gain nothing from packing, in streamed_linear.cpp.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "kernels.h"

namespace llama2 {
namespace {

using at::BFloat16;

constexpr int64_t kAlone = 64;  // outputs that one thread has sooner than it has woken another

bool packs_weights() {
#ifdef LLAMA2_PACKS_WEIGHTS
  return true;
#else
  return false;
#endif
}

void check_weight(const at::Tensor& w) {
  TORCH_CHECK(w.scalar_type() == at::kBFloat16 && w.dim() == 2 && w.is_contiguous(),
              "linear takes contiguous bf16 weights of two axes");
}

// w (outputs, inputs) is from now on for `linear` alone.
void pack_op(at::Tensor w) {
  check_weight(w);
#ifdef LLAMA2_PACKS_WEIGHTS
  pack(w.mutable_data_ptr<BFloat16>(), w.size(0), w.size(1));
#endif
}

// x (rows, inputs) times w (outputs, inputs), transposed; w is packed where `packs_weights`.
at::Tensor linear_op(const at::Tensor& x, const at::Tensor& w) {
  check_weight(w);
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.is_contiguous(), "linear takes contiguous bf16 rows");
  TORCH_CHECK(x.dim() == 2 && x.size(1) == w.size(1), "linear: shapes do not fit");
  auto y = at::empty({x.size(0), w.size(0)}, x.options());
  Team::run(w.size(0) > kAlone, [&](const Team& team) {
    linear(team, x.const_data_ptr<BFloat16>(), w.const_data_ptr<BFloat16>(), y.mutable_data_ptr<BFloat16>(), x.size(0),
           x.size(1), w.size(0));
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(llama2_cpu, library) {
  library.def("packs_weights() -> bool", &packs_weights);
  library.def("pack(Tensor(a!) w) -> ()");
  library.def("linear(Tensor x, Tensor w) -> Tensor");
}
TORCH_LIBRARY_IMPL(llama2_cpu, CPU, library) {
  library.impl("pack", &pack_op);
  library.impl("linear", &linear_op);
}

}  // namespace llama2
