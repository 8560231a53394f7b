// Existing rows: centering, scaling and energies.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../dtypes.h"
#include "../geometry.h"
#include "../scale.h"
#include "lines.h"

namespace pcka {

constexpr int64_t kColumnBlock = 512;  // columns of a matrix centered together

struct Energy {
  double before = 0, after = 0;
};

// Destination of the groups' energies (G, 3).
struct Energies {
  double* data;
  int64_t groups;

  // Sums equally many values per group, in order.
  void set(const std::vector<Energy>& values) const {
    const int64_t units = static_cast<int64_t>(values.size()) / groups;
    for (int64_t i = 0; i < groups; ++i) {
      Energy sum;
      for (int64_t j = i * units; j < (i + 1) * units; ++j) {
        sum.before += values[j].before, sum.after += values[j].after;
      }
      data[3 * i] = sum.before, data[3 * i + 1] = sum.after, data[3 * i + 2] = 1;
    }
  }
};

// Matrices (G, N, D) of any strides; row n lies at pixel (n / across, n % across).
template <typename scalar_t>
struct Matrices {
  const scalar_t* data;
  int64_t groups, rows, columns, across;
  int64_t stride_group, stride_y, stride_x, stride_column;

  const scalar_t* row(int64_t group, int64_t n) const {
    return data + group * stride_group + n / across * stride_y + n % across * stride_x;
  }
};

// Writes the matrices centered over their rows (or as they are) to `out` (G, stored, D), which may
// be their own memory.
template <typename scalar_t, typename rows_t>
void center_matrices(
    const Matrices<scalar_t>& m, bool center, rows_t* out, int64_t stored, const Energies& energy) {
  using acc_t = acc_type<scalar_t>;
  const int64_t blocks = ceil_div(m.columns, kColumnBlock);
  std::vector<Energy> parts(m.groups * blocks);
  torch::stable::parallel_for(0, m.groups * blocks, 1, [&](int64_t begin, int64_t end) {
    acc_t line[kColumnBlock], means_high[kColumnBlock], means_low[kColumnBlock];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, first = i % blocks * kColumnBlock;
      const int64_t count = std::min(kColumnBlock, m.columns - first);
      const auto load = [&](int64_t n) {
        const scalar_t* row = m.row(group, n) + first * m.stride_column;
        if (m.stride_column == 1) return convert(row, count, line);
        for (int64_t d = 0; d < count; ++d) line[d] = static_cast<acc_t>(row[d * m.stride_column]);
      };
      Energy& energy_of_block = parts[i];
      if (center) {
        double sums[kColumnBlock] = {};
        for (int64_t n = 0; n < m.rows; ++n) load(n), add_line(line, count, sums);
        for (int64_t d = 0; d < count; ++d) {
          const double mean = sums[d] / static_cast<double>(m.rows);
          const Mean<acc_t> of_column(mean);
          means_high[d] = of_column.high, means_low[d] = of_column.low;
          energy_of_block.before += mean * mean * static_cast<double>(m.rows);
        }
      }
      for (int64_t n = 0; n < m.rows; ++n) {
        load(n);
        if (center) subtract(line, means_high, means_low, count);
        energy_of_block.after += sum_squares(line, count);
        convert(line, count, out + (group * stored + n) * m.columns + first);
      }
      energy_of_block.before += energy_of_block.after;
    }
  });
  energy.set(parts);
}

// Centers every row of (G, N, D) over its columns, in place.
template <typename acc_t>
void center_over_columns(acc_t* rows, const PatchGeometry& g, const Energies& energy) {
  std::vector<Energy> parts(g.groups * g.rows);
  torch::stable::parallel_for(0, g.groups * g.rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      acc_t* row = rows + (i / g.rows * g.stored + i % g.rows) * g.columns;
      const double mean = sum(row, g.columns) / static_cast<double>(g.columns);
      subtract(row, Mean<acc_t>(mean), g.columns);
      parts[i].after = sum_squares(row, g.columns);
      parts[i].before = parts[i].after + mean * mean * static_cast<double>(g.columns);
    }
  });
  energy.set(parts);
}

// Zeroes the stored rows beyond those of the map.
template <typename rows_t>
void clear_further_rows(rows_t* rows, const PatchGeometry& g) {
  for (int64_t i = 0; i < g.groups; ++i) {
    rows_t* first = rows + (i * g.stored + g.rows) * g.columns;
    std::fill_n(first, (g.stored - g.rows) * g.columns, rows_t(0));
  }
}

// Scales the groups whose Grams would leave the range of their type.
template <typename rows_t>
void scale_extreme_groups(rows_t* rows, const PatchGeometry& g, double* energy) {
  using acc_t = acc_type<rows_t>;
  torch::stable::parallel_for(0, g.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double* of_group = energy + 3 * i;
      if (!needs_scale<acc_t>(of_group[1])) continue;
      const int64_t count = g.rows * g.columns;
      rows_t* values = rows + i * g.stored * g.columns;
      acc_t largest = 0;
      for (int64_t j = 0; j < count; ++j) {
        largest = std::max(largest, std::abs(static_cast<acc_t>(values[j])));
      }
      const acc_t scale = scale_of(largest);
      double after = 0;
      for (int64_t j = 0; j < count; ++j) {
        const acc_t value = static_cast<acc_t>(values[j]) * scale;
        values[j] = static_cast<rows_t>(value);
        after += static_cast<double>(value) * value;
      }
      const double taken = (of_group[0] - of_group[1]) * scale * scale;
      of_group[0] = taken + after, of_group[1] = after, of_group[2] = scale;
    }
  });
}

}  // namespace pcka
