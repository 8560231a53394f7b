// A gradient times one factor per group, on CUDA, in 16-byte vectors.

#include "../scale_groups.h"

#include <limits>

#include "../geometry.h"  // ceil_div
#include "../library.h"
#include "launch.h"
#include "vectors.h"

namespace pcka {
namespace {

// index_t holds the number of values: 64-bit divisions are slow.
template <typename gradient_t, typename out_t, typename index_t>
__global__ void __launch_bounds__(kThreads) scale_groups_kernel(
    const gradient_t* gradient, index_t count, index_t groups, index_t stride, bool wide,
    const acc_type<gradient_t>* __restrict__ factors, out_t* out) {
  using acc_t = acc_type<gradient_t>;
  constexpr int kSize = Vector<gradient_t>::kSize;
  const index_t vectors = (count + kSize - 1) / kSize, step = gridDim.x * index_t{kThreads};
  for (index_t i = blockIdx.x * index_t{kThreads} + threadIdx.x; i < vectors; i += step) {
    const index_t first = i * kSize;
    const int there = static_cast<int>(min(count - first, static_cast<index_t>(kSize)));
    const auto values = load<Vector<gradient_t>>(gradient + first, there, wide);
    Vector<out_t, kSize> scaled;
    index_t group = first / stride % groups, at = first % stride;
    acc_t factor = factors[group];
    for (int v = 0; v < kSize; ++v) {
      scaled.values[v] = static_cast<out_t>(static_cast<acc_t>(values.values[v]) * factor);
      if (++at == stride) {
        at = 0, group = group + 1 == groups ? 0 : group + 1;
        factor = factors[group];
      }
    }
    store(out + first, scaled, there, wide);
  }
}

struct Cuda {
  template <typename gradient_t, typename out_t>
  static void run(const ScaleGroups<gradient_t, out_t>& job, const Tensor& on) {
    const LaunchScope scope(on);
    const GroupedMemory& m = job.memory;
    const bool wide = vectors_aligned(job.gradient) && vectors_aligned(job.out);
    constexpr int64_t block = int64_t{kThreads} * Vector<gradient_t>::kSize;
    const auto scale = [&](auto index) {
      using index_t = decltype(index);
      launch(
          scope, scale_groups_kernel<gradient_t, out_t, index_t>,
          blocks_for(ceil_div(m.count, block)), job.gradient, static_cast<index_t>(m.count),
          static_cast<index_t>(m.groups), static_cast<index_t>(m.stride), wide, job.factors,
          job.out);
    };
    m.count < std::numeric_limits<int>::max() ? scale(unsigned{}) : scale(int64_t{});
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) {
  m.impl("scale_groups_", TORCH_BOX(&scale_groups<Cuda>));
}

}  // namespace pcka
