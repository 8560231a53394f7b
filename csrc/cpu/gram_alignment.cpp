// Alignment statistics of pairs of Grams on the CPU.

#include "../grams.h"
#include "../library.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "../dtypes.h"
#include "lines.h"

namespace pcka {
namespace {

Tensor gram_alignment(
    const Tensor& alignment,             // (G); written
    const Tensor& k,                     // (G, N_k, N_k)
    const Tensor& l,                     // (G, N_l, N_l)
    const std::optional<Tensor>& cross,  // (G, N_k, N_l)
    const Tensor& energy_x,              // (G, 3)
    const Tensor& energy_y,              // (G, 3)
    bool center) {
  check_gram_alignment(alignment, k, l, cross, energy_x, energy_y);
  const int64_t groups = k.size(0), n_k = k.size(1), n_l = l.size(1);
  Tensor coefficients = torch::stable::new_empty(k, {groups, 4}, ScalarType::Double);
  dispatch_rows(k.scalar_type(), "k", [&](auto zero) {
    using gram_t = decltype(zero);
    using acc_t = acc_type<gram_t>;
    const gram_t* k_data = static_cast<const gram_t*>(k.const_data_ptr());
    const gram_t* l_data = static_cast<const gram_t*>(l.const_data_ptr());
    const gram_t* cross_data =
        cross.has_value() ? static_cast<const gram_t*>(cross->const_data_ptr()) : nullptr;
    const double* energies_x = static_cast<const double*>(energy_x.const_data_ptr());
    const double* energies_y = static_cast<const double*>(energy_y.const_data_ptr());
    acc_t* alignments = static_cast<acc_t*>(alignment.mutable_data_ptr());
    double* table = static_cast<double*>(coefficients.mutable_data_ptr());
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const double *ex = energies_x + 3 * g, *ey = energies_y + 3 * g;
        const double sx = 1 / ex[1], sy = 1 / ey[1];
        const gram_t* kg = k_data + g * n_k * n_k;
        const gram_t* lg = l_data + g * n_l * n_l;
        const gram_t* mg = cross_data ? cross_data + g * n_k * n_l : nullptr;
        const double root = std::sqrt(sx) * std::sqrt(sy);
        const double kl =
            mg ? scaled_dot(mg, mg, n_k * n_l, root, root) : scaled_dot(kg, lg, n_k * n_k, sx, sy);
        const GroupAlignment result = align_group(
            kl, scaled_dot(kg, kg, n_k * n_k, sx, sx), scaled_dot(lg, lg, n_l * n_l, sy, sy), ex,
            ey, center, std::numeric_limits<acc_t>::epsilon());
        alignments[g] = static_cast<acc_t>(result.alignment);
        table[4 * g] = result.a_x, table[4 * g + 1] = result.b;
        table[4 * g + 2] = result.a_y, table[4 * g + 3] = result.c;
      }
    });
  });
  return coefficients;
}

}  // namespace

PCKA_LIBRARY_IMPL(CPU, m) { m.impl("gram_alignment_", TORCH_BOX(&gram_alignment)); }

}  // namespace pcka
