// Alignment statistics of pairs of Grams, on the CPU.

#include "../gram_alignment.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "../library.h"
#include "lines.h"

namespace pcka {
namespace {

struct Cpu {
  template <typename gram_t>
  static void run(const GramAlignment<gram_t>& job, const Tensor&) {
    const Grams<gram_t>& grams = job.grams;
    torch::stable::parallel_for(0, grams.groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const double of_k = 1 / job.energy_x[3 * g + 1], of_l = 1 / job.energy_y[3 * g + 1];
        const gram_t *k = grams.k + g * grams.size_k, *l = grams.l + g * grams.size_l;
        double kl;
        if (grams.cross != nullptr) {
          const gram_t* m = grams.cross + g * grams.size_cross;
          const double of_cross = std::sqrt(of_k) * std::sqrt(of_l);
          kl = scaled_dot(m, m, grams.size_cross, of_cross, of_cross);
        } else {
          kl = scaled_dot(k, l, grams.size_k, of_k, of_l);
        }
        job.close(
            g, kl, scaled_dot(k, k, grams.size_k, of_k, of_k),
            scaled_dot(l, l, grams.size_l, of_l, of_l));
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CPU, m) {
  m.impl("gram_alignment_", TORCH_BOX(&gram_alignment<Cpu>));
}

}  // namespace pcka
