// The columns of an image that a block of patchify works on, and each thread's share of them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "../geometry.h"
#include "launch.h"  // kThreads

namespace pcka {

constexpr int kMaxTaps = 512;  // resized pixels, down or across, whose taps are held at once
// Values per thread whose pixels are in flight at once, of a column and of a line of patches.
constexpr int kDown = 4, kAcross = 3;
constexpr int kMaxSide = 64;  // of a block's rectangle
constexpr int kUnit = 8;      // columns of a patch's line whose energies make a part
constexpr int kFoldedLines = 16;
constexpr int kFoldedBytes = 16 * 1024;

// Source pixels of a line that are folded together.
template <typename acc_t>
constexpr int kMaxSpan = kFoldedBytes / sizeof(acc_t) / kFoldedLines;

// How the work is divided; the same for every block. The terms of a sum, and their order, depend
// only on the sizes: a map's memory layout changes no bit of the result.
struct Tiling {
  bool channels_first;          // threads run along c, else along x
  int channels, height, width;  // of a block: channels, and pixels of a patch
  int across, down;             // threads that share a column, with every n-th patch each
  int lines, patches;           // down and across, whose taps are held at once
  unsigned channel_blocks, y_blocks, x_blocks, blocks;
  int stride_y, last_y, stride_x, last_x;  // between pixels of a plane, and to the last
  int64_t line_units, units, parts;        // energies: of a patch's line, of a channel, of a group

  __device__ int slices() const { return across * down; }
};

inline int power_of_two_below(int64_t most) {
  int power = 1;
  while (2 * power <= most) power *= 2;
  return power;
}

// Parts in which a group's energies are summed: by position every column is one, else up to kUnit
// columns of a patch's line are.
inline int64_t energy_parts(const PatchGeometry& g, int64_t group_by) {
  if (group_by == kPosition) return g.columns;
  const int64_t units = g.patch_h * ceil_div(g.patch_w, kUnit);
  return (group_by == kChannel ? g.batch : g.channels) * units;
}

template <typename acc_t>
Tiling make_tiling(const MapStrides& in, const PatchGeometry& g, int64_t group_by) {
  Tiling t{};
  const int64_t area = g.patch_h * g.patch_w;
  const auto share = [](int64_t wanted, int64_t least, int64_t most) {
    return static_cast<int>(std::clamp<int64_t>(wanted, least, std::max(least, most)));
  };
  // The threads of a warp read 32 neighbouring pixels, if there are that many.
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
  // One more pixel may be read at either end.
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
  t.parts = energy_parts(g, group_by);
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

// A thread's work: of one column, patches down, down + t.down, ... and likewise across.
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

}  // namespace pcka
