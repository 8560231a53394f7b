// The factors of the alignment's gradient, on CUDA.
//
// They may share the Grams' memory: every thread reads the elements that it writes before it writes
// them, and no others.

#include "../alignment_gradient.h"

#include "../library.h"
#include "launch.h"
#include "vectors.h"

namespace pcka {
namespace {

// 2 (a_x L - b K) and 2 (a_y K - c L), if requested.
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

template <typename gram_t, typename factor_t>
__global__ void __launch_bounds__(kThreads) scale_kernel(
    ScaledGram<gram_t, factor_t> m, int64_t groups, int64_t parts, bool wide,
    const double* __restrict__ coefficients) {
  using acc_t = acc_type<gram_t>;
  constexpr int kSize = Vector<gram_t>::kSize;
  for_each_vector_of_groups<kSize>(
      groups, m.size, parts, [&](int64_t group, int64_t first, int count) {
        const double by = m.factor(coefficients, group);
        const auto of = load<Vector<gram_t>>(m.of + first, count, wide);
        Vector<factor_t, kSize> to;
        for (int v = 0; v < kSize; ++v) {
          to.values[v] =
              static_cast<factor_t>(static_cast<acc_t>(by * static_cast<acc_t>(of.values[v])));
        }
        store(m.to + first, to, count, wide);
      });
}

struct Cuda {
  template <typename gram_t, typename factor_t>
  static void run(const AlignmentGradient<gram_t, factor_t>& job, const Tensor& on) {
    const LaunchScope scope(on);
    const Grams<gram_t>& grams = job.grams;
    if (grams.cross == nullptr) {
      const int64_t parts = ceil_div(grams.size_k, kPart);
      const bool wide = vectors_aligned(grams.k) && vectors_aligned(grams.l) &&
                        vectors_aligned(job.x) && vectors_aligned(job.y);
      launch(
          scope, mix_kernel<gram_t, factor_t>, blocks_for(grams.groups * parts), grams.k, grams.l,
          grams.groups, grams.size_k, parts, wide, job.coefficients, job.x, job.y);
      return;
    }
    for (const auto& m : job.scaled()) {
      if (m.to == nullptr) continue;
      const int64_t parts = ceil_div(m.size, kPart);
      launch(
          scope, scale_kernel<gram_t, factor_t>, blocks_for(grams.groups * parts), m, grams.groups,
          parts, vectors_aligned(m.of) && vectors_aligned(m.to), job.coefficients);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) {
  m.impl("alignment_gradient_", TORCH_BOX(&alignment_gradient<Cuda>));
}

}  // namespace pcka
