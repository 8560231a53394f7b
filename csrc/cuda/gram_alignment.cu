// Alignment statistics of pairs of Grams on CUDA.
//
// Every Gram is cut into parts, so that few groups still fill the device. A block sums one part,
// in vectors of 16 bytes; then one block a group adds its parts up, in their order.

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "../dtypes.h"
#include "../grams.h"
#include "launch.h"
#include "library.h"
#include "vectors.h"

namespace pcka {
namespace {

constexpr int64_t kPart = int64_t{1} << 13;  // elements of a Gram that a block sums

// Scales by which sums neither overflow nor vanish.
struct Scale {
  const double* energy_a;  // (G, 2)
  const double* energy_b;

  __device__ double of(int64_t group) const {
    return sqrt(1 / energy_a[2 * group + 1]) * sqrt(1 / energy_b[2 * group + 1]);
  }
};

// <A, B>, <A, A>, <B, B> of the scaled matrices, part by part: sums (G, parts, 3).
template <typename gram_t>
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(
    const gram_t* __restrict__ a, const gram_t* __restrict__ b, int64_t groups, int64_t size,
    int64_t parts, Scale scale_a, Scale scale_b, double* __restrict__ sums) {
  using acc_t = acc_type<gram_t>;
  constexpr int kSize = Vector<gram_t>::kSize;
  for (int64_t i = blockIdx.x; i < groups * parts; i += gridDim.x) {
    const int64_t group = i / parts, begin = group * size + i % parts * kPart;
    const double of_a = scale_a.of(group), of_b = scale_b.of(group);
    double total[3] = {0, 0, 0};
    for_each_vector<kSize>(
        begin, min(begin + kPart, (group + 1) * size), [&](int64_t first, int count) {
          const Vector<gram_t> x = load(a + first, count, 1, true);
          const Vector<gram_t> y = load(b + first, count, 1, true);
          for (int v = 0; v < kSize; ++v) {  // beyond the count, zeros
            const double x_v = of_a * static_cast<acc_t>(x.values[v]);
            const double y_v = of_b * static_cast<acc_t>(y.values[v]);
            total[0] += x_v * y_v, total[1] += x_v * x_v, total[2] += y_v * y_v;
          }
        });
    block_sum(total);
    if (threadIdx.x == 0) {
      for (int j = 0; j < 3; ++j) sums[3 * i + j] = total[j];
    }
  }
}

// One of the three sums of every part of every group.
struct PartSums {
  const double* data;  // (G, parts, 3)
  int64_t parts;
  int which;

  __device__ double of(int64_t group) const {
    double total = 0;
    for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
      total += data[3 * (group * parts + i) + which];
    }
    return total;
  }
};

template <typename acc_t>
__global__ void __launch_bounds__(kThreads) gram_alignment_kernel(
    PartSums kl, PartSums kk, PartSums ll, int64_t groups, const double* __restrict__ energy_x,
    const double* __restrict__ energy_y, bool center, double epsilon, acc_t* __restrict__ alignment,
    double* __restrict__ coefficients) {
  for (int64_t g = blockIdx.x; g < groups; g += gridDim.x) {
    double total[3] = {kl.of(g), kk.of(g), ll.of(g)};
    block_sum(total);
    if (threadIdx.x == 0) {
      const GroupAlignment result = align_group(
          total[0], total[1], total[2], energy_x + 2 * g, energy_y + 2 * g, center, epsilon);
      alignment[g] = static_cast<acc_t>(result.alignment);
      coefficients[3 * g] = result.a;
      coefficients[3 * g + 1] = result.b;
      coefficients[3 * g + 2] = result.c;
    }
  }
}

// The sums of all parts of a pair of matrices of one size: (G, parts, 3).
template <typename gram_t>
Tensor sum_parts(
    const LaunchScope& scope, const Tensor& a, const Tensor& b, Scale scale_a, Scale scale_b) {
  const int64_t groups = a.size(0), size = a.size(1) * a.size(2);
  const int64_t parts = (size + kPart - 1) / kPart;
  const Tensor sums = torch::stable::new_empty(a, {groups, parts, 3}, ScalarType::Double);
  launch(
      scope, sum_parts_kernel<gram_t>, blocks_for(groups * parts),
      static_cast<const gram_t*>(a.const_data_ptr()),
      static_cast<const gram_t*>(b.const_data_ptr()), groups, size, parts, scale_a, scale_b,
      static_cast<double*>(sums.mutable_data_ptr()));
  return sums;
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
  Tensor alignment = torch::stable::new_empty(k, {groups}, accumulation_dtype(k.scalar_type()));
  Tensor coefficients = torch::stable::new_empty(k, {groups, 3}, ScalarType::Double);
  const double* x = static_cast<const double*>(energy_x.const_data_ptr());
  const double* y = static_cast<const double*>(energy_y.const_data_ptr());
  dispatch_rows(k.scalar_type(), "k", [&](auto zero) {
    using gram_t = decltype(zero);
    using acc_t = acc_type<gram_t>;
    const auto which = [](const Tensor& sums, int index) {
      return PartSums{static_cast<const double*>(sums.const_data_ptr()), sums.size(1), index};
    };
    const auto align = [&](PartSums kl, PartSums kk, PartSums ll) {
      launch(
          scope, gram_alignment_kernel<acc_t>, blocks_for(groups), kl, kk, ll, groups, x, y, center,
          static_cast<double>(std::numeric_limits<acc_t>::epsilon()),
          static_cast<acc_t*>(alignment.mutable_data_ptr()),
          static_cast<double*>(coefficients.mutable_data_ptr()));
    };
    const Scale scale_k{x, x}, scale_l{y, y}, scale_cross{x, y};
    if (!cross.has_value()) {
      const Tensor sums = sum_parts<gram_t>(scope, k, l, scale_k, scale_l);
      return align(which(sums, 0), which(sums, 1), which(sums, 2));
    }
    const Tensor mm = sum_parts<gram_t>(scope, *cross, *cross, scale_cross, scale_cross);
    const Tensor kk = sum_parts<gram_t>(scope, k, k, scale_k, scale_k);
    const Tensor ll = sum_parts<gram_t>(scope, l, l, scale_l, scale_l);
    align(which(mm, 0), which(kk, 1), which(ll, 2));
  });
  return {alignment, coefficients};
}

}  // namespace

PCKA_KERNELS(m) { m.impl("gram_alignment", TORCH_BOX(&gram_alignment)); }

}  // namespace pcka
