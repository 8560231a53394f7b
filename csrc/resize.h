// Bilinear resize, align_corners=False, along one axis; shared by the CPU and CUDA kernels.
//
// Output index o of `out` reads the source at ((2o + 1) in / out - 1) / 2, clamped at 0. The
// position is kept as an integer fraction over 2 out, so the neighbours are exact and the weight
// is rounded once. For in == out every weight is 0: the identity.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PCKA_HOST_DEVICE __host__ __device__
#else
#define PCKA_HOST_DEVICE
#endif

namespace pcka {

// value = (1 - weight) * source[low] + weight * source[high]
template <typename acc_t>
struct Tap {
  int64_t low;
  int64_t high;
  acc_t weight;
};

// Whether int holds every intermediate value of the functions below: divisions of 64 bits are slow
// on a GPU.
PCKA_HOST_DEVICE inline bool fits_int(int64_t in, int64_t out) {
  const int64_t largest = in > out ? in : out;
  return largest < (int64_t{1} << 14);  // (2 out + 1) in, out (2 in + 3) < 2^31
}

template <typename acc_t, typename index_t>
PCKA_HOST_DEVICE inline Tap<acc_t> bilinear_tap(index_t o, index_t in, index_t out) {
  index_t numerator = (2 * o + 1) * in - out;
  if (numerator < 0) numerator = 0;
  const index_t low = numerator / (2 * out);
  const index_t high = low + 1 < in ? low + 1 : low;
  const acc_t weight = static_cast<acc_t>(numerator - low * 2 * out) / static_cast<acc_t>(2 * out);
  return {low, high, weight};
}

// The weight with which source index `i` enters output index `o`.
template <typename acc_t>
PCKA_HOST_DEVICE inline acc_t adjoint_weight(int64_t i, int64_t o, int64_t in, int64_t out) {
  const Tap<acc_t> tap = bilinear_tap<acc_t>(o, in, out);
  acc_t weight = 0;
  if (tap.low == i) weight += 1 - tap.weight;
  if (tap.high == i) weight += tap.weight;
  return weight;
}

struct Range {
  int64_t begin;
  int64_t end;
};

// The outputs that read source index `i`: those with low or high equal to i.
PCKA_HOST_DEVICE inline Range readers(int64_t i, int64_t in, int64_t out) {
  // low >= i - 1  <=>  (2o + 1) in >= out (2i - 1);  low <= i  <=>  (2o + 1) in < out (2i + 3).
  // Both bounds are ceil(a / (2 in)) of an `a` that is positive once the clamp at 0 is left.
  const int64_t first = out * (2 * i - 1) - in;
  const int64_t last = out * (2 * i + 3) - in;
  const int64_t begin = first <= 0 ? 0 : (first + 2 * in - 1) / (2 * in);
  const int64_t end = (last + 2 * in - 1) / (2 * in);
  return {begin, end < out ? end : out};
}

}  // namespace pcka
