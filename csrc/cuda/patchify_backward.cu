// The adjoint of patchify on CUDA: put the patches back, adjoint of the resize.
//
// A gather: every source pixel adds up the resized pixels that read it, so that there is one order
// of summation and no atomics. A block owns a tile of source pixels of some channels. It gathers
// vertically from the rows into shared memory, in vectors of 16 bytes along whichever of x and c
// is contiguous there, then horizontally from shared memory, and writes vectors again. Where a
// tile has more readers than are staged at once (maps enlarged many times over), they are gone
// through part by part.

#include <torch/csrc/stable/ops.h>

#include "../dtypes.h"
#include "../geometry.h"
#include "../resize.h"
#include "launch.h"
#include "library.h"
#include "vectors.h"

namespace pcka {
namespace {

constexpr int kStageBytes = 20 * 1024;  // of resized pixels, gathered vertically
constexpr int kOutputBytes = 8 * 1024;  // of source pixels
constexpr int kMaxTaps = 256;           // resized pixels, down or across, gone through together
constexpr int kMaxSource = 256;         // source pixels of a tile, down or across

// How the map is cut into tiles; the same for every block.
struct Tiling {
  bool channels_first_in, channels_first_out;  // the dimension that threads run along: c, or x
  bool wide_in, wide_out;                      // whether it can be accessed in vectors
  int channels, lines, pixels;                 // of a tile
  int span;                                    // resized pixels across, staged together
  int64_t channel_blocks, line_blocks, pixel_blocks, tiles;
};

template <typename scalar_t, typename rows_t>
Tiling make_tiling(
    const rows_t* rows, const scalar_t* grad_input, const MapStrides& out, const PatchGeometry& g) {
  constexpr int64_t size = sizeof(acc_type<scalar_t>);
  Tiling t{};
  t.channels_first_in = g.stride_c == 1;
  t.channels_first_out = out.x != 1 || (g.width == 1 && out.c == 1);
  t.wide_in = t.channels_first_in
                  ? vectors_aligned(rows, g.stride_b, g.stride_ny, g.stride_nx) &&
                        vectors_aligned(rows, g.stride_py, g.stride_px)
                  : vectors_aligned(rows, g.stride_b, g.stride_c, g.columns, g.patch_w);
  t.wide_out = t.channels_first_out ? out.c == 1 && vectors_aligned(grad_input, out.b, out.y, out.x)
                                    : vectors_aligned(grad_input, out.b, out.c, out.y);
  const bool along_x = !t.channels_first_in && !t.channels_first_out;
  t.channels = static_cast<int>(std::min<int64_t>(along_x ? 1 : 16, g.channels));
  t.span = static_cast<int>(
      std::min<int64_t>(
          kMaxTaps, std::min(kStageBytes / size / t.channels - 1, (g.resized_w + 7) / 8 * 8)) /
      8 * 8);
  // As many source pixels as have their readers within a span, in tiles of one width.
  const int64_t most =
      std::clamp<int64_t>((t.span - 8) * g.width / g.resized_w - 2, 1, along_x ? kMaxSource : 64);
  const int64_t across = (g.width + most - 1) / most;
  t.pixels = static_cast<int>((g.width + across - 1) / across);
  t.pixels = static_cast<int>(std::min<int64_t>((t.pixels + 7) / 8 * 8, kMaxSource));
  const int64_t staged = kStageBytes / size / (t.channels * (t.span | 1));
  const int64_t held = kOutputBytes / size / (t.channels * t.pixels);
  t.lines = static_cast<int>(
      std::clamp<int64_t>(std::min(staged, held), 1, std::min<int64_t>(g.height, kMaxSource)));
  t.channel_blocks = (g.channels + t.channels - 1) / t.channels;
  t.line_blocks = (g.height + t.lines - 1) / t.lines;
  t.pixel_blocks = (g.width + t.pixels - 1) / t.pixels;
  t.tiles = g.batch * t.channel_blocks * t.line_blocks * t.pixel_blocks;
  return t;
}

// Channels [c, c + channels) of image b, source pixels [y, y + lines) x [x, x + pixels).
struct Tile {
  int64_t b, c, y, x;
  int channels, lines, pixels;
};

__device__ inline Tile make_tile(int64_t i, const Tiling& t, const PatchGeometry& g) {
  Tile tile;
  tile.x = i % t.pixel_blocks * t.pixels, i /= t.pixel_blocks;
  tile.y = i % t.line_blocks * t.lines, i /= t.line_blocks;
  tile.c = i % t.channel_blocks * t.channels;
  tile.b = i / t.channel_blocks;
  tile.channels = static_cast<int>(min(static_cast<int64_t>(t.channels), g.channels - tile.c));
  tile.lines = static_cast<int>(min(static_cast<int64_t>(t.lines), g.height - tile.y));
  tile.pixels = static_cast<int>(min(static_cast<int64_t>(t.pixels), g.width - tile.x));
  return tile;
}

// Resized pixels [begin, begin + count) of one axis, and which source pixels of a tile they read.
template <typename acc_t>
struct Readers {
  int64_t offset[kMaxTaps];  // in the rows
  int low[kMaxTaps];         // from the tile's first source pixel
  acc_t weight[kMaxTaps];
  int first[kMaxSource], last[kMaxSource];  // of a source pixel, [first, last) of those here

  __device__ void fill(
      int64_t begin, int count, int64_t source, int sources, int64_t in, int64_t out, int64_t patch,
      int64_t stride_patch, int64_t stride_pixel) {
    for (int j = threadIdx.x; j < count; j += kThreads) {
      const Tap<acc_t> tap = bilinear_tap<acc_t>(begin + j, in, out);
      offset[j] = (begin + j) / patch * stride_patch + (begin + j) % patch * stride_pixel;
      low[j] = static_cast<int>(tap.low - source);
      weight[j] = tap.high == tap.low ? 0 : tap.weight;  // the last pixel is its own neighbour
    }
    for (int i = threadIdx.x; i < sources; i += kThreads) {
      const Range range = readers(source + i, in, out);
      first[i] = static_cast<int>(max(range.begin - begin, int64_t{0}));
      last[i] = static_cast<int>(min(range.end - begin, static_cast<int64_t>(count)));
    }
  }

  // The weight with which source pixel i enters resized pixel j.
  __device__ acc_t operator()(int i, int j) const {
    return low[j] == i ? 1 - weight[j] : low[j] + 1 == i ? weight[j] : acc_t(0);
  }
};

// The block's shared memory: resized pixels (lines, channels, width), gathered vertically, and the
// sums of the source pixels (lines, channels, pixels).
template <typename acc_t>
struct Stage {
  acc_t values[kStageBytes / sizeof(acc_t)];
  acc_t sums[kOutputBytes / sizeof(acc_t)];
  Readers<acc_t> down, across;
};

// The `count` resized pixels across that stand in `across`, for all lines of a tile, from the
// resized lines in `down`. One item of work is a vector of one line: along c, or along x.
template <typename rows_t, typename acc_t>
__device__ inline void gather_vertically(
    const rows_t* __restrict__ rows, const PatchGeometry& g, const Tiling& t, const Tile& tile,
    int count, int width, Stage<acc_t>& stage) {
  constexpr int kSize = Vector<rows_t>::kSize;
  // Along x, patches of an odd width end within a vector: there pixels are taken one by one.
  const int size = t.channels_first_in || t.wide_in ? kSize : 1;
  const int fast = t.channels_first_in ? tile.channels : count;
  const int slow = t.channels_first_in ? count : tile.channels;
  const int vectors = (fast + size - 1) / size;
  for (int item = threadIdx.x; item < tile.lines * slow * vectors; item += kThreads) {
    const int at = item % vectors * size, across = item / vectors % slow;
    const int line = item / vectors / slow, there = min(size, fast - at);
    const int k = t.channels_first_in ? at : across, x = t.channels_first_in ? across : at;
    const rows_t* pixel =
        rows + tile.b * g.stride_b + (tile.c + k) * g.stride_c + stage.across.offset[x];
    acc_t sums[kSize] = {};
    for (int j = stage.down.first[line]; j < stage.down.last[line]; ++j) {
      const Vector<rows_t> vector = load(pixel + stage.down.offset[j], there, 1, t.wide_in);
      const acc_t weight = stage.down(line, j);
      for (int v = 0; v < kSize; ++v) sums[v] += weight * static_cast<acc_t>(vector.values[v]);
    }
    acc_t* out = stage.values + (line * tile.channels + k) * width + x;
    for (int v = 0; v < kSize; ++v) {
      if (v < there) out[v * (t.channels_first_in ? width : 1)] = sums[v];
    }
  }
}

// Adds what stands in the stage to the source pixels; a thread keeps to its own of them.
template <typename acc_t>
__device__ inline void gather_horizontally(const Tile& tile, int width, Stage<acc_t>& stage) {
  for (int o = threadIdx.x; o < tile.lines * tile.channels * tile.pixels; o += kThreads) {
    const int x = o % tile.pixels;
    const acc_t* line = stage.values + o / tile.pixels * width;
    acc_t sum = 0;
    for (int j = stage.across.first[x]; j < stage.across.last[x]; ++j) {
      sum += stage.across(x, j) * line[j];
    }
    stage.sums[o] += sum;
  }
}

template <typename scalar_t, typename acc_t>
__device__ inline void write_tile(
    scalar_t* __restrict__ grad_input, const MapStrides& out, const Tiling& t, const Tile& tile,
    const Stage<acc_t>& stage) {
  constexpr int kSize = Vector<scalar_t>::kSize;
  const int fast = t.channels_first_out ? tile.channels : tile.pixels;
  const int slow = t.channels_first_out ? tile.pixels : tile.channels;
  const int vectors = (fast + kSize - 1) / kSize;
  const int next = t.channels_first_out ? tile.pixels : 1;
  for (int item = threadIdx.x; item < tile.lines * slow * vectors; item += kThreads) {
    const int at = item % vectors * kSize, across = item / vectors % slow;
    const int line = item / vectors / slow;
    const int k = t.channels_first_out ? at : across, x = t.channels_first_out ? across : at;
    const acc_t* sums = stage.sums + (line * tile.channels + k) * tile.pixels + x;
    Vector<scalar_t> vector;
    for (int v = 0; v < kSize; ++v) {
      if (at + v < fast) vector.values[v] = static_cast<scalar_t>(sums[v * next]);
    }
    scalar_t* to = grad_input + tile.b * out.b + (tile.c + k) * out.c + (tile.y + line) * out.y +
                   (tile.x + x) * out.x;
    store(to, vector, fast - at, t.channels_first_out ? out.c : out.x, t.wide_out);
  }
}

template <typename scalar_t, typename rows_t>
__global__ void __launch_bounds__(kThreads, 1) patchify_backward_kernel(
    const rows_t* __restrict__ rows, PatchGeometry g, Tiling t, MapStrides out,
    scalar_t* __restrict__ grad_input) {
  using acc_t = acc_type<scalar_t>;
  __shared__ Stage<acc_t> stage;
  for (int64_t i = blockIdx.x; i < t.tiles; i += gridDim.x) {
    const Tile tile = make_tile(i, t, g);
    const Range down{
        readers(tile.y, g.height, g.resized_h).begin,
        readers(tile.y + tile.lines - 1, g.height, g.resized_h).end};
    const Range across{
        readers(tile.x, g.width, g.resized_w).begin / 8 * 8,
        readers(tile.x + tile.pixels - 1, g.width, g.resized_w).end};
    __syncthreads();  // the last tile is written
    for (int o = threadIdx.x; o < tile.lines * tile.channels * tile.pixels; o += kThreads) {
      stage.sums[o] = 0;
    }
    for (int64_t oy = down.begin; oy < down.end; oy += kMaxTaps) {
      for (int64_t ox = across.begin; ox < across.end; ox += t.span) {
        const int height = static_cast<int>(min(down.end - oy, int64_t{kMaxTaps}));
        const int count = static_cast<int>(min(across.end - ox, static_cast<int64_t>(t.span)));
        __syncthreads();  // the last part is gathered
        stage.down.fill(
            oy, height, tile.y, tile.lines, g.height, g.resized_h, g.patch_h, g.stride_ny,
            g.stride_py);
        stage.across.fill(
            ox, count, tile.x, tile.pixels, g.width, g.resized_w, g.patch_w, g.stride_nx,
            g.stride_px);
        __syncthreads();
        gather_vertically(rows, g, t, tile, count, count | 1, stage);
        __syncthreads();
        gather_horizontally(tile, count | 1, stage);
      }
    }
    __syncthreads();
    write_tile(grad_input, out, t, tile, stage);
  }
}

void patchify_backward(
    const Tensor& grad_input,  // (B, C, H, W), any strides; written
    const Tensor& grad_rows,   // (G, N, D), contiguous
    int64_t patch_h, int64_t patch_w, int64_t group_by) {
  const PatchGeometry g = make_geometry(grad_input, "grad_input", patch_h, patch_w, group_by);
  check_rows(grad_rows, "grad_rows", g, grad_input.scalar_type());
  const LaunchScope scope(grad_input);
  const MapStrides out = map_strides(grad_input);
  dispatch_map_and_rows(
      grad_input.scalar_type(), grad_rows.scalar_type(), "grad_input", [&](auto map, auto row) {
        using scalar_t = decltype(map);
        using rows_t = decltype(row);
        const rows_t* rows = static_cast<const rows_t*>(grad_rows.const_data_ptr());
        scalar_t* values = static_cast<scalar_t*>(grad_input.mutable_data_ptr());
        const Tiling tiling = make_tiling(rows, values, out, g);
        launch(
            scope, patchify_backward_kernel<scalar_t, rows_t>, blocks_for(tiling.tiles), rows, g,
            tiling, out, values);
      });
}

}  // namespace

PCKA_KERNELS(m) { m.impl("patchify_backward_", TORCH_BOX(&patchify_backward)); }

}  // namespace pcka
