// Alignment statistics of pairs of Grams on CUDA.

#include "../grams.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "../dtypes.h"
#include "launch.h"

namespace pcka {
namespace {

// One block a group: <K, L> (or <M, M>), <K, K>, <L, L> of the scaled Grams, then the formula.
template <typename acc_t>
__global__ void gram_alignment_kernel(
    const acc_t* k, const acc_t* l, const acc_t* cross, int64_t groups, int64_t n_k, int64_t n_l,
    const double* energy_x, const double* energy_y, bool center, double epsilon, acc_t* alignment,
    double* coefficients) {
  for (int64_t g = blockIdx.x; g < groups; g += gridDim.x) {
    const double sx = 1 / energy_x[2 * g + 1], sy = 1 / energy_y[2 * g + 1];
    const double root = sqrt(sx) * sqrt(sy);
    const acc_t* kg = k + g * n_k * n_k;
    const acc_t* lg = l + g * n_l * n_l;
    double sums[3] = {0, 0, 0};  // kl, kk, ll
    for (int64_t i = threadIdx.x; i < n_k * n_k; i += blockDim.x) {
      const double value = sx * kg[i];
      sums[1] += value * value;
      if (cross == nullptr) sums[0] += value * (sy * lg[i]);
    }
    for (int64_t i = threadIdx.x; i < n_l * n_l; i += blockDim.x) {
      const double value = sy * lg[i];
      sums[2] += value * value;
    }
    for (int64_t i = threadIdx.x; cross != nullptr && i < n_k * n_l; i += blockDim.x) {
      const double value = root * cross[g * n_k * n_l + i];
      sums[0] += value * value;
    }
    block_sum(sums);
    if (threadIdx.x == 0) {
      const GroupAlignment result = align_group(
          sums[0], sums[1], sums[2], energy_x + 2 * g, energy_y + 2 * g, center, epsilon);
      alignment[g] = static_cast<acc_t>(result.alignment);
      coefficients[3 * g] = result.a;
      coefficients[3 * g + 1] = result.b;
      coefficients[3 * g + 2] = result.c;
    }
  }
}

std::tuple<Tensor, Tensor> gram_alignment(
    const Tensor& k,                     // (G, N_k, N_k)
    const Tensor& l,                     // (G, N_l, N_l)
    const std::optional<Tensor>& cross,  // (G, N_k, N_l)
    const Tensor& energy_x,              // (G, 2)
    const Tensor& energy_y,              // (G, 2)
    bool center) {
  check_grams(k, l, cross);
  const int64_t groups = k.size(0);
  check_table(energy_x, "energy_x", groups, 2);
  check_table(energy_y, "energy_y", groups, 2);
  const LaunchScope scope(k);
  Tensor alignment = torch::stable::new_empty(k, {groups});
  Tensor coefficients = torch::stable::new_empty(k, {groups, 3}, ScalarType::Double);
  dispatch_accumulation(k.scalar_type(), "k", [&](auto zero) {
    using acc_t = decltype(zero);
    gram_alignment_kernel<<<one_block_each(groups), kThreads, 0, scope.stream()>>>(
        static_cast<const acc_t*>(k.const_data_ptr()),
        static_cast<const acc_t*>(l.const_data_ptr()),
        cross.has_value() ? static_cast<const acc_t*>(cross->const_data_ptr()) : nullptr, groups,
        k.size(1), l.size(1), static_cast<const double*>(energy_x.const_data_ptr()),
        static_cast<const double*>(energy_y.const_data_ptr()), center,
        static_cast<double>(std::numeric_limits<acc_t>::epsilon()),
        static_cast<acc_t*>(alignment.mutable_data_ptr()),
        static_cast<double*>(coefficients.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {alignment, coefficients};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) { m.impl("gram_alignment", TORCH_BOX(&gram_alignment)); }

}  // namespace pcka
