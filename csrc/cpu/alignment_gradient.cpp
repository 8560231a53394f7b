// The factors of the alignment's gradient, formed in the Grams' own memory, on the CPU.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../grams.h"

namespace pcka {
namespace {

// K, L <- 2 (a L - b K), 2 (a K - c L)
template <typename acc_t>
void mix_group(acc_t* k, acc_t* l, int64_t count, const double* coefficients) {
  const double a = 2 * coefficients[0], b = 2 * coefficients[1], c = 2 * coefficients[2];
  for (int64_t i = 0; i < count; ++i) {
    const double k_i = k[i], l_i = l[i];
    k[i] = static_cast<acc_t>(a * l_i - b * k_i);
    l[i] = static_cast<acc_t>(a * k_i - c * l_i);
  }
}

template <typename acc_t>
void scale_group(acc_t* values, int64_t count, double factor) {
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<acc_t>(factor * values[i]);
}

void alignment_gradient(
    const Tensor& k,                     // (G, N_k, N_k); written
    const Tensor& l,                     // (G, N_l, N_l); written
    const std::optional<Tensor>& cross,  // (G, N_k, N_l); written
    const Tensor& coefficients) {        // (G, 3)
  check_grams(k, l, cross);
  const int64_t groups = k.size(0), n_k = k.size(1), n_l = l.size(1);
  check_table(coefficients, "coefficients", groups, 3);
  dispatch_accumulation(k.scalar_type(), "k", [&](auto zero) {
    using acc_t = decltype(zero);
    acc_t* k_data = static_cast<acc_t*>(k.mutable_data_ptr());
    acc_t* l_data = static_cast<acc_t*>(l.mutable_data_ptr());
    acc_t* cross_data =
        cross.has_value() ? static_cast<acc_t*>(cross->mutable_data_ptr()) : nullptr;
    const double* table = static_cast<const double*>(coefficients.const_data_ptr());
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const double* group = table + 3 * g;
        if (cross_data == nullptr) {
          mix_group(k_data + g * n_k * n_k, l_data + g * n_l * n_l, n_k * n_k, group);
          continue;
        }
        scale_group(cross_data + g * n_k * n_l, n_k * n_l, 2 * group[0]);
        scale_group(k_data + g * n_k * n_k, n_k * n_k, -2 * group[1]);
        scale_group(l_data + g * n_l * n_l, n_l * n_l, -2 * group[2]);
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CPU, m) {
  m.impl("alignment_gradient_", TORCH_BOX(&alignment_gradient));
}

}  // namespace pcka
