// patchify on CUDA: bilinear resize, cut into patches, center, and the energies.
//
// One pass over the map. A block owns a strip: for some channels of an image and one line of the
// patches, all the rows (n) of the columns that these make. It blends the source lines that the
// strip needs vertically into shared memory, in vectors of 16 bytes along whichever of x and c is
// contiguous, and from there interpolates horizontally twice: once for the columns' means, once to
// write the centered rows, in vectors again. Strips of the usual levels fit shared memory whole,
// so that the map is read once; larger ones are staged tile by tile, once for each of the two.

#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../geometry.h"
#include "../resize.h"
#include "launch.h"
#include "library.h"
#include "vectors.h"

namespace pcka {
namespace {

constexpr int kStageBytes = 20 * 1024;  // of blended source lines
constexpr int kMaxTaps = 512;           // resized pixels of a line that are staged together
constexpr int kMaxLines = 128;          // of blended source lines
constexpr int kMaxColumns = kThreads;   // of a strip

// How the map is cut into strips and tiles; the same for every block.
struct Tiling {
  bool channels_first_in, channels_first_out;  // the dimension that threads run along: c, or x
  bool wide_in, wide_out;                      // whether it can be accessed in vectors
  int channels;                                // of a strip
  int pixels;                                  // of a patch's line, that belong to a strip
  int patches;                                 // across, staged together
  int64_t channel_blocks, pixel_blocks, strips;
};

template <typename scalar_t, typename rows_t>
Tiling make_tiling(
    const scalar_t* input, const rows_t* rows, const MapStrides& in, const PatchGeometry& g) {
  Tiling t{};
  t.channels_first_in = in.x != 1 || (g.width == 1 && in.c == 1);
  t.channels_first_out = g.stride_c == 1;
  t.wide_in = t.channels_first_in ? in.c == 1 && vectors_aligned(input, in.b, in.y, in.x)
                                  : vectors_aligned(input, in.b, in.c, in.y);
  t.wide_out = t.channels_first_out
                   ? vectors_aligned(rows, g.stride_b, g.stride_ny, g.stride_nx) &&
                         vectors_aligned(rows, g.stride_py, g.stride_px)
                   : vectors_aligned(rows, g.stride_b, g.stride_c, g.columns, g.patch_w);
  const bool along_x = !t.channels_first_in && !t.channels_first_out;
  const int64_t wanted = along_x ? 1 : g.patch_w == 1 ? 64 : 16;
  t.channels = static_cast<int>(std::min(wanted, g.channels));
  t.pixels = static_cast<int>(std::min<int64_t>(g.patch_w, kMaxColumns / t.channels));
  // A tile reads at most two more source pixels than it has resized ones, and a vector's
  // alignment adds some; one line of it must fit the stage.
  const int64_t stage = kStageBytes / sizeof(acc_type<scalar_t>) / t.channels - 16;
  const int64_t fitting = std::min<int64_t>(kMaxTaps, stage) / g.patch_w;
  t.patches = t.pixels < g.patch_w ? 1 : static_cast<int>(std::clamp<int64_t>(fitting, 1, g.n_w));
  t.channel_blocks = (g.channels + t.channels - 1) / t.channels;
  t.pixel_blocks = (g.patch_w + t.pixels - 1) / t.pixels;
  t.strips = g.batch * t.channel_blocks * g.patch_h * t.pixel_blocks;
  return t;
}

// The strip of a block: channels [c, c + channels) of image b, pixels [px, px + pixels) of line py.
struct Strip {
  int64_t b, c, py, px;
  int channels, pixels;
};

__device__ inline Strip make_strip(int64_t i, const Tiling& t, const PatchGeometry& g) {
  Strip s;
  s.px = i % t.pixel_blocks * t.pixels, i /= t.pixel_blocks;
  s.py = i % g.patch_h, i /= g.patch_h;
  s.c = i % t.channel_blocks * t.channels;
  s.b = i / t.channel_blocks;
  s.channels = static_cast<int>(min(static_cast<int64_t>(t.channels), g.channels - s.c));
  s.pixels = static_cast<int>(min(static_cast<int64_t>(t.pixels), g.patch_w - s.px));
  return s;
}

template <typename acc_t>
__device__ inline acc_t interpolate(acc_t low, acc_t high, acc_t weight) {
  return low + weight * (high - low);
}

// Threads' shares of a strip: a vector of columns each, and every `slices`-th row of them.
struct Share {
  int columns, slices;  // vectors of columns, and threads for each
  int slice;            // of this thread; none (>= slices) for the threads left over
  int k, px, count;     // first column, and how many are there along the fast dimension
};

template <int size>
__device__ inline Share make_share(const Strip& s, bool channels_first) {
  Share share;
  const int fast = channels_first ? s.channels : s.pixels;
  const int vectors = (fast + size - 1) / size;
  share.columns = vectors * (channels_first ? s.pixels : s.channels);
  share.slices = kThreads / share.columns;
  share.slice = threadIdx.x / share.columns;
  const int column = threadIdx.x % share.columns;
  const int first = column % vectors * size, slow = column / vectors;
  share.k = channels_first ? first : slow;
  share.px = channels_first ? slow : first;
  share.count = min(size, fast - first);
  return share;
}

// Sums `values` over the threads that share a column, in a fixed order; slice 0 gets the sums.
template <int size>
__device__ inline void sum_slices(
    double (&values)[size], double (*shared)[kThreads], const Share& share) {
  for (int v = 0; v < size; ++v) shared[v][threadIdx.x] = values[v];
  __syncthreads();
  for (int step = 1; step < share.slices; step *= 2) {
    if (share.slice % (2 * step) == 0 && share.slice + step < share.slices) {
      for (int v = 0; v < size; ++v) {
        shared[v][threadIdx.x] += shared[v][threadIdx.x + step * share.columns];
      }
    }
    __syncthreads();
  }
  for (int v = 0; v < size; ++v) values[v] = shared[v][threadIdx.x];
}

// Patches [nx, nx + patches) across of rows of patches [ny, ny + lines), and the source pixels
// [first, first + span) that their line py reads.
struct Tile {
  int64_t ny, nx, first;
  int lines, patches, span;
  int width;  // of a staged line: odd, so that channels fall into different banks

  __device__ bool operator==(const Tile& other) const { return ny == other.ny && nx == other.nx; }
};

__device__ inline int64_t resized_x(int tap, int64_t nx, const Strip& s, const PatchGeometry& g) {
  return (nx + tap / s.pixels) * g.patch_w + s.px + tap % s.pixels;
}

// The tile at (ny, nx), as high as the stage of `capacity` values allows.
__device__ inline Tile make_tile(
    int64_t ny, int64_t nx, const Strip& s, const Tiling& t, const PatchGeometry& g, int vector,
    int capacity) {
  Tile tile;
  tile.ny = ny, tile.nx = nx;
  tile.patches = static_cast<int>(min(static_cast<int64_t>(t.patches), g.n_w - nx));
  const int last = tile.patches * s.pixels - 1;
  const int64_t left = bilinear_tap<float>(resized_x(0, nx, s, g), g.width, g.resized_w).low;
  const int64_t right = bilinear_tap<float>(resized_x(last, nx, s, g), g.width, g.resized_w).high;
  tile.first = t.channels_first_in ? left : left / vector * vector;
  tile.span = static_cast<int>(right - tile.first) + 1;
  tile.width = tile.span | 1;
  const int fitting = min(capacity / (s.channels * tile.width), kMaxLines);
  tile.lines = static_cast<int>(min(static_cast<int64_t>(fitting), g.n_h - ny));
  return tile;
}

// The block's shared memory: source lines (lines, channels, width), blended vertically, and how
// the resized pixels of a line read them.
template <typename acc_t>
struct Stage {
  static constexpr int kCapacity = kStageBytes / sizeof(acc_t);
  acc_t values[kCapacity];
  int low[kMaxTaps];  // from the tile's first pixel
  acc_t weight[kMaxTaps];
  int64_t upper[kMaxLines], lower[kMaxLines];  // source lines, as offsets in the map
  acc_t weight_lower[kMaxLines];

  // Resized pixel `tap` of channel k in one of the tile's lines.
  __device__ acc_t value(const Tile& tile, const Strip& s, int line, int k, int tap) const {
    const acc_t* pixels = values + (line * s.channels + k) * tile.width;
    return interpolate(pixels[low[tap]], pixels[min(low[tap] + 1, tile.span - 1)], weight[tap]);
  }
};

template <typename acc_t>
__device__ inline void fill_taps(
    const MapStrides& in, const PatchGeometry& g, const Strip& s, const Tile& tile,
    Stage<acc_t>& stage) {
  for (int tap = threadIdx.x; tap < tile.patches * s.pixels; tap += kThreads) {
    const Tap<acc_t> x = bilinear_tap<acc_t>(resized_x(tap, tile.nx, s, g), g.width, g.resized_w);
    stage.low[tap] = static_cast<int>(x.low - tile.first);
    stage.weight[tap] = x.weight;
  }
  for (int line = threadIdx.x; line < tile.lines; line += kThreads) {
    const Tap<acc_t> y =
        bilinear_tap<acc_t>((tile.ny + line) * g.patch_h + s.py, g.height, g.resized_h);
    stage.upper[line] = y.low * in.y, stage.lower[line] = y.high * in.y;
    stage.weight_lower[line] = y.weight;
  }
}

// One item of work is a vector of one line: along c at a pixel, or along x in a channel.
template <typename scalar_t, typename acc_t>
__device__ inline void fill_stage(
    const scalar_t* __restrict__ input, const MapStrides& in, const PatchGeometry& g,
    const Tiling& t, const Strip& s, const Tile& tile, Stage<acc_t>& stage) {
  constexpr int kSize = Vector<scalar_t>::kSize;
  const int fast = t.channels_first_in ? s.channels : tile.span;
  const int slow = t.channels_first_in ? tile.span : s.channels;
  const int vectors = (fast + kSize - 1) / kSize;
  for (int item = threadIdx.x; item < tile.lines * slow * vectors; item += kThreads) {
    const int at = item % vectors * kSize, across = item / vectors % slow;
    const int line = item / vectors / slow;
    const int k = t.channels_first_in ? at : across, x = t.channels_first_in ? across : at;
    const scalar_t* pixel = input + s.b * in.b + (s.c + k) * in.c + (tile.first + x) * in.x;
    const int64_t stride = t.channels_first_in ? in.c : in.x;
    // A vector along x may reach beyond the tile, but not beyond the line.
    const int64_t left = t.channels_first_in ? g.channels - s.c - k : g.width - tile.first - x;
    const int there = static_cast<int>(min(left, int64_t{kSize}));
    const Vector<scalar_t> upper = load(pixel + stage.upper[line], there, stride, t.wide_in);
    const Vector<scalar_t> lower = load(pixel + stage.lower[line], there, stride, t.wide_in);
    acc_t* out = stage.values + (line * s.channels + k) * tile.width + x;
    for (int v = 0; v < kSize; ++v) {
      if (at + v >= fast) continue;
      out[v * (t.channels_first_in ? tile.width : 1)] = interpolate(
          static_cast<acc_t>(upper.values[v]), static_cast<acc_t>(lower.values[v]),
          stage.weight_lower[line]);
    }
  }
}

template <typename scalar_t, typename rows_t>
__global__ void __launch_bounds__(kThreads, 1) patchify_kernel(
    const scalar_t* __restrict__ input, MapStrides in, PatchGeometry g, Tiling t, bool center,
    rows_t* __restrict__ rows, double* __restrict__ column_energy) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kSize = Vector<rows_t>::kSize;
  __shared__ Stage<acc_t> stage;
  __shared__ double sums[kSize][kThreads];

  for (int64_t i = blockIdx.x; i < t.strips; i += gridDim.x) {
    const Strip s = make_strip(i, t, g);
    const Share share = make_share<kSize>(s, t.channels_first_out);
    const int64_t stride = t.channels_first_out ? g.stride_c : g.stride_px;  // of its columns
    const int64_t column = s.b * g.stride_b + (s.c + share.k) * g.stride_c + s.py * g.stride_py +
                           (s.px + share.px) * g.stride_px;
    acc_t mean_high[kSize] = {}, mean_low[kSize] = {};  // two parts, for means far from zero
    Tile staged{-1, -1, 0, 0, 0, 0, 0};

    // f(v, value, line, patch) for this thread's share of the strip, staging what it needs;
    // after(line, patch) once its columns of a row are done.
    const auto for_each_value = [&](auto&& f, auto&& after) {
      for (int64_t nx = 0; nx < g.n_w; nx += t.patches) {
        Tile tile;
        for (int64_t ny = 0; ny < g.n_h; ny += tile.lines) {
          tile = make_tile(ny, nx, s, t, g, Vector<scalar_t>::kSize, Stage<acc_t>::kCapacity);
          if (!(tile == staged)) {
            __syncthreads();  // the last tile's readers are done
            fill_taps(in, g, s, tile, stage);
            __syncthreads();
            fill_stage(input, in, g, t, s, tile, stage);
            __syncthreads();
            staged = tile;
          }
          if (share.slice >= share.slices) continue;
          for (int row = share.slice; row < tile.lines * tile.patches; row += share.slices) {
            const int line = row / tile.patches, patch = row % tile.patches;
            for (int v = 0; v < kSize; ++v) {
              if (v >= share.count) continue;
              const int k = share.k + (t.channels_first_out ? v : 0);
              const int px = share.px + (t.channels_first_out ? 0 : v);
              f(v, stage.value(tile, s, line, k, patch * s.pixels + px));
            }
            after(ny + line, nx + patch);
          }
        }
      }
    };

    if (center) {
      double total[kSize] = {};
      for_each_value([&](int v, acc_t value) { total[v] += value; }, [](int64_t, int64_t) {});
      sum_slices(total, sums, share);
      for (int v = 0; v < kSize; ++v) {
        const double mean = sums[v][threadIdx.x % share.columns] / static_cast<double>(g.rows);
        mean_high[v] = static_cast<acc_t>(mean);
        mean_low[v] = static_cast<acc_t>(mean - mean_high[v]);
      }
      __syncthreads();  // the sums are read
    }
    double energy[kSize] = {};
    Vector<rows_t> out;
    for_each_value(
        [&](int v, acc_t value) {
          const acc_t centered = (value - mean_high[v]) - mean_low[v];
          energy[v] += static_cast<double>(centered) * centered;
          out.values[v] = static_cast<rows_t>(centered);
        },
        [&](int64_t ny, int64_t nx) {
          rows_t* to = rows + column + ny * g.stride_ny + nx * g.stride_nx;
          store(to, out, share.count, stride, t.wide_out);
        });
    sum_slices(energy, sums, share);
    for (int v = 0; share.slice == 0 && v < share.count; ++v) {
      const int64_t at = column + v * stride, size = g.rows * g.columns;
      double* pair = column_energy + 2 * (at / size * g.columns + at % size);
      const double mean = static_cast<double>(mean_high[v]) + mean_low[v];
      pair[0] = energy[v] + mean * mean * static_cast<double>(g.rows);
      pair[1] = energy[v];
    }
  }
}

// Centers every row of (G, N, D) over its columns, in place; one block a row.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) center_over_columns_kernel(
    acc_t* __restrict__ rows, PatchGeometry g, bool wide, double* __restrict__ row_energy) {
  constexpr int kSize = Vector<acc_t>::kSize;
  for (int64_t i = blockIdx.x; i < g.groups * g.rows; i += gridDim.x) {
    acc_t* row = rows + i * g.columns;
    const auto for_each_vector = [&](auto&& f) {
      for (int64_t d = threadIdx.x * kSize; d < g.columns; d += kThreads * kSize) {
        const int count = static_cast<int>(min(g.columns - d, int64_t{kSize}));
        f(d, count, load(row + d, count, 1, wide));
      }
    };
    double total[1] = {0};
    for_each_vector([&](int64_t, int, const Vector<acc_t>& vector) {  // beyond its count, zeros
      for (int v = 0; v < kSize; ++v) total[0] += vector.values[v];
    });
    block_sum(total);
    const double mean = total[0] / static_cast<double>(g.columns);
    const acc_t high = static_cast<acc_t>(mean), low = static_cast<acc_t>(mean - high);
    double energy[1] = {0};
    for_each_vector([&](int64_t d, int count, Vector<acc_t> vector) {
      for (int v = 0; v < kSize; ++v) {
        if (v >= count) continue;
        vector.values[v] = (vector.values[v] - high) - low;
        energy[0] += static_cast<double>(vector.values[v]) * vector.values[v];
      }
      store(row + d, vector, count, 1, wide);
    });
    block_sum(energy);
    if (threadIdx.x == 0) {
      row_energy[2 * i] = energy[0] + mean * mean * static_cast<double>(g.columns);
      row_energy[2 * i + 1] = energy[0];
    }
  }
}

// The energies of a group from those of its `parts` rows or columns; one block a group.
__global__ void __launch_bounds__(kThreads) sum_energies_kernel(
    const double* __restrict__ part_energy, int64_t groups, int64_t parts,
    double* __restrict__ energy) {
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    double total[2] = {0, 0};
    for (int64_t i = threadIdx.x; i < parts; i += kThreads) {
      const double* pair = part_energy + 2 * (group * parts + i);
      total[0] += pair[0], total[1] += pair[1];
    }
    block_sum(total);
    if (threadIdx.x == 0) energy[2 * group] = total[0], energy[2 * group + 1] = total[1];
  }
}

void patchify(
    const Tensor& rows,    // (G, N, D), contiguous; written
    const Tensor& energy,  // (G, 2); written
    const Tensor& input,   // (B, C, H, W), any strides
    int64_t patch_h, int64_t patch_w, int64_t group_by, int64_t center) {
  const PatchGeometry g = make_geometry(input, "input", patch_h, patch_w, group_by);
  check_patchify(rows, energy, input, g, group_by, center);
  const LaunchScope scope(input);
  const MapStrides in = map_strides(input);
  const int64_t parts = center == kOverColumns ? g.rows : g.columns;
  const Tensor part_energy =
      torch::stable::new_empty(energy, {g.groups, std::max(g.rows, g.columns), 2});
  double* part_data = static_cast<double*>(part_energy.mutable_data_ptr());
  dispatch_map_and_rows(input.scalar_type(), rows.scalar_type(), "input", [&](auto map, auto row) {
    using scalar_t = decltype(map);
    using rows_t = decltype(row);
    const scalar_t* source = static_cast<const scalar_t*>(input.const_data_ptr());
    rows_t* values = static_cast<rows_t*>(rows.mutable_data_ptr());
    const Tiling tiling = make_tiling(source, values, in, g);
    launch(
        scope, patchify_kernel<scalar_t, rows_t>, blocks_for(tiling.strips), source, in, g, tiling,
        center == kOverRows, values, part_data);
    if constexpr (std::is_same_v<rows_t, acc_type<scalar_t>>) {
      if (center == kOverColumns) {
        launch(
            scope, center_over_columns_kernel<rows_t>, blocks_for(g.groups * g.rows), values, g,
            vectors_aligned(values, g.columns), part_data);
      }
    }
  });
  launch(
      scope, sum_energies_kernel, blocks_for(g.groups), static_cast<const double*>(part_data),
      g.groups, parts, static_cast<double*>(energy.mutable_data_ptr()));
}

}  // namespace

PCKA_KERNELS(m) { m.impl("patchify_", TORCH_BOX(&patchify)); }

}  // namespace pcka
