// Existing rows: centering, scaling and energies.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtypes.h"
#include "../geometry.h"
#include "../scale.h"
#include "launch.h"
#include "reduce.h"
#include "vectors.h"

namespace pcka {

// Centers every row of (G, N, D) over its columns; one block per row. Sums are of differences from
// the row's first value; each vector is summed before it is added in float64.
template <typename acc_t, typename rows_t>
__global__ void __launch_bounds__(kThreads) center_over_columns_kernel(
    const acc_t* from, PatchGeometry g, int64_t rows, bool wide, rows_t* to,
    double* __restrict__ row_energy) {
  constexpr int kSize = Vector<acc_t>::kSize;
  for (int64_t i = blockIdx.x; i < rows; i += gridDim.x) {
    const acc_t* row = from + i * g.columns;
    const acc_t origin = row[0];
    const auto for_each_vector = [&](auto&& f) {
      for (int64_t d = threadIdx.x * kSize; d < g.columns; d += kThreads * kSize) {
        const int count = static_cast<int>(min(g.columns - d, int64_t{kSize}));
        f(d, count, load<Vector<acc_t>>(row + d, count, wide));
      }
    };
    double total[1] = {0};
    for_each_vector([&](int64_t, int count, const Vector<acc_t>& vector) {
      acc_t sum = 0;
      for (int v = 0; v < kSize; ++v) sum += v < count ? vector.values[v] - origin : acc_t(0);
      total[0] += sum;
    });
    block_sum(total);
    const double mean = origin + total[0] / static_cast<double>(g.columns);
    const acc_t high = static_cast<acc_t>(mean), low = static_cast<acc_t>(mean - high);
    double energy[1] = {0};
    for_each_vector([&](int64_t d, int count, const Vector<acc_t>& vector) {
      Vector<rows_t, kSize> centered;
      acc_t sum = 0;
      for (int v = 0; v < kSize; ++v) {
        const acc_t value = (vector.values[v] - high) - low;
        sum += v < count ? value * value : acc_t(0);
        centered.values[v] = static_cast<rows_t>(value);
      }
      energy[0] += sum;
      store(to + i * g.columns + d, centered, count, wide);
    });
    block_sum(energy);
    if (threadIdx.x == 0) {
      double* pair = row_energy + 2 * i;
      pair[0] = mean * mean * static_cast<double>(g.columns);
      pair[1] = energy[0];
    }
  }
}

// Sums a group's energies over its `parts`, and scales the group if necessary; one block per group.
template <typename rows_t>
__global__ void __launch_bounds__(kThreads) finish_groups_kernel(
    const double* __restrict__ part_energy, PatchGeometry g, int64_t groups, int64_t parts,
    bool scale, rows_t* __restrict__ rows, double* __restrict__ energy) {
  using acc_t = acc_type<rows_t>;
  for (int64_t i = blockIdx.x; i < groups; i += gridDim.x) {
    double total[2] = {0, 0};  // what centering removed, and what it left
    for (int64_t j = threadIdx.x; j < parts; j += kThreads) {
      const double* pair = part_energy + 2 * (i * parts + j);
      total[0] += pair[0], total[1] += pair[1];
    }
    block_sum(total);
    acc_t factor = 1;
    if (scale && needs_scale<acc_t>(total[1])) {  // the same for the whole block
      rows_t* values = rows + i * g.stored * g.columns;
      const int64_t count = g.rows * g.columns;
      acc_t largest = 0;
      for (int64_t j = threadIdx.x; j < count; j += kThreads) {
        largest = max(largest, abs(static_cast<acc_t>(values[j])));
      }
      factor = scale_of(static_cast<acc_t>(block_max(largest)));
      double left[1] = {0};
      for (int64_t j = threadIdx.x; j < count; j += kThreads) {
        const acc_t value = static_cast<acc_t>(values[j]) * factor;
        values[j] = static_cast<rows_t>(value);
        left[0] += static_cast<double>(value) * value;
      }
      block_sum(left);
      total[0] *= static_cast<double>(factor) * factor, total[1] = left[0];
    }
    if (threadIdx.x == 0) {
      energy[3 * i] = total[0] + total[1], energy[3 * i + 1] = total[1];
      energy[3 * i + 2] = factor;
    }
  }
}

}  // namespace pcka
