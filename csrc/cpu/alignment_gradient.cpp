// The factors of the alignment's gradient, formed in the Grams' own memory, on the CPU.

#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../grams.h"
#include "../library.h"
#include "lines.h"

namespace pcka {
namespace {

void alignment_gradient(
    const Tensor& k,                     // (G, N_k, N_k); written
    const Tensor& l,                     // (G, N_l, N_l); written
    const std::optional<Tensor>& cross,  // (G, N_k, N_l); written
    const Tensor& coefficients) {        // (G, 3)
  check_grams(k, l, cross);
  const int64_t groups = k.size(0), n_k = k.size(1), n_l = l.size(1);
  check_table(coefficients, "coefficients", groups, 3);
  dispatch_rows(k.scalar_type(), "k", [&](auto zero) {
    using gram_t = decltype(zero);
    gram_t* k_data = static_cast<gram_t*>(k.mutable_data_ptr());
    gram_t* l_data = static_cast<gram_t*>(l.mutable_data_ptr());
    gram_t* cross_data =
        cross.has_value() ? static_cast<gram_t*>(cross->mutable_data_ptr()) : nullptr;
    const double* table = static_cast<const double*>(coefficients.const_data_ptr());
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const double a = 2 * table[3 * g], b = 2 * table[3 * g + 1], c = 2 * table[3 * g + 2];
        gram_t* kg = k_data + g * n_k * n_k;
        gram_t* lg = l_data + g * n_l * n_l;
        if (cross_data == nullptr) {
          mix(kg, lg, n_k * n_k, a, b, c);
          continue;
        }
        scale(cross_data + g * n_k * n_l, n_k * n_l, a);
        scale(kg, n_k * n_k, -b);
        scale(lg, n_l * n_l, -c);
      }
    });
  });
}

}  // namespace

PCKA_LIBRARY_IMPL(CPU, m) { m.impl("alignment_gradient_", TORCH_BOX(&alignment_gradient)); }

}  // namespace pcka
