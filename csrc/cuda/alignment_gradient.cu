// The factors of the alignment's gradient, formed in the Grams' own memory, on CUDA.

#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../grams.h"
#include "launch.h"
#include "library.h"
#include "vectors.h"

namespace pcka {
namespace {

constexpr int64_t kPart = int64_t{1} << 13;  // elements of a Gram that a block works on

// f(group, first, count) for the block's vectors of matrices (G, size).
template <int size, typename F>
__device__ inline void for_each_vector_of_groups(
    int64_t groups, int64_t elements, int64_t parts, F&& f) {
  for (int64_t i = blockIdx.x; i < groups * parts; i += gridDim.x) {
    const int64_t group = i / parts, begin = group * elements + i % parts * kPart;
    for_each_vector<size>(
        begin, min(begin + kPart, (group + 1) * elements),
        [&](int64_t first, int count) { f(group, first, count); });
  }
}

// K, L <- 2 (a L - b K), 2 (a K - c L)
template <typename gram_t>
__global__ void __launch_bounds__(kThreads) mix_kernel(
    gram_t* __restrict__ k, gram_t* __restrict__ l, int64_t groups, int64_t elements, int64_t parts,
    const double* __restrict__ coefficients) {
  using acc_t = acc_type<gram_t>;
  constexpr int kSize = Vector<gram_t>::kSize;
  for_each_vector_of_groups<kSize>(
      groups, elements, parts, [&](int64_t group, int64_t first, int count) {
        const double a = 2 * coefficients[3 * group], b = 2 * coefficients[3 * group + 1];
        const double c = 2 * coefficients[3 * group + 2];
        Vector<gram_t> x = load(k + first, count, 1, true), y = load(l + first, count, 1, true);
        for (int v = 0; v < kSize; ++v) {
          const double x_v = static_cast<acc_t>(x.values[v]);
          const double y_v = static_cast<acc_t>(y.values[v]);
          x.values[v] = static_cast<gram_t>(static_cast<acc_t>(a * y_v - b * x_v));
          y.values[v] = static_cast<gram_t>(static_cast<acc_t>(a * x_v - c * y_v));
        }
        store(k + first, x, count, 1, true);
        store(l + first, y, count, 1, true);
      });
}

// values <- factor * coefficients[group][column] * values
template <typename gram_t>
__global__ void __launch_bounds__(kThreads) scale_kernel(
    gram_t* __restrict__ values, int64_t groups, int64_t elements, int64_t parts,
    const double* __restrict__ coefficients, int column, double factor) {
  using acc_t = acc_type<gram_t>;
  constexpr int kSize = Vector<gram_t>::kSize;
  for_each_vector_of_groups<kSize>(
      groups, elements, parts, [&](int64_t group, int64_t first, int count) {
        const double scale = factor * coefficients[3 * group + column];
        Vector<gram_t> x = load(values + first, count, 1, true);
        for (int v = 0; v < kSize; ++v) {
          x.values[v] =
              static_cast<gram_t>(static_cast<acc_t>(scale * static_cast<acc_t>(x.values[v])));
        }
        store(values + first, x, count, 1, true);
      });
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
  dispatch_rows(k.scalar_type(), "k", [&](auto zero) {
    using gram_t = decltype(zero);
    const auto data = [](const Tensor& t) { return static_cast<gram_t*>(t.mutable_data_ptr()); };
    const auto elements = [&](const Tensor& t) { return t.size(1) * t.size(2); };
    const auto parts = [&](const Tensor& t) { return (elements(t) + kPart - 1) / kPart; };
    if (!cross.has_value()) {
      launch(
          scope, mix_kernel<gram_t>, blocks_for(groups * parts(k)), data(k), data(l), groups,
          elements(k), parts(k), table);
      return;
    }
    const auto scale = [&](const Tensor& t, int column, double factor) {
      launch(
          scope, scale_kernel<gram_t>, blocks_for(groups * parts(t)), data(t), groups, elements(t),
          parts(t), table, column, factor);
    };
    scale(*cross, 0, 2);
    scale(k, 1, -2);
    scale(l, 2, -2);
  });
}

}  // namespace

PCKA_KERNELS(m) { m.impl("alignment_gradient_", TORCH_BOX(&alignment_gradient)); }

}  // namespace pcka
