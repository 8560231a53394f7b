// The factors of the alignment's gradient, on the CPU.

#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../grams.h"
#include "../library.h"
#include "lines.h"

namespace pcka {
namespace {

template <typename T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

void alignment_gradient(
    const std::optional<Tensor>& factor_x,  // (G, N_k, N_k); written
    const std::optional<Tensor>& factor_y,  // (G, N_l, N_l); written
    const std::optional<Tensor>& cross_x,   // (G, N_k, N_l); written
    const std::optional<Tensor>& cross_y,   // (G, N_k, N_l); written
    const Tensor& k,                        // (G, N_k, N_k)
    const Tensor& l,                        // (G, N_l, N_l)
    const std::optional<Tensor>& cross,     // (G, N_k, N_l)
    const Tensor& coefficients) {           // (G, 4)
  const ScalarType dtype = check_alignment_gradient(
      {&factor_x, &factor_y, &cross_x, &cross_y}, k, l, cross, coefficients);
  const int64_t groups = k.size(0), n_k = k.size(1), n_l = l.size(1);
  dispatch_gram_and_factor(k.scalar_type(), dtype, [&](auto gram, auto factor) {
    using gram_t = decltype(gram);
    using factor_t = decltype(factor);
    factor_t* to_x = data_or_null<factor_t>(factor_x);
    factor_t* to_y = data_or_null<factor_t>(factor_y);
    factor_t* to_cross_x = data_or_null<factor_t>(cross_x);
    factor_t* to_cross_y = data_or_null<factor_t>(cross_y);
    const gram_t* of_k = static_cast<const gram_t*>(k.const_data_ptr());
    const gram_t* of_l = static_cast<const gram_t*>(l.const_data_ptr());
    const gram_t* of_cross = data_or_null<gram_t>(cross);
    const double* table = static_cast<const double*>(coefficients.const_data_ptr());
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const double a_x = 2 * table[4 * g], b = 2 * table[4 * g + 1];
        const double a_y = 2 * table[4 * g + 2], c = 2 * table[4 * g + 3];
        const int64_t at_k = g * n_k * n_k, at_l = g * n_l * n_l, at_cross = g * n_k * n_l;
        if (of_cross == nullptr) {
          mix(of_k + at_k, of_l + at_k, n_k * n_k, {a_x, b}, {a_y, c}, to_x ? to_x + at_k : nullptr,
              to_y ? to_y + at_k : nullptr);
          continue;
        }
        if (to_x) scale(of_k + at_k, n_k * n_k, -b, to_x + at_k);
        if (to_y) scale(of_l + at_l, n_l * n_l, -c, to_y + at_l);
        const gram_t* m = of_cross + at_cross;
        const bool x_is_m = static_cast<const void*>(to_cross_x) == of_cross;  // then it is last
        if (to_cross_x && !x_is_m) scale(m, n_k * n_l, a_x, to_cross_x + at_cross);
        if (to_cross_y) scale(m, n_k * n_l, a_y, to_cross_y + at_cross);
        if (x_is_m) scale(m, n_k * n_l, a_x, to_cross_x + at_cross);
      }
    });
  });
}

}  // namespace

PCKA_LIBRARY_IMPL(CPU, m) { m.impl("alignment_gradient_", TORCH_BOX(&alignment_gradient)); }

}  // namespace pcka
