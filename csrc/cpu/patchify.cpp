// patchify on the CPU: bilinear resize, cut into patches, center, and the energies.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../dtypes.h"
#include "../geometry.h"
#include "../resize.h"

namespace pcka {
namespace {

constexpr int64_t kColumnBlock = 64;  // columns centered together: one strip of cache lines

template <typename acc_t>
std::vector<Tap<acc_t>> make_taps(int64_t in, int64_t out) {
  std::vector<Tap<acc_t>> taps(out);
  for (int64_t o = 0; o < out; ++o) taps[o] = bilinear_tap<acc_t>(o, in, out);
  return taps;
}

// A weight of 0 does not read its neighbour, so that an infinity there stays where it is.
template <typename acc_t>
acc_t interpolate(acc_t low, acc_t high, acc_t weight) {
  return weight == 0 ? low : (1 - weight) * low + weight * high;
}

// Resized pixels of every plane (b, c) into rows (G, N, D), not centered.
template <typename scalar_t, typename acc_t>
void fill_rows(const scalar_t* input, MapStrides in, const PatchGeometry& g, acc_t* rows) {
  const auto taps_y = make_taps<acc_t>(g.height, g.resized_h);
  const auto taps_x = make_taps<acc_t>(g.width, g.resized_w);
  torch::stable::parallel_for(0, g.batch * g.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t b = plane / g.channels, c = plane % g.channels;
      const scalar_t* source = input + b * in.b + c * in.c;
      acc_t* target = rows + b * g.stride_b + c * g.stride_c;
      for (int64_t y = 0; y < g.resized_h; ++y) {
        const Tap<acc_t> ty = taps_y[y];
        const scalar_t* upper = source + ty.low * in.y;
        const scalar_t* lower = source + ty.high * in.y;
        acc_t* line = target + (y / g.patch_h) * g.stride_ny + (y % g.patch_h) * g.stride_py;
        const auto read = [&](int64_t x) {
          return interpolate(
              static_cast<acc_t>(upper[x * in.x]), static_cast<acc_t>(lower[x * in.x]), ty.weight);
        };
        for (int64_t nx = 0, x = 0; nx < g.n_w; ++nx) {
          for (int64_t px = 0; px < g.patch_w; ++px, ++x) {
            const Tap<acc_t> tx = taps_x[x];
            line[nx * g.stride_nx + px * g.stride_px] =
                interpolate(read(tx.low), read(tx.high), tx.weight);
          }
        }
      }
    }
  });
}

struct Energy {
  double before = 0, after = 0;
};

// Centers columns [begin, end) of one (N, D) group over its rows.
template <typename acc_t>
Energy center_columns(acc_t* group, int64_t rows, int64_t columns, int64_t begin, int64_t end) {
  double mean[kColumnBlock] = {};
  Energy energy;
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t d = begin; d < end; ++d) {
      const double value = group[n * columns + d];
      mean[d - begin] += value;
      energy.before += value * value;
    }
  }
  for (int64_t d = 0; d < end - begin; ++d) mean[d] /= static_cast<double>(rows);
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t d = begin; d < end; ++d) {
      const acc_t value = static_cast<acc_t>(group[n * columns + d] - mean[d - begin]);
      group[n * columns + d] = value;
      energy.after += static_cast<double>(value) * value;
    }
  }
  return energy;
}

// Centers one row over its columns; without `center` only measures it.
template <typename acc_t>
Energy center_row(acc_t* row, int64_t columns, bool center) {
  double sum = 0;
  Energy energy;
  for (int64_t d = 0; d < columns; ++d) {
    sum += row[d];
    energy.before += static_cast<double>(row[d]) * row[d];
  }
  if (!center) return {energy.before, energy.before};
  const double mean = sum / static_cast<double>(columns);
  for (int64_t d = 0; d < columns; ++d) {
    row[d] = static_cast<acc_t>(row[d] - mean);
    energy.after += static_cast<double>(row[d]) * row[d];
  }
  return energy;
}

// Centers all groups in place. Each group is cut into units (strips of columns, or single rows)
// that are worked on in parallel; their energies are then summed in a fixed order.
template <typename acc_t>
void center_rows(acc_t* rows, const PatchGeometry& g, int64_t center, double* energy) {
  const bool strips = center == kOverRows;
  const int64_t units = strips ? (g.columns + kColumnBlock - 1) / kColumnBlock : g.rows;
  std::vector<Energy> partial(g.groups * units);
  torch::stable::parallel_for(0, g.groups * units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      acc_t* group = rows + (i / units) * g.rows * g.columns;
      const int64_t unit = i % units;
      if (strips) {
        const int64_t first = unit * kColumnBlock;
        partial[i] = center_columns(
            group, g.rows, g.columns, first, std::min(first + kColumnBlock, g.columns));
      } else {
        partial[i] = center_row(group + unit * g.columns, g.columns, center == kOverColumns);
      }
    }
  });
  for (int64_t i = 0; i < g.groups * units; ++i) {
    energy[2 * (i / units)] += partial[i].before;
    energy[2 * (i / units) + 1] += partial[i].after;
  }
}

std::tuple<Tensor, Tensor> patchify(
    const Tensor& input,  // (B, C, H, W), any strides
    int64_t patch_h, int64_t patch_w, int64_t group_by, int64_t center, ScalarType dtype) {
  const PatchGeometry g = make_geometry(input, "input", patch_h, patch_w, group_by);
  check_centering(center);
  check_rows_dtype(dtype, "dtype", input.scalar_type());
  Tensor rows = torch::stable::new_empty(
      input, {g.groups, g.rows, g.columns}, accumulation_dtype(input.scalar_type()));
  Tensor energy = torch::stable::new_zeros(input, {g.groups, 2}, ScalarType::Double);
  dispatch_floating(input.scalar_type(), "input", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    acc_t* values = static_cast<acc_t*>(rows.mutable_data_ptr());
    fill_rows(static_cast<const scalar_t*>(input.const_data_ptr()), map_strides(input), g, values);
    center_rows(values, g, center, static_cast<double*>(energy.mutable_data_ptr()));
  });
  return {rows, energy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CPU, m) { m.impl("patchify", TORCH_BOX(&patchify)); }

}  // namespace pcka
