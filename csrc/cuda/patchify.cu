// patchify on CUDA: bilinear resize, cut into patches, center, and the energies.
//
// A block owns some columns of an image: of `channels` channels, a rectangle of the patches'
// pixels. First it folds (sums) the source lines over the patches down, which reads each only once,
// and the result over the patches across: this gives the columns' means. Then a thread owns one
// column, or one of several slices of its rows, and walks over the patches to write the centered
// rows. Neighbouring threads read neighbouring pixels directly through the L1 cache, many at a time
// before any is needed. Small tables in shared memory tell where the resized pixels read the map,
// so that no loop has a division, a 64-bit product or float64.

#include "../patchify.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>

#include "../library.h"
#include "centering.h"
#include "column_blocks.h"
#include "launch.h"
#include "resample.h"
#include "vectors.h"

namespace pcka {
namespace {

// Writes this thread's patches of a line, centered. Returns their energy.
template <typename scalar_t, typename acc_t, typename rows_t>
__device__ inline acc_t write_line(
    const Lines<scalar_t>& source, const Share& s, const Block& b, const Tiling& t, int patches,
    const NearTap<acc_t>* taps, acc_t high, acc_t low, int64_t stride, rows_t* __restrict__ to) {
  const int step = t.across * b.width;
  const int64_t step_to = t.across * stride;
  const NearTap<acc_t>* tap = taps + s.across * b.width + s.x;
  to += s.across * stride;
  acc_t energy = 0;
  for (int left = patches - s.across; left > 0; left -= kAcross * t.across) {
    acc_t values[kAcross];
    for (int j = 0; j < kAcross; ++j, tap += step) {
      const NearTap<acc_t> x = *tap;
      values[j] = interpolate(source[x.low], source[min(x.low + t.stride_x, t.last_x)], x.weight);
    }
    for (int j = 0; j < kAcross; ++j, to += step_to) {
      const acc_t centered = (values[j] - high) - low;
      if (j * t.across < left) {
        energy += centered * centered;
        *to = static_cast<rows_t>(centered);
      }
    }
  }
  return energy;
}

// Sums the source lines over the patches down, as they are blended for each line of a patch, minus
// `origin`; with clear, starting from 0. One work item is a source pixel of such a line.
template <typename scalar_t, typename acc_t>
__device__ inline void fold(
    const scalar_t* image, const MapStrides& in, const Block& b, const Tiling& t, const Span& span,
    int lines, bool has_origin, bool clear, Shared<acc_t>& shared) {
  const unsigned step = kThreads / b.channels;  // items apart; leftover threads are idle
  const unsigned k = threadIdx.x % b.channels, item = threadIdx.x / b.channels;
  if (item >= step) return;
  const scalar_t* plane = image + k * in.c;
  const acc_t origin = has_origin ? static_cast<acc_t>(load_constant(plane)) : acc_t(0);
  const int step_row = static_cast<int>(step / span.count);
  const int step_x = static_cast<int>(step % span.count);
  int row = static_cast<int>(item / span.count), x = static_cast<int>(item % span.count);
  for (; row < t.down * b.height; row += step_row) {
    const int slice = t.down == 1 ? 0 : row / b.height, y = row - slice * b.height;
    const scalar_t* pixel = plane + (span.begin + x) * t.stride_x;
    keep_in_registers(pixel);
    const NearTap<acc_t>* tap = shared.down + slice * b.height + y;
    acc_t sum = 0;
    for (int left = lines - slice; left > 0; left -= kDown * t.down) {
      acc_t values[kDown];
      for (int j = 0; j < kDown; ++j, tap += t.down * b.height) {
        const NearTap<acc_t> of = *tap;
        values[j] = interpolate<acc_t>(
            load_constant(pixel + of.low),
            load_constant(pixel + min(of.low + t.stride_y, t.last_y)), of.weight);
      }
      for (int j = 0; j < kDown; ++j) sum += j * t.down < left ? values[j] - origin : acc_t(0);
    }
    acc_t& folded = shared.folded[(row * span.count + x) * b.channels + k];
    folded = clear ? sum : folded + sum;
    x += step_x;
    if (x >= span.count) x -= span.count, ++row;
  }
}

// The folded values, summed over this thread's patches across.
template <typename acc_t>
__device__ inline acc_t add_folded(
    const Shared<acc_t>& shared, const Share& s, const Block& b, const Tiling& t, const Span& span,
    int patches) {
  const acc_t* line = shared.folded + (s.down * b.height + s.y) * span.count * b.channels + s.k;
  acc_t sum = 0;
  for (int patch = s.across; patch < patches; patch += t.across) {
    const int tap = patch * b.width + s.x, left = shared.pixels[tap];
    const int right = min(left + 1, span.count - 1);
    sum +=
        interpolate(line[left * b.channels], line[right * b.channels], shared.across[tap].weight);
  }
  return sum;
}

// Sums the values of the threads that share a column, in a fixed order; each of them gets the sum.
__device__ inline double sum_slices(
    double value, double* shared, const Share& share, const Block& b, const Tiling& t) {
  const int columns = b.channels * b.height * b.width, column = share.column(b);
  if (share.works) shared[share.slice(t) * columns + column] = value;
  __syncthreads();
  double total = 0;
  for (int slice = 0; slice < t.slices(); ++slice) total += shared[slice * columns + column];
  return total;
}

// Sums the energies of the block's columns: in sums[0] what centering removed, in sums[1] what it
// left. In float32, the latter may have overflowed or underflowed.
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
__global__ void __launch_bounds__(kThreads, sizeof(scalar_t) == 8 ? 2 : 4) patchify_kernel(
    const scalar_t* __restrict__ input, const scalar_t* __restrict__ second, unsigned maps,
    MapStrides in, PatchGeometry g, Tiling t, int64_t group_by, bool center,
    rows_t* __restrict__ rows, double* __restrict__ part_energy) {
  using acc_t = acc_type<scalar_t>;
  __shared__ Shared<acc_t> shared;

  for (unsigned i = blockIdx.x; i < maps * t.blocks; i += gridDim.x) {
    const unsigned map = i / t.blocks;
    const Block block = make_block(i - map * t.blocks, t, g);
    const Share share = make_share(block, t);
    const scalar_t* image = (map == 0 ? input : second) + block.b * in.b + block.c * in.c;
    const scalar_t* plane = image + share.k * in.c;
    rows_t* column = rows + map * g.groups * g.stored * g.columns + block.b * g.stride_b +
                     (block.c + share.k) * g.stride_c + (block.py + share.y) * g.stride_py +
                     (block.px + share.x) * g.stride_px;
    Axis y{0, g.patch_h, 0, block.py, block.height, g.height, g.resized_h, t.stride_y};
    Axis x{0, g.patch_w, 0, block.px, block.width, g.width, g.resized_w, t.stride_x};
    Span span{0, 0};
    // The mean in two parts, for means far from zero: sums, in float32, are of differences from a
    // nearby value. A single row is its own mean, to the last bit.
    const bool has_origin = g.rows > 1;
    acc_t high = 0, low = 0;
    double total = 0;
    for (int walk = center ? 0 : 1; walk < 2; ++walk) {
      total = 0;
      for (int64_t nx = 0; nx < g.n_w; nx += t.patches) {
        for (int64_t ny = 0; ny < g.n_h; ny += t.lines) {
          const bool same_x = x.count > 0 && x.first == nx, same_y = y.count > 0 && y.first == ny;
          if (!same_x || !same_y) {
            x.first = nx, y.first = ny;
            x.count = static_cast<int>(min(static_cast<int64_t>(t.patches), g.n_w - nx));
            y.count = static_cast<int>(min(static_cast<int64_t>(t.lines), g.n_h - ny));
            __syncthreads();  // the last taps have been read
            if (!same_x) {
              span = make_span(x);
              shared.fill_across(x, (kAcross - 1) * t.across, span);
            }
            if (!same_y) shared.fill_down(y, (kDown - 1) * t.down);
            __syncthreads();
          }
          if (walk == 0) {
            fold(image, in, block, t, span, y.count, has_origin, ny == 0, shared);
            continue;
          }
          if (!share.works) continue;
          for (int line = share.down; line < y.count; line += t.down) {
            total += write_line(
                Lines<scalar_t>(plane, shared.down[line * block.height + share.y], t), share, block,
                t, x.count, shared.across, high, low, g.stride_nx,
                column + (ny + line) * g.stride_ny + nx * g.stride_nx);
          }
        }
        if (walk > 0) continue;
        __syncthreads();
        if (share.works) total += add_folded(shared, share, block, t, span, x.count);
        __syncthreads();
      }
      if (walk > 0) break;
      total = sum_slices(total, shared.sums[0], share, block, t) / static_cast<double>(g.rows);
      if (has_origin) total += static_cast<double>(static_cast<acc_t>(load_constant(plane)));
      high = static_cast<acc_t>(total);
      low = static_cast<acc_t>(total - high);
    }
    for (int64_t n = g.rows; share.works && share.slice(t) == 0 && n < g.stored; ++n) {
      column[n * g.columns] = rows_t(0);
    }
    const double energy = sum_slices(total, shared.sums[1], share, block, t);
    const double mean = static_cast<double>(high) + low;
    __syncthreads();
    if (share.works && share.slice(t) == 0) {
      shared.sums[0][share.column(block)] = mean * mean * static_cast<double>(g.rows);
      shared.sums[1][share.column(block)] = energy;
    }
    __syncthreads();
    write_energies(shared, block, t, g, group_by, part_energy + 2 * map * g.groups * t.parts);
  }
}

// The map, or a copy of it if the pixels of a plane are too far apart for 32-bit offsets.
Tensor with_near_pixels(const Tensor& input) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  const int64_t height = input.size(2), width = input.size(3);
  STD_TORCH_CHECK(height * width < most, "input has too many pixels: split it");
  const int64_t farthest = (height - 1) * input.stride(2) + (width - 1) * input.stride(3);
  return farthest < most ? input : torch::stable::contiguous(input);
}

bool same_strides(const MapStrides& a, const MapStrides& b) {
  return a.b == b.b && a.c == b.c && a.y == b.y && a.x == b.x;
}

// Rows of one or two maps, and the energies (maps, G, parts, 2) of their columns.
template <typename scalar_t, typename rows_t>
void fill_rows(
    const LaunchScope& scope, const Tensor& input, const Tensor* second, const PatchGeometry& g,
    int64_t group_by, bool center, rows_t* rows, double* energy) {
  const MapStrides in = map_strides(input);
  const Tiling t = make_tiling<acc_type<scalar_t>>(in, g, group_by);
  const bool together = second != nullptr && same_strides(in, map_strides(*second));
  const unsigned maps = together ? 2 : 1;
  launch(
      scope, patchify_kernel<scalar_t, rows_t>, blocks_for(maps * int64_t{t.blocks}),
      data<scalar_t>(input), together ? data<scalar_t>(*second) : nullptr, maps, in, g, t, group_by,
      center, rows, energy);
  if (second == nullptr || together) return;
  fill_rows<scalar_t>(
      scope, *second, nullptr, g, group_by, center, rows + g.groups * g.stored * g.columns,
      energy + 2 * g.groups * t.parts);
}

struct Cuda {
  template <typename scalar_t, typename rows_t>
  static void run(
      const Patchify<rows_t>& job, const Tensor& input, const std::optional<Tensor>& second) {
    using acc_t = acc_type<scalar_t>;
    const LaunchScope scope(input);
    const PatchGeometry& g = job.g;
    const Tensor first = with_near_pixels(input);
    const Tensor other = second.has_value() ? with_near_pixels(*second) : first;
    const int64_t groups = (second.has_value() ? 2 : 1) * g.groups;
    const bool over_columns = job.center == kOverColumns;
    const int64_t parts = energy_parts(g, job.group_by);
    const Tensor part_energy = torch::stable::new_empty(
        input, {groups, over_columns ? std::max(g.stored, parts) : parts, 2}, ScalarType::Double);
    double* energy = mutable_data<double>(part_energy);
    const auto fill = [&](auto* rows) {
      fill_rows<scalar_t>(
          scope, first, second.has_value() ? &other : nullptr, g, job.group_by,
          job.center == kOverRows, rows, energy);
    };
    if (over_columns) {
      // Centered before they are rounded: bfloat16 rows are made from float32 ones.
      constexpr bool rounds = !std::is_same_v<rows_t, acc_t>;
      const Tensor unrounded = torch::stable::new_empty(
          input, {rounds ? groups * g.stored * g.columns : 0},
          accumulation_dtype(input.scalar_type()));
      acc_t* from = mutable_data<acc_t>(unrounded);
      if constexpr (!rounds) from = job.rows;
      fill(from);
      launch(
          scope, center_over_columns_kernel<acc_t, rows_t>, blocks_for(groups * g.stored), from, g,
          groups * g.stored, vectors_aligned(from, g.columns) && vectors_aligned(job.rows),
          job.rows, energy);
    } else {
      fill(job.rows);
    }
    launch(
        scope, finish_groups_kernel<rows_t>, blocks_for(groups), energy, g, groups,
        over_columns ? g.stored : parts, job.scale, job.rows, job.energy);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pcka, CUDA, m) { m.impl("patchify_", TORCH_BOX(&patchify<Cuda>)); }

}  // namespace pcka
