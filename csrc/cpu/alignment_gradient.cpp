// The factors of the alignment's gradient, on the CPU.

#include "../alignment_gradient.h"

#include <torch/csrc/stable/ops.h>

#include "../library.h"
#include "lines.h"

namespace pcka {
namespace {

template <typename T>
T* at_or_null(T* data, int64_t offset) {
  return data != nullptr ? data + offset : nullptr;
}

struct Cpu {
  template <typename gram_t, typename factor_t>
  static void run(const AlignmentGradient<gram_t, factor_t>& job, const Tensor&) {
    const Grams<gram_t>& grams = job.grams;
    torch::stable::parallel_for(0, grams.groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        if (grams.cross == nullptr) {
          const double* row = job.coefficients + 4 * g;
          const int64_t at = g * grams.size_k;
          mix(grams.k + at, grams.l + at, grams.size_k, {2 * row[0], 2 * row[1]},
              {2 * row[2], 2 * row[3]}, at_or_null(job.x, at), at_or_null(job.y, at));
          continue;
        }
        for (const auto& m : job.scaled()) {
          if (m.to == nullptr) continue;
          const int64_t at = g * m.size;
          scale(m.of + at, m.size, m.factor(job.coefficients, g), m.to + at);
        }
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CPU, m) {
  m.impl("alignment_gradient_", TORCH_BOX(&alignment_gradient<Cpu>));
}

}  // namespace pcka
