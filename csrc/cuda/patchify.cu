// patchify on CUDA: bilinear resize, cut into patches, center, and the energies.
//
// A block owns some columns of an image: of `channels` channels, a rectangle of the patches'
// pixels. A thread owns one column, or one of several slices of its rows, and walks over the
// patches: once for the column's mean, once to write the centered rows. Neighbouring threads read
// neighbouring pixels straight through the first-level cache, which holds what the second walk
// reads again. Where the resized pixels read the map stands in small tables in shared memory, so
// that the walk needs no division, no 64-bit product and no float64.

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "../dtypes.h"
#include "../geometry.h"
#include "../resize.h"
#include "../scale.h"
#include "launch.h"
#include "library.h"
#include "vectors.h"

namespace pcka {
namespace {

constexpr int kMaxTaps = 512;  // resized pixels, down or across, whose taps are at hand together
constexpr int kUnit = 16;      // columns of a patch's line whose energies are added up

// How the work is cut; the same for every block. What a sum is made of, and in which order, depends
// on the sizes alone: a map's memory layout changes no bit of the result.
struct Tiling {
  bool channels_first;          // threads run along c, else along x
  int channels, height, width;  // of a block: channels, and pixels of a patch
  int slices;                   // threads that share a column
  int lines, patches;           // down and across, whose taps are at hand together
  unsigned channel_blocks, y_blocks, x_blocks, blocks;
  int stride_x, last_x;              // between pixels of the map, and to the last of a line
  int64_t line_units, units, parts;  // energies: of a patch's line, of a channel, of a group
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Tiling make_tiling(const MapStrides& in, const PatchGeometry& g, int64_t group_by) {
  Tiling t{};
  const int64_t area = g.patch_h * g.patch_w;
  const auto share = [](int64_t wanted, int64_t least, int64_t most) {
    return static_cast<int>(std::clamp<int64_t>(wanted, least, std::max(least, most)));
  };
  t.slices = share(kThreads / std::max<int64_t>(area, 32), 1, g.n_h);
  const int threads = kThreads / t.slices;
  t.channels_first = in.c < in.x || (in.c == 1 && area == 1);
  const int64_t unit = std::min<int64_t>(g.patch_w, kUnit);
  t.channels =
      share(t.channels_first ? 32 : threads / area, 1, std::min(g.channels, threads / unit));
  const int64_t columns = threads / t.channels;
  t.width = static_cast<int>(g.patch_w <= columns ? g.patch_w : columns / kUnit * kUnit);
  t.height = share(columns / t.width, 1, g.patch_h);
  t.lines = share(kMaxTaps / std::min<int64_t>(g.patch_h, kThreads), 1, g.n_h);
  t.patches = share(kMaxTaps / std::min<int64_t>(g.patch_w, kThreads), 1, g.n_w);
  const int64_t channel_blocks = ceil_div(g.channels, t.channels);
  const int64_t y_blocks = ceil_div(g.patch_h, t.height), x_blocks = ceil_div(g.patch_w, t.width);
  const int64_t blocks = g.batch * channel_blocks * y_blocks * x_blocks;
  STD_TORCH_CHECK(
      2 * blocks <= std::numeric_limits<int>::max(), "input has too many channels: split it");
  t.channel_blocks = static_cast<unsigned>(channel_blocks);
  t.y_blocks = static_cast<unsigned>(y_blocks), t.x_blocks = static_cast<unsigned>(x_blocks);
  t.blocks = static_cast<unsigned>(blocks);
  t.stride_x = g.width == 1 ? 0 : static_cast<int>(in.x);
  t.last_x = static_cast<int>(t.stride_x * (g.width - 1));
  t.line_units = ceil_div(g.patch_w, kUnit);
  t.units = g.patch_h * t.line_units;
  t.parts = group_by == kPosition  ? g.columns
            : group_by == kChannel ? g.batch * t.units
                                   : g.channels * t.units;
  return t;
}

// The columns of a block: channels [c, c + channels) of image b, and a rectangle of a patch's
// pixels.
struct Block {
  int64_t b, c;
  int channels, py, px, height, width;
};

__device__ inline Block make_block(unsigned i, const Tiling& t, const PatchGeometry& g) {
  Block block;
  block.px = static_cast<int>(i % t.x_blocks) * t.width, i /= t.x_blocks;
  block.py = static_cast<int>(i % t.y_blocks) * t.height, i /= t.y_blocks;
  block.c = static_cast<int64_t>(i % t.channel_blocks) * t.channels;
  block.b = i / t.channel_blocks;
  block.channels = static_cast<int>(min(static_cast<int64_t>(t.channels), g.channels - block.c));
  block.height = static_cast<int>(min(static_cast<int64_t>(t.height), g.patch_h - block.py));
  block.width = static_cast<int>(min(static_cast<int64_t>(t.width), g.patch_w - block.px));
  return block;
}

// What a thread does: rows slice, slice + slices, ... of lines of patches, of one column.
struct Share {
  int slice, k, y, x;  // channel and pixel of the block
  bool works;          // a few threads may be left over

  __device__ int column(const Block& b) const { return (k * b.height + y) * b.width + x; }
};

__device__ inline Share make_share(const Block& b, const Tiling& t) {
  const unsigned area = b.height * b.width, columns = b.channels * area;
  const unsigned slice = threadIdx.x / columns, column = threadIdx.x % columns;
  const unsigned k = t.channels_first ? column % b.channels : column / area;
  const unsigned pixel = t.channels_first ? column / b.channels : column % area;
  return {
      static_cast<int>(slice), static_cast<int>(k), static_cast<int>(pixel / b.width),
      static_cast<int>(pixel % b.width), static_cast<int>(slice) < t.slices};
}

// How a resized pixel reads its line: one load.
template <typename acc_t>
struct alignas(2 * sizeof(acc_t)) NearTap {
  int low;  // down, the source line; across, the offset in a line
  acc_t weight;
};

// The taps of pixels [first, first + width) of the patches [patch, patch + patches) of an axis.
template <typename acc_t>
__device__ inline void fill_taps(
    NearTap<acc_t>* taps, int64_t patch, int patches, int64_t size, int first, int width,
    int64_t in, int64_t out, int stride) {
  for (int i = threadIdx.x; i < patches * width; i += kThreads) {
    const int64_t o = (patch + i / width) * size + first + i % width;
    const Tap<acc_t> tap = bilinear_tap<acc_t>(o, in, out);
    taps[i] = {static_cast<int>(tap.low) * stride, tap.weight};
  }
}

template <typename acc_t>
__device__ inline acc_t interpolate(acc_t low, acc_t high, acc_t weight) {
  return low + weight * (high - low);
}

// The two source lines of a line of resized pixels.
template <typename scalar_t>
class Line {
 public:
  using acc_t = acc_type<scalar_t>;

  __device__ Line(const scalar_t* plane, const NearTap<acc_t>& tap, int64_t stride, int64_t height)
      : upper_(plane + tap.low * stride),
        lower_(tap.low + 1 < height ? upper_ + stride : upper_),
        weight_(tap.weight) {
    keep_in_registers(upper_);
    keep_in_registers(lower_);
  }

  __device__ acc_t pixel(int offset) const { return load_constant(upper_ + offset); }

  // f(value) for one pixel of each of `patches` patches, whose taps are `width` apart.
  template <typename F>
  __device__ void for_each(
      const NearTap<acc_t>* taps, int width, int patches, const Tiling& t, F&& f) const {
    for (int patch = 0; patch < patches; ++patch, taps += width) {
      const NearTap<acc_t> x = *taps;
      const int right = min(x.low + t.stride_x, t.last_x);
      const acc_t above = interpolate<acc_t>(
          load_constant(upper_ + x.low), load_constant(upper_ + right), x.weight);
      const acc_t below = interpolate<acc_t>(
          load_constant(lower_ + x.low), load_constant(lower_ + right), x.weight);
      f(interpolate(above, below, weight_));
    }
  }

 private:
  const scalar_t *upper_, *lower_;
  acc_t weight_;
};

// The block's shared memory.
template <typename acc_t>
struct Shared {
  NearTap<acc_t> down[kMaxTaps], across[kMaxTaps];
  double sums[2][kThreads];
};

// The sum of the slices' values, in their order, for each of them.
__device__ inline double sum_slices(
    double value, double* shared, const Share& share, const Block& b, const Tiling& t) {
  const int columns = b.channels * b.height * b.width, column = share.column(b);
  if (share.works) shared[share.slice * columns + column] = value;
  __syncthreads();
  double total = 0;
  for (int slice = 0; slice < t.slices; ++slice) total += shared[slice * columns + column];
  return total;
}

// Adds up the energies of the block's columns: in sums[0] what centering took, in sums[1] what it
// left. float32 may have lost the latter to overflow or underflow.
template <typename acc_t>
__device__ inline void write_energies(
    const Shared<acc_t>& shared, const Block& b, const Tiling& t, const PatchGeometry& g,
    int64_t group_by, double* __restrict__ part_energy) {
  const bool by_position = group_by == kPosition;
  const int unit = by_position ? 1 : min(b.width, kUnit), units = (b.width + unit - 1) / unit;
  for (int i = threadIdx.x; i < b.channels * b.height * units; i += kThreads) {
    const int first = i % units * unit, y = i / units % b.height, k = i / units / b.height;
    const int column = (k * b.height + y) * b.width + first;
    double total[2] = {0, 0};
    for (int j = column; j < column + min(unit, b.width - first); ++j) {
      total[0] += shared.sums[0][j], total[1] += shared.sums[1][j];
    }
    const int64_t c = b.c + k, py = b.py + y, px = b.px + first;
    const int64_t of_channel = py * t.line_units + px / kUnit;
    const int64_t group = by_position ? py * g.patch_w + px : group_by == kChannel ? c : b.b;
    const int64_t part = by_position            ? b.b * g.channels + c
                         : group_by == kChannel ? b.b * t.units + of_channel
                                                : c * t.units + of_channel;
    double* pair = part_energy + 2 * (group * t.parts + part);
    pair[0] = total[0], pair[1] = total[1];
  }
}

template <typename scalar_t, typename rows_t>
__global__ void __launch_bounds__(kThreads, 4) patchify_kernel(
    const scalar_t* __restrict__ input, const scalar_t* __restrict__ second, unsigned maps,
    MapStrides in, PatchGeometry g, Tiling t, int64_t group_by, bool center,
    rows_t* __restrict__ rows, double* __restrict__ part_energy) {
  using acc_t = acc_type<scalar_t>;
  __shared__ Shared<acc_t> shared;

  for (unsigned i = blockIdx.x; i < maps * t.blocks; i += gridDim.x) {
    const unsigned map = i / t.blocks;
    const Block block = make_block(i - map * t.blocks, t, g);
    const Share share = make_share(block, t);
    const scalar_t* plane =
        (map == 0 ? input : second) + block.b * in.b + (block.c + share.k) * in.c;
    rows_t* column = rows + map * g.groups * g.stored * g.columns + block.b * g.stride_b +
                     (block.c + share.k) * g.stride_c + (block.py + share.y) * g.stride_py +
                     (block.px + share.x) * g.stride_px;
    acc_t high = 0, low = 0;  // the mean in two parts, for means far from zero
    double total = 0;
    int64_t staged_y = -1, staged_x = -1;
    for (int walk = center ? 0 : 1; walk < 2; ++walk) {
      total = 0;
      for (int64_t ny = 0; ny < g.n_h; ny += t.lines) {
        for (int64_t nx = 0; nx < g.n_w; nx += t.patches) {
          const int lines = static_cast<int>(min(static_cast<int64_t>(t.lines), g.n_h - ny));
          const int patches = static_cast<int>(min(static_cast<int64_t>(t.patches), g.n_w - nx));
          if (ny != staged_y || nx != staged_x) {
            __syncthreads();  // the last taps are read
            fill_taps(
                shared.down, ny, lines, g.patch_h, block.py, block.height, g.height, g.resized_h,
                1);
            fill_taps(
                shared.across, nx, patches, g.patch_w, block.px, block.width, g.width, g.resized_w,
                t.stride_x);
            __syncthreads();
            staged_y = ny, staged_x = nx;
          }
          if (!share.works) continue;
          const NearTap<acc_t>* taps = shared.across + share.x;
          for (int line = share.slice; line < lines; line += t.slices) {
            const Line<scalar_t> source(
                plane, shared.down[line * block.height + share.y], in.y, g.height);
            rows_t* to = column + (ny + line) * g.stride_ny + nx * g.stride_nx;
            // float32 sums over a line, of differences from a value near by, and float64 beyond.
            const acc_t origin = patches > 1 ? source.pixel(taps->low) : acc_t(0);
            acc_t sum = 0;
            if (walk == 0) {
              source.for_each(
                  taps, block.width, patches, t, [&](acc_t value) { sum += value - origin; });
              total += static_cast<double>(origin) * patches + sum;
            } else {
              source.for_each(taps, block.width, patches, t, [&](acc_t value) {
                const acc_t centered = (value - high) - low;
                sum += centered * centered;
                *to = static_cast<rows_t>(centered);
                to += g.stride_nx;
              });
              total += sum;
            }
          }
        }
      }
      if (walk > 0) break;
      total = sum_slices(total, shared.sums[0], share, block, t) / static_cast<double>(g.rows);
      high = static_cast<acc_t>(total);
      low = static_cast<acc_t>(total - high);
    }
    for (int64_t n = g.rows; share.works && share.slice == 0 && n < g.stored; ++n) {
      column[n * g.columns] = rows_t(0);
    }
    const double energy = sum_slices(total, shared.sums[1], share, block, t);
    const double mean = static_cast<double>(high) + low;
    __syncthreads();
    if (share.slice == 0) {
      shared.sums[0][share.column(block)] = mean * mean * static_cast<double>(g.rows);
      shared.sums[1][share.column(block)] = energy;
    }
    __syncthreads();
    write_energies(shared, block, t, g, group_by, part_energy + 2 * map * g.groups * t.parts);
  }
}

// Centers every row of (G, N, D) over its columns; one block a row. Sums are formed of what the
// values differ by from the row's first, a vector at a time before they are float64.
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

// The energies of a group from those of its `parts`, and the group scaled where it needs that; one
// block a group.
template <typename rows_t>
__global__ void __launch_bounds__(kThreads) finish_groups_kernel(
    const double* __restrict__ part_energy, PatchGeometry g, int64_t groups, int64_t parts,
    bool scale, rows_t* __restrict__ rows, double* __restrict__ energy) {
  using acc_t = acc_type<rows_t>;
  for (int64_t i = blockIdx.x; i < groups; i += gridDim.x) {
    double total[2] = {0, 0};  // what centering took, and what it left
    for (int64_t j = threadIdx.x; j < parts; j += kThreads) {
      const double* pair = part_energy + 2 * (i * parts + j);
      total[0] += pair[0], total[1] += pair[1];
    }
    block_sum(total);
    acc_t factor = 1;
    if (scale && needs_scale<acc_t>(total[1])) {  // for the whole block alike
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

// The map, or a copy of it where the pixels of a line are too far apart for offsets of 32 bits.
Tensor with_near_pixels(const Tensor& input) {
  const int64_t farthest = (input.size(3) - 1) * input.stride(3);
  return farthest < std::numeric_limits<int>::max() / 2 ? input : torch::stable::contiguous(input);
}

bool same_strides(const Tensor& a, const Tensor& b) {
  bool same = true;
  for (int64_t i = 0; i < 4; ++i) same = same && a.stride(i) == b.stride(i);
  return same;
}

// Rows of one or two maps, and the energies of their columns (maps, G, parts, 2).
template <typename scalar_t, typename rows_t>
void fill_rows(
    const LaunchScope& scope, const Tensor& input, const Tensor* second, const PatchGeometry& g,
    const Tiling& t, int64_t group_by, bool center, rows_t* rows, double* energy) {
  const auto data = [](const Tensor& map) {
    return static_cast<const scalar_t*>(map.const_data_ptr());
  };
  const bool together = second == nullptr || same_strides(input, *second);
  const unsigned maps = together && second != nullptr ? 2 : 1;
  launch(
      scope, patchify_kernel<scalar_t, rows_t>, blocks_for(maps * int64_t{t.blocks}), data(input),
      second == nullptr ? nullptr : data(*second), maps, map_strides(input), g, t, group_by, center,
      rows, energy);
  if (together) return;
  fill_rows<scalar_t>(
      scope, *second, nullptr, g, make_tiling(map_strides(*second), g, group_by), group_by, center,
      rows + g.groups * g.stored * g.columns, energy + 2 * g.groups * t.parts);
}

void patchify(
    const Tensor& rows,                   // (G or 2 G, N, D), contiguous; written
    const Tensor& energy,                 // (G or 2 G, 3); written
    const Tensor& input,                  // (B, C, H, W), any strides
    const std::optional<Tensor>& second,  // the same
    int64_t patch_h, int64_t patch_w, int64_t group_by, int64_t center, bool scale) {
  const PatchGeometry g = make_geometry(input, "input", patch_h, patch_w, group_by, &rows);
  check_patchify(rows, energy, input, second, g, group_by, center);
  const LaunchScope scope(input);
  const Tensor first = with_near_pixels(input);
  const Tensor other = second.has_value() ? with_near_pixels(*second) : first;
  const Tiling tiling = make_tiling(map_strides(first), g, group_by);
  const int64_t groups = rows.size(0);
  const Tensor part_energy =
      torch::stable::new_empty(energy, {groups, std::max(g.stored, tiling.parts), 2});
  double* parts = static_cast<double*>(part_energy.mutable_data_ptr());
  dispatch_map_and_rows(input.scalar_type(), rows.scalar_type(), "input", [&](auto map, auto row) {
    using scalar_t = decltype(map);
    using rows_t = decltype(row);
    using acc_t = acc_type<scalar_t>;
    rows_t* values = static_cast<rows_t*>(rows.mutable_data_ptr());
    const auto fill = [&](auto* to) {
      fill_rows<scalar_t>(
          scope, first, second.has_value() ? &other : nullptr, g, tiling, group_by,
          center == kOverRows, to, parts);
    };
    const bool over_columns = center == kOverColumns;
    if (over_columns) {
      // Centered before they are rounded: rows of bfloat16 come from others of float32.
      const Tensor wide = std::is_same_v<rows_t, acc_t>
                              ? rows
                              : torch::stable::new_empty(
                                    rows, rows.sizes(), accumulation_dtype(input.scalar_type()));
      acc_t* from = static_cast<acc_t*>(wide.mutable_data_ptr());
      fill(from);
      launch(
          scope, center_over_columns_kernel<acc_t, rows_t>, blocks_for(groups * g.stored),
          static_cast<const acc_t*>(from), g, groups * g.stored,
          vectors_aligned(from, g.columns) && vectors_aligned(values), values, parts);
    } else {
      fill(values);
    }
    launch(
        scope, finish_groups_kernel<rows_t>, blocks_for(groups), static_cast<const double*>(parts),
        g, groups, over_columns ? g.stored : tiling.parts, scale, values,
        static_cast<double*>(energy.mutable_data_ptr()));
  });
}

}  // namespace

PCKA_KERNELS(m) { m.impl("patchify_", TORCH_BOX(&patchify)); }

}  // namespace pcka
