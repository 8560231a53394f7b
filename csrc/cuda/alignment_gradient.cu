// The factors of the alignment's gradient, formed in the Grams' own memory, on CUDA.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../grams.h"
#include "launch.h"

namespace pcka {
namespace {

// K, L <- 2 (a L - b K), 2 (a K - c L); `size` elements a group.
template <typename acc_t>
__global__ void mix_kernel(
    acc_t* k, acc_t* l, int64_t groups, int64_t size, const double* coefficients) {
  for (int64_t i = first_item(); i < groups * size; i += item_stride()) {
    const double* group = coefficients + 3 * (i / size);
    const double k_i = k[i], l_i = l[i];
    k[i] = static_cast<acc_t>(2 * (group[0] * l_i - group[1] * k_i));
    l[i] = static_cast<acc_t>(2 * (group[0] * k_i - group[2] * l_i));
  }
}

// values <- factor * coefficients[group][column] * values
template <typename acc_t>
__global__ void scale_kernel(
    acc_t* values, int64_t groups, int64_t size, const double* coefficients, int column,
    double factor) {
  for (int64_t i = first_item(); i < groups * size; i += item_stride()) {
    values[i] = static_cast<acc_t>(factor * coefficients[3 * (i / size) + column] * values[i]);
  }
}

void alignment_gradient(
    const Tensor& k,                     // (G, N_k, N_k); written
    const Tensor& l,                     // (G, N_l, N_l); written
    const std::optional<Tensor>& cross,  // (G, N_k, N_l); written
    const Tensor& coefficients) {        // (G, 3)
  check_grams(k, l, cross);
  const int64_t groups = k.size(0);
  check_table(coefficients, "coefficients", groups, 3);
  const LaunchScope scope(k);
  const double* table = static_cast<const double*>(coefficients.const_data_ptr());
  dispatch_accumulation(k.scalar_type(), "k", [&](auto zero) {
    using acc_t = decltype(zero);
    const auto data = [](const Tensor& t) { return static_cast<acc_t*>(t.mutable_data_ptr()); };
    if (!cross.has_value()) {
      mix_kernel<<<blocks_for(k.numel()), kThreads, 0, scope.stream()>>>(
          data(k), data(l), groups, k.numel() / groups, table);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      return;
    }
    const auto scale = [&](const Tensor& t, int column, double factor) {
      scale_kernel<<<blocks_for(t.numel()), kThreads, 0, scope.stream()>>>(
          data(t), groups, t.numel() / groups, table, column, factor);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    };
    scale(*cross, 0, 2);
    scale(k, 1, -2);
    scale(l, 2, -2);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) {
  m.impl("alignment_gradient_", TORCH_BOX(&alignment_gradient));
}

}  // namespace pcka
