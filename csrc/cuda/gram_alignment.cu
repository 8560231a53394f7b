// Alignment statistics of pairs of Grams on CUDA.
//
// Large Grams are cut into parts, so that few groups still fill the device: a block sums one part,
// in vectors of 16 bytes; then one block a group adds its parts up, in their order. Of small ones a
// block takes a whole group, and that is all.

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "../dtypes.h"
#include "../grams.h"
#include "launch.h"
#include "library.h"
#include "vectors.h"

namespace pcka {
namespace {

constexpr int64_t kPart = int64_t{1} << 13;   // elements of a Gram that a block sums
constexpr int64_t kSmall = int64_t{1} << 14;  // of Grams that a block takes whole

// The matrices of all groups and their elements; without cross, as many in l as in k.
template <typename gram_t>
struct Grams {
  const gram_t *k, *l, *cross;
  int64_t size_k, size_l, size_cross;
  bool wide;  // can be read in vectors
};

// What the closing formula needs beside the sums, and where its results go.
template <typename acc_t>
struct Closing {
  const double *energy_x, *energy_y;  // (G, 3)
  bool center;
  double epsilon;
  acc_t* alignment;      // (G)
  double* coefficients;  // (G, 4)

  __device__ void operator()(int64_t group, const double (&sums)[3]) const {
    const GroupAlignment result = align_group(
        sums[0], sums[1], sums[2], energy_x + 3 * group, energy_y + 3 * group, center, epsilon);
    alignment[group] = static_cast<acc_t>(result.alignment);
    coefficients[4 * group] = result.a_x;
    coefficients[4 * group + 1] = result.b;
    coefficients[4 * group + 2] = result.a_y;
    coefficients[4 * group + 3] = result.c;
  }
};

// <K, L> or <M, M>, <K, K>, <L, L> over elements [begin, end) of a group's matrices, scaled so that
// sums neither overflow nor vanish.
template <typename gram_t>
__device__ inline void add_products(
    const Grams<gram_t>& grams, int64_t group, int64_t begin, int64_t end, double energy_x,
    double energy_y, double (&sums)[3]) {
  using acc_t = acc_type<gram_t>;
  constexpr int kSize = Vector<gram_t>::kSize;
  const double of_k = 1 / energy_x, of_l = 1 / energy_y;
  const double of_cross = sqrt(of_k) * sqrt(of_l);
  const auto for_each = [&](int64_t size, auto&& f) {
    for_each_vector<kSize>(group * size + min(begin, size), group * size + min(end, size), f);
  };
  const auto scaled = [](const gram_t& value, double scale) {
    return scale * static_cast<acc_t>(value);
  };
  const auto add_squares = [&](const gram_t* values, int64_t size, double scale, double& sum) {
    for_each(size, [&](int64_t first, int count) {
      const auto x = load<Vector<gram_t>>(values + first, count, grams.wide);
      for (int v = 0; v < kSize; ++v)
        sum += scaled(x.values[v], scale) * scaled(x.values[v], scale);
    });
  };
  if (grams.cross != nullptr) {
    add_squares(grams.cross, grams.size_cross, of_cross, sums[0]);
    add_squares(grams.k, grams.size_k, of_k, sums[1]);
    add_squares(grams.l, grams.size_l, of_l, sums[2]);
    return;
  }
  for_each(grams.size_k, [&](int64_t first, int count) {
    const auto x = load<Vector<gram_t>>(grams.k + first, count, grams.wide);
    const auto y = load<Vector<gram_t>>(grams.l + first, count, grams.wide);
    for (int v = 0; v < kSize; ++v) {  // beyond the count, zeros
      const double x_v = scaled(x.values[v], of_k), y_v = scaled(y.values[v], of_l);
      sums[0] += x_v * y_v, sums[1] += x_v * x_v, sums[2] += y_v * y_v;
    }
  });
}

// The alignments of groups of one part, else the sums (G, parts, 3) of every part.
template <typename gram_t>
__global__ void __launch_bounds__(kThreads, 1) sum_parts_kernel(
    Grams<gram_t> grams, int64_t groups, int64_t parts, int64_t part,
    Closing<acc_type<gram_t>> close, double* __restrict__ part_sums) {
  for (int64_t i = blockIdx.x; i < groups * parts; i += gridDim.x) {
    const int64_t group = i / parts, begin = i % parts * part;
    double sums[3] = {0, 0, 0};
    add_products(
        grams, group, begin, begin + part, close.energy_x[3 * group + 1],
        close.energy_y[3 * group + 1], sums);
    block_sum(sums);
    if (threadIdx.x != 0) continue;
    if (parts == 1) {
      close(group, sums);
    } else {
      for (int j = 0; j < 3; ++j) part_sums[3 * i + j] = sums[j];
    }
  }
}

template <typename acc_t>
__global__ void __launch_bounds__(kThreads, 1) gram_alignment_kernel(
    const double* __restrict__ part_sums, int64_t groups, int64_t parts, Closing<acc_t> close) {
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    double sums[3] = {0, 0, 0};
    for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
      for (int j = 0; j < 3; ++j) sums[j] += part_sums[3 * (group * parts + i) + j];
    }
    block_sum(sums);
    if (threadIdx.x == 0) close(group, sums);
  }
}

Tensor gram_alignment(
    const Tensor& alignment,             // (G); written
    const Tensor& k,                     // (G, N_k, N_k)
    const Tensor& l,                     // (G, N_l, N_l)
    const std::optional<Tensor>& cross,  // (G, N_k, N_l)
    const Tensor& energy_x,              // (G, 3)
    const Tensor& energy_y,              // (G, 3)
    bool center) {
  check_gram_alignment(alignment, k, l, cross, energy_x, energy_y);
  const int64_t groups = k.size(0);
  const LaunchScope scope(k);
  Tensor coefficients = torch::stable::new_empty(k, {groups, 4}, ScalarType::Double);
  dispatch_rows(k.scalar_type(), "k", [&](auto zero) {
    using gram_t = decltype(zero);
    using acc_t = acc_type<gram_t>;
    const auto data = [](const Tensor& t) {
      return static_cast<const gram_t*>(t.const_data_ptr());
    };
    const auto size = [](const Tensor& t) { return t.size(1) * t.size(2); };
    const gram_t* of_cross = cross.has_value() ? data(*cross) : nullptr;
    const Grams<gram_t> grams{
        data(k),
        data(l),
        of_cross,
        size(k),
        size(l),
        cross.has_value() ? size(*cross) : 0,
        vectors_aligned(data(k)) && vectors_aligned(data(l)) && vectors_aligned(of_cross)};
    const Closing<acc_t> close{
        static_cast<const double*>(energy_x.const_data_ptr()),
        static_cast<const double*>(energy_y.const_data_ptr()),
        center,
        static_cast<double>(std::numeric_limits<acc_t>::epsilon()),
        static_cast<acc_t*>(alignment.mutable_data_ptr()),
        static_cast<double*>(coefficients.mutable_data_ptr())};
    const int64_t largest = std::max({grams.size_k, grams.size_l, grams.size_cross});
    const int64_t part = largest <= kSmall ? kSmall : kPart;
    const int64_t parts = (largest + part - 1) / part;
    const Tensor part_sums =
        torch::stable::new_empty(k, {groups, parts > 1 ? parts : 0, 3}, ScalarType::Double);
    double* sums = static_cast<double*>(part_sums.mutable_data_ptr());
    launch(
        scope, sum_parts_kernel<gram_t>, blocks_for(groups * parts), grams, groups, parts, part,
        close, sums);
    if (parts > 1) {
      launch(
          scope, gram_alignment_kernel<acc_t>, blocks_for(groups), static_cast<const double*>(sums),
          groups, parts, close);
    }
  });
  return coefficients;
}

}  // namespace

PCKA_KERNELS(m) { m.impl("gram_alignment_", TORCH_BOX(&gram_alignment)); }

}  // namespace pcka
