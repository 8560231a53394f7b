// Alignment statistics of pairs of Grams, on CUDA.
//
// Large Grams are cut into parts, so that even a few groups fill the device: a block sums one part,
// in 16-byte vectors; then one block per group sums its parts, in a fixed order. For small ones, a
// block sums a whole group, and there is no second step.

#include "../gram_alignment.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../library.h"
#include "launch.h"
#include "reduce.h"
#include "vectors.h"

namespace pcka {
namespace {

constexpr int64_t kSmall = int64_t{1} << 14;  // elements of Grams that one block sums alone

// <K, L> or <M, M>, <K, K>, <L, L> over elements [begin, end) of a group's matrices, scaled so that
// sums neither overflow nor underflow.
template <typename gram_t>
__device__ inline void add_products(
    const GramAlignment<gram_t>& job, int64_t group, int64_t begin, int64_t end, bool wide,
    double (&sums)[3]) {
  using acc_t = acc_type<gram_t>;
  constexpr int kSize = Vector<gram_t>::kSize;
  const Grams<gram_t>& grams = job.grams;
  const double of_k = 1 / job.energy_x[3 * group + 1], of_l = 1 / job.energy_y[3 * group + 1];
  const auto for_each = [&](int64_t size, auto&& f) {
    for_each_vector<kSize>(group * size + min(begin, size), group * size + min(end, size), f);
  };
  const auto scaled = [](const gram_t& value, double scale) {
    return scale * static_cast<acc_t>(value);
  };
  const auto add_squares = [&](const gram_t* values, int64_t size, double scale, double& sum) {
    for_each(size, [&](int64_t first, int count) {
      const auto x = load<Vector<gram_t>>(values + first, count, wide);
      for (int v = 0; v < kSize; ++v)
        sum += scaled(x.values[v], scale) * scaled(x.values[v], scale);
    });
  };
  if (grams.cross != nullptr) {
    add_squares(grams.cross, grams.size_cross, sqrt(of_k) * sqrt(of_l), sums[0]);
    add_squares(grams.k, grams.size_k, of_k, sums[1]);
    add_squares(grams.l, grams.size_l, of_l, sums[2]);
    return;
  }
  for_each(grams.size_k, [&](int64_t first, int count) {
    const auto x = load<Vector<gram_t>>(grams.k + first, count, wide);
    const auto y = load<Vector<gram_t>>(grams.l + first, count, wide);
    for (int v = 0; v < kSize; ++v) {  // zeros beyond the count
      const double x_v = scaled(x.values[v], of_k), y_v = scaled(y.values[v], of_l);
      sums[0] += x_v * y_v, sums[1] += x_v * x_v, sums[2] += y_v * y_v;
    }
  });
}

// Writes the alignments of groups of one part, else the sums (G, parts, 3) of every part.
template <typename gram_t>
__global__ void __launch_bounds__(kThreads, 1) sum_parts_kernel(
    GramAlignment<gram_t> job, int64_t parts, int64_t part, bool wide,
    double* __restrict__ part_sums) {
  for (int64_t i = blockIdx.x; i < job.grams.groups * parts; i += gridDim.x) {
    const int64_t group = i / parts, begin = i % parts * part;
    double sums[3] = {0, 0, 0};
    add_products(job, group, begin, begin + part, wide, sums);
    block_sum(sums);
    if (threadIdx.x != 0) continue;
    if (parts == 1) {
      job.close(group, sums[0], sums[1], sums[2]);
    } else {
      for (int j = 0; j < 3; ++j) part_sums[3 * i + j] = sums[j];
    }
  }
}

template <typename gram_t>
__global__ void __launch_bounds__(kThreads, 1) gram_alignment_kernel(
    GramAlignment<gram_t> job, int64_t parts, const double* __restrict__ part_sums) {
  for (int64_t group = blockIdx.x; group < job.grams.groups; group += gridDim.x) {
    double sums[3] = {0, 0, 0};
    for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
      for (int j = 0; j < 3; ++j) sums[j] += part_sums[3 * (group * parts + i) + j];
    }
    block_sum(sums);
    if (threadIdx.x == 0) job.close(group, sums[0], sums[1], sums[2]);
  }
}

struct Cuda {
  template <typename gram_t>
  static void run(const GramAlignment<gram_t>& job, const Tensor& on) {
    const LaunchScope scope(on);
    const Grams<gram_t>& grams = job.grams;
    const bool wide =
        vectors_aligned(grams.k) && vectors_aligned(grams.l) && vectors_aligned(grams.cross);
    const int64_t largest = std::max({grams.size_k, grams.size_l, grams.size_cross});
    const int64_t part = largest <= kSmall ? kSmall : kPart, parts = ceil_div(largest, part);
    const Tensor part_sums =
        torch::stable::new_empty(on, {parts > 1 ? grams.groups : 0, parts, 3}, ScalarType::Double);
    double* sums = mutable_data<double>(part_sums);
    launch(
        scope, sum_parts_kernel<gram_t>, blocks_for(grams.groups * parts), job, parts, part, wide,
        sums);
    if (parts > 1) {
      launch(scope, gram_alignment_kernel<gram_t>, blocks_for(grams.groups), job, parts, sums);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) {
  m.impl("gram_alignment_", TORCH_BOX(&gram_alignment<Cuda>));
}

}  // namespace pcka
