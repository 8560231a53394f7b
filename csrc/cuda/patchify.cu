// patchify on CUDA: bilinear resize, cut into patches, center, and the energies.
//
// A block owns some columns of an image: of `channels` channels, a rectangle of the patches'
// pixels. First it folds the source lines over the patches down, which needs each only once, and
// what that leaves over the patches across: the columns' means. Then a thread owns one column, or
// one of several slices of its rows, and walks over the patches to write the centered rows.
// Neighbouring threads read neighbouring pixels straight through the first-level cache, many at a
// time before any is needed. Where the resized pixels read the map stands in small tables in shared
// memory, so that no loop has a division, a 64-bit product or float64.

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
// Values of a thread whose pixels are under way at once, of a column and of a line of patches.
constexpr int kDown = 4, kAcross = 3;
constexpr int kMaxSide = 64;  // of a block's rectangle
constexpr int kUnit = 8;      // columns of a patch's line whose energies make a part
constexpr int kFoldedLines = 16;
constexpr int kFoldedBytes = 16 * 1024;

// Source pixels of a line that are folded together.
template <typename acc_t>
constexpr int kMaxSpan = kFoldedBytes / sizeof(acc_t) / kFoldedLines;

// How the work is cut; the same for every block. What a sum is made of, and in which order, depends
// on the sizes alone: a map's memory layout changes no bit of the result.
struct Tiling {
  bool channels_first;          // threads run along c, else along x
  int channels, height, width;  // of a block: channels, and pixels of a patch
  int across, down;             // threads that share a column: they take every so manyth patch
  int lines, patches;           // down and across, whose taps are at hand together
  unsigned channel_blocks, y_blocks, x_blocks, blocks;
  int stride_y, last_y, stride_x, last_x;  // between pixels of a plane, and to the last
  int64_t line_units, units, parts;        // energies: of a patch's line, of a channel, of a group

  __device__ int slices() const { return across * down; }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int power_of_two_below(int64_t most) {
  int power = 1;
  while (2 * power <= most) power *= 2;
  return power;
}

template <typename acc_t>
Tiling make_tiling(const MapStrides& in, const PatchGeometry& g, int64_t group_by) {
  Tiling t{};
  const int64_t area = g.patch_h * g.patch_w;
  const auto share = [](int64_t wanted, int64_t least, int64_t most) {
    return static_cast<int>(std::clamp<int64_t>(wanted, least, std::max(least, most)));
  };
  // The threads of a warp read 32 neighbouring pixels, where there are as many.
  t.across = power_of_two_below(std::min(g.n_w, std::max<int64_t>(1, 32 / g.patch_w)));
  const int64_t lines = kMaxTaps / std::min<int64_t>(g.patch_h, kMaxSide);
  const int64_t patches = kMaxTaps / std::min<int64_t>(g.patch_w, kMaxSide);
  t.down = share(
      std::min((lines - 1) / (kDown - 1), kThreads / (t.across * std::max<int64_t>(area, 32))), 1,
      g.n_h);
  const int threads = kThreads / (t.across * t.down);
  t.channels_first = in.c < in.x || (in.c == 1 && area == 1);
  const int64_t unit = std::min<int64_t>(g.patch_w, kUnit), along_c = area == 1 ? 32 : 16;
  t.channels =
      share(t.channels_first ? along_c : threads / area, 1, std::min(g.channels, threads / unit));
  const int64_t columns = threads / t.channels;
  t.width = share(g.patch_w <= columns ? g.patch_w : columns / kUnit * kUnit, 1, kMaxSide);
  t.height = share(columns / t.width, 1, std::min<int64_t>(g.patch_h, kMaxSide));
  t.lines = share(lines - (kDown - 1) * t.down, 1, g.n_h);
  // A pixel more at either end may be read.
  const int64_t spanned = (kMaxSpan<acc_t> - 2) * g.resized_w / g.width / g.patch_w;
  t.patches = share(std::min(patches - (kAcross - 1) * t.across, spanned), 1, g.n_w);
  const int64_t channel_blocks = ceil_div(g.channels, t.channels);
  const int64_t y_blocks = ceil_div(g.patch_h, t.height), x_blocks = ceil_div(g.patch_w, t.width);
  const int64_t blocks = g.batch * channel_blocks * y_blocks * x_blocks;
  STD_TORCH_CHECK(
      2 * blocks <= std::numeric_limits<int>::max(), "input has too many channels: split it");
  t.channel_blocks = static_cast<unsigned>(channel_blocks);
  t.y_blocks = static_cast<unsigned>(y_blocks), t.x_blocks = static_cast<unsigned>(x_blocks);
  t.blocks = static_cast<unsigned>(blocks);
  t.stride_y = g.height == 1 ? 0 : static_cast<int>(in.y);
  t.stride_x = g.width == 1 ? 0 : static_cast<int>(in.x);
  t.last_y = static_cast<int>(t.stride_y * (g.height - 1));
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

// What a thread does: of one column, patches down, down + t.down, ... and likewise across.
struct Share {
  int down, across, k, y, x;  // channel and pixel of the block
  bool works;                 // a few threads may be left over

  __device__ int slice(const Tiling& t) const { return down * t.across + across; }
  __device__ int column(const Block& b) const { return (k * b.height + y) * b.width + x; }
};

__device__ inline Share make_share(const Block& b, const Tiling& t) {
  unsigned i = threadIdx.x;
  const auto next = [&](int size) {
    const unsigned at = i % size;
    i /= size;
    return static_cast<int>(at);
  };
  Share share{};
  if (t.channels_first) share.k = next(b.channels);
  share.x = next(b.width), share.across = next(t.across), share.y = next(b.height);
  if (!t.channels_first) share.k = next(b.channels);
  share.down = static_cast<int>(i);
  share.works = share.down < t.down;
  return share;
}

// How a resized pixel reads its axis: one load.
template <typename acc_t>
struct alignas(2 * sizeof(acc_t)) NearTap {
  int low;  // offset in a plane
  acc_t weight;
};

// Patches [first, first + count) of an axis, and the part of them that a block works on: pixels
// [pixel, pixel + width) of each.
struct Axis {
  int64_t first, size;
  int count, pixel, width;
  int64_t in, out;
  int stride;

  // The resized pixel that is the i-th of theirs.
  __device__ int64_t pixel_of(int i) const {
    return (first + min(i / width, count - 1)) * size + pixel + i % width;
  }
};

// Source pixels [begin, begin + count) of a line.
struct Span {
  int begin, count;
};

// Those that some patches across read.
__device__ inline Span make_span(const Axis& x) {
  const int64_t first = x.first * x.size + x.pixel;
  const int64_t last = (x.first + x.count - 1) * x.size + x.pixel + x.width - 1;
  const int64_t begin = bilinear_tap<float>(first, x.in, x.out).low;
  const int64_t end = bilinear_tap<float>(last, x.in, x.out).high + 1;
  return {static_cast<int>(begin), static_cast<int>(end - begin)};
}

// The block's shared memory.
template <typename acc_t>
struct Shared {
  NearTap<acc_t> down[kMaxTaps], across[kMaxTaps];
  short pixels[kMaxTaps];                      // of `across`: source pixels from the span's first
  acc_t folded[kFoldedBytes / sizeof(acc_t)];  // (down, height, span, channels)
  double sums[2][kThreads];

  // Of the axis, and `more` times its last patch: what is read together may end beyond it.
  __device__ void fill_down(const Axis& y, int more) {
    for (int i = threadIdx.x; i < (y.count + more) * y.width; i += kThreads) {
      const Tap<acc_t> tap = bilinear_tap<acc_t>(y.pixel_of(i), y.in, y.out);
      down[i] = {static_cast<int>(tap.low) * y.stride, tap.weight};
    }
  }

  __device__ void fill_across(const Axis& x, int more, const Span& span) {
    for (int i = threadIdx.x; i < (x.count + more) * x.width; i += kThreads) {
      const Tap<acc_t> tap = bilinear_tap<acc_t>(x.pixel_of(i), x.in, x.out);
      across[i] = {static_cast<int>(tap.low) * x.stride, tap.weight};
      pixels[i] = static_cast<short>(tap.low - span.begin);
    }
  }
};

template <typename acc_t>
__device__ inline acc_t interpolate(acc_t low, acc_t high, acc_t weight) {
  return low + weight * (high - low);
}

// The two source lines of a resized one.
template <typename scalar_t>
class Lines {
 public:
  using acc_t = acc_type<scalar_t>;

  __device__ Lines(const scalar_t* plane, const NearTap<acc_t>& tap, const Tiling& t)
      : upper_(plane + tap.low),
        lower_(plane + min(tap.low + t.stride_y, t.last_y)),
        weight_(tap.weight) {
    keep_in_registers(upper_);
    keep_in_registers(lower_);
  }

  __device__ acc_t operator[](int offset) const {
    return interpolate<acc_t>(
        load_constant(upper_ + offset), load_constant(lower_ + offset), weight_);
  }

 private:
  const scalar_t *upper_, *lower_;
  acc_t weight_;
};

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

// Adds the source lines up over the patches down, as they are blended for one line of the patches
// each, less `origin`; with clear, from 0. One item of work is a source pixel of such a line.
template <typename scalar_t, typename acc_t>
__device__ inline void fold(
    const scalar_t* image, const MapStrides& in, const Block& b, const Tiling& t, const Span& span,
    int lines, bool has_origin, bool clear, Shared<acc_t>& shared) {
  const unsigned step = kThreads / b.channels;  // items apart; threads that are left over rest
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

// What is folded, added up over this thread's patches across.
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

// The sum of the values of the threads that share a column, in a fixed order, for each of them.
__device__ inline double sum_slices(
    double value, double* shared, const Share& share, const Block& b, const Tiling& t) {
  const int columns = b.channels * b.height * b.width, column = share.column(b);
  if (share.works) shared[share.slice(t) * columns + column] = value;
  __syncthreads();
  double total = 0;
  for (int slice = 0; slice < t.slices(); ++slice) total += shared[slice * columns + column];
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
    // The mean in two parts, for means far from zero: sums are formed, in float32, of what the
    // values differ by from one that is near by. A single row is its own mean, to the last bit.
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
            __syncthreads();  // the last taps are read
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

// The map, or a copy of it where the pixels of a plane are too far apart for offsets of 32 bits.
Tensor with_near_pixels(const Tensor& input) {
  constexpr int64_t most = std::numeric_limits<int>::max() / 2;
  const int64_t height = input.size(2), width = input.size(3);
  STD_TORCH_CHECK(height * width < most, "input has too many pixels: split it");
  const int64_t farthest = (height - 1) * input.stride(2) + (width - 1) * input.stride(3);
  return farthest < most ? input : torch::stable::contiguous(input);
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
      scope, *second, nullptr, g,
      make_tiling<acc_type<scalar_t>>(map_strides(*second), g, group_by), group_by, center,
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
  const int64_t groups = rows.size(0);
  dispatch_map_and_rows(input.scalar_type(), rows.scalar_type(), "input", [&](auto map, auto row) {
    using scalar_t = decltype(map);
    using rows_t = decltype(row);
    using acc_t = acc_type<scalar_t>;
    const Tiling tiling = make_tiling<acc_t>(map_strides(first), g, group_by);
    const Tensor part_energy =
        torch::stable::new_empty(energy, {groups, std::max(g.stored, tiling.parts), 2});
    double* parts = static_cast<double*>(part_energy.mutable_data_ptr());
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
