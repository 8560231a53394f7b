// The factors of the alignment's gradient on CUDA.
//
// They may be the Grams' own memory: every thread reads the elements that it writes before it does,
// and nobody else's.

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

// 2 (a_x L - b K) and 2 (a_y K - c L), where they are asked for.
template <typename gram_t, typename factor_t>
__global__ void __launch_bounds__(kThreads) mix_kernel(
    const gram_t* k, const gram_t* l, int64_t groups, int64_t elements, int64_t parts, bool wide,
    const double* __restrict__ coefficients, factor_t* factor_x, factor_t* factor_y) {
  using acc_t = acc_type<gram_t>;
  constexpr int kSize = Vector<gram_t>::kSize;
  for_each_vector_of_groups<kSize>(
      groups, elements, parts, [&](int64_t group, int64_t first, int count) {
        const double a_x = 2 * coefficients[4 * group], b = 2 * coefficients[4 * group + 1];
        const double a_y = 2 * coefficients[4 * group + 2], c = 2 * coefficients[4 * group + 3];
        const auto of_k = load<Vector<gram_t>>(k + first, count, wide);
        const auto of_l = load<Vector<gram_t>>(l + first, count, wide);
        Vector<factor_t, kSize> to_x, to_y;
        for (int v = 0; v < kSize; ++v) {
          const double k_v = static_cast<acc_t>(of_k.values[v]);
          const double l_v = static_cast<acc_t>(of_l.values[v]);
          to_x.values[v] = static_cast<factor_t>(static_cast<acc_t>(a_x * l_v - b * k_v));
          to_y.values[v] = static_cast<factor_t>(static_cast<acc_t>(a_y * k_v - c * l_v));
        }
        if (factor_x != nullptr) store(factor_x + first, to_x, count, wide);
        if (factor_y != nullptr) store(factor_y + first, to_y, count, wide);
      });
}

// scale * coefficients[group][column] * values
template <typename gram_t, typename factor_t>
__global__ void __launch_bounds__(kThreads) scale_kernel(
    const gram_t* values, int64_t groups, int64_t elements, int64_t parts, bool wide,
    const double* __restrict__ coefficients, int column, double scale, factor_t* factor) {
  using acc_t = acc_type<gram_t>;
  constexpr int kSize = Vector<gram_t>::kSize;
  for_each_vector_of_groups<kSize>(
      groups, elements, parts, [&](int64_t group, int64_t first, int count) {
        const double by = scale * coefficients[4 * group + column];
        const auto of = load<Vector<gram_t>>(values + first, count, wide);
        Vector<factor_t, kSize> to;
        for (int v = 0; v < kSize; ++v) {
          to.values[v] =
              static_cast<factor_t>(static_cast<acc_t>(by * static_cast<acc_t>(of.values[v])));
        }
        store(factor + first, to, count, wide);
      });
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
  const int64_t groups = k.size(0);
  const LaunchScope scope(k);
  const double* table = static_cast<const double*>(coefficients.const_data_ptr());
  dispatch_gram_and_factor(k.scalar_type(), dtype, [&](auto gram, auto factor) {
    using gram_t = decltype(gram);
    using factor_t = decltype(factor);
    const auto from = [](const Tensor& t) {
      return static_cast<const gram_t*>(t.const_data_ptr());
    };
    const auto to = [](const std::optional<Tensor>& t) {
      return t.has_value() ? static_cast<factor_t*>(t->mutable_data_ptr()) : nullptr;
    };
    const auto elements = [](const Tensor& t) { return t.size(1) * t.size(2); };
    const auto parts = [&](const Tensor& t) { return (elements(t) + kPart - 1) / kPart; };
    if (!cross.has_value()) {
      const bool wide = vectors_aligned(from(k)) && vectors_aligned(from(l)) &&
                        vectors_aligned(to(factor_x)) && vectors_aligned(to(factor_y));
      launch(
          scope, mix_kernel<gram_t, factor_t>, blocks_for(groups * parts(k)), from(k), from(l),
          groups, elements(k), parts(k), wide, table, to(factor_x), to(factor_y));
      return;
    }
    const auto scale = [&](const Tensor& t, int column, double by,
                           const std::optional<Tensor>& out) {
      if (!out.has_value()) return;
      launch(
          scope, scale_kernel<gram_t, factor_t>, blocks_for(groups * parts(t)), from(t), groups,
          elements(t), parts(t), vectors_aligned(from(t)) && vectors_aligned(to(out)), table,
          column, by, to(out));
    };
    scale(k, 1, -2, factor_x);
    scale(l, 3, -2, factor_y);
    // Last the one that is the cross product's own memory.
    const bool x_is_own = cross_x.has_value() && to(cross_x) == cross->const_data_ptr();
    if (!x_is_own) scale(*cross, 0, 2, cross_x);
    scale(*cross, 2, 2, cross_y);
    if (x_is_own) scale(*cross, 0, 2, cross_x);
  });
}

}  // namespace

PCKA_KERNELS(m) { m.impl("alignment_gradient_", TORCH_BOX(&alignment_gradient)); }

}  // namespace pcka
