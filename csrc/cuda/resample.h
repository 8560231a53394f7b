// Bilinear resize from tables in shared memory: where the resized pixels of some patches read the
// map.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../dtypes.h"
#include "../resize.h"
#include "column_blocks.h"
#include "vectors.h"

namespace pcka {

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

  // The i-th of their resized pixels.
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
  short pixels[kMaxTaps];                      // of `across`: source pixels, from the span's first
  acc_t folded[kFoldedBytes / sizeof(acc_t)];  // (down, height, span, channels)
  double sums[2][kThreads];

  // Of the axis, and `more` times its last patch: grouped reads may end beyond it.
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

// The two source lines of a resized line.
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

}  // namespace pcka
