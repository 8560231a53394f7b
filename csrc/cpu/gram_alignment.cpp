// Alignment statistics of pairs of Grams on the CPU.

#include "../grams.h"
#include "../library.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <limits>

#include "../dtypes.h"
#include "lines.h"

namespace pcka {
namespace {

// The energies of a group, of their parts.
std::array<double, 2> add_parts(const Tensor& energy, int64_t group) {
  const int64_t parts = energy.size(1);
  const double* pair = static_cast<const double*>(energy.const_data_ptr()) + 2 * parts * group;
  std::array<double, 2> total{0, 0};
  for (int64_t i = 0; i < parts; ++i) total[0] += pair[2 * i], total[1] += pair[2 * i + 1];
  return total;
}

Tensor gram_alignment(
    const Tensor& alignment,             // (G); written
    const Tensor& k,                     // (G, N_k, N_k)
    const Tensor& l,                     // (G, N_l, N_l)
    const std::optional<Tensor>& cross,  // (G, N_k, N_l)
    const Tensor& energy_x,              // (G, parts, 2)
    const Tensor& energy_y,              // (G, parts, 2)
    bool center) {
  check_gram_alignment(alignment, k, l, cross, energy_x, energy_y);
  const int64_t groups = k.size(0), n_k = k.size(1), n_l = l.size(1);
  Tensor coefficients = torch::stable::new_empty(k, {groups, 3}, ScalarType::Double);
  dispatch_rows(k.scalar_type(), "k", [&](auto zero) {
    using gram_t = decltype(zero);
    using acc_t = acc_type<gram_t>;
    const gram_t* k_data = static_cast<const gram_t*>(k.const_data_ptr());
    const gram_t* l_data = static_cast<const gram_t*>(l.const_data_ptr());
    const gram_t* cross_data =
        cross.has_value() ? static_cast<const gram_t*>(cross->const_data_ptr()) : nullptr;
    acc_t* alignments = static_cast<acc_t*>(alignment.mutable_data_ptr());
    double* table = static_cast<double*>(coefficients.mutable_data_ptr());
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const std::array<double, 2> ex = add_parts(energy_x, g), ey = add_parts(energy_y, g);
        const double sx = 1 / ex[1], sy = 1 / ey[1];
        const gram_t* kg = k_data + g * n_k * n_k;
        const gram_t* lg = l_data + g * n_l * n_l;
        const gram_t* mg = cross_data ? cross_data + g * n_k * n_l : nullptr;
        const double root = std::sqrt(sx) * std::sqrt(sy);
        const double kl =
            mg ? scaled_dot(mg, mg, n_k * n_l, root, root) : scaled_dot(kg, lg, n_k * n_k, sx, sy);
        const GroupAlignment result = align_group(
            kl, scaled_dot(kg, kg, n_k * n_k, sx, sx), scaled_dot(lg, lg, n_l * n_l, sy, sy),
            ex.data(), ey.data(), center, std::numeric_limits<acc_t>::epsilon());
        alignments[g] = static_cast<acc_t>(result.alignment);
        table[3 * g] = result.a, table[3 * g + 1] = result.b, table[3 * g + 2] = result.c;
      }
    });
  });
  return coefficients;
}

}  // namespace

PCKA_LIBRARY_IMPL(CPU, m) { m.impl("gram_alignment_", TORCH_BOX(&gram_alignment)); }

}  // namespace pcka
