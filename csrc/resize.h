// Bilinear resize, align_corners=False, along one axis; shared by the CPU and CUDA kernels.
//
// Output index o of `out` reads the source at ((2o + 1) in / out - 1) / 2, clamped at 0. The
// position is kept as an integer fraction over 2 out, so the neighbours are exact and the weight
// is rounded once. For in == out every weight is 0: the identity.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace pcka {

// value = (1 - weight) * source[low] + weight * source[high]
template <typename acc_t>
struct Tap {
  int64_t low;
  int64_t high;
  acc_t weight;
};

// Calls f(o, in, out) with integers just wide enough for what is computed from them: 64-bit
// divisions are slow on a GPU.
template <typename F>
PCKA_HOST_DEVICE inline auto with_narrow(int64_t o, int64_t in, int64_t out, F&& f) {
  if (in < (1 << 14) && out < (1 << 14)) {  // (2 out + 1) in, out (2 in + 3) < 2^31
    return f(static_cast<int32_t>(o), static_cast<int32_t>(in), static_cast<int32_t>(out));
  }
  return f(o, in, out);
}

template <typename acc_t>
PCKA_HOST_DEVICE inline Tap<acc_t> bilinear_tap(int64_t index, int64_t source, int64_t resized) {
  return with_narrow(index, source, resized, [](auto o, auto in, auto out) -> Tap<acc_t> {
    auto numerator = (2 * o + 1) * in - out;
    if (numerator < 0) numerator = 0;
    const auto low = numerator / (2 * out);
    const auto high = low + 1 < in ? low + 1 : low;
    const acc_t weight =
        static_cast<acc_t>(numerator - low * 2 * out) / static_cast<acc_t>(2 * out);
    return {low, high, weight};
  });
}

// The weight with which source index `i` enters output index `o`: 1 minus their distance.
template <typename acc_t>
PCKA_HOST_DEVICE inline acc_t adjoint_weight(
    int64_t index, int64_t reader, int64_t source, int64_t resized) {
  return with_narrow(reader, source, resized, [index](auto o, auto in, auto out) -> acc_t {
    const auto i = static_cast<decltype(o)>(index);
    const auto position = (2 * o + 1) * in - out, here = 2 * out * i;
    if (i == 0 && position < 0) return 1;
    if (i == in - 1 && position > here) return 1;
    const auto distance = position < here ? here - position : position - here;
    if (distance >= 2 * out) return 0;
    return static_cast<acc_t>(2 * out - distance) / static_cast<acc_t>(2 * out);
  });
}

struct Range {
  int64_t begin;
  int64_t end;
};

// The first output that reads source index `i`.
PCKA_HOST_DEVICE inline int64_t first_reader(int64_t index, int64_t source, int64_t resized) {
  return with_narrow(index, source, resized, [](auto i, auto in, auto out) -> int64_t {
    // low >= i - 1  <=>  (2o + 1) in >= out (2i - 1), that is o >= first / (2 in).
    const auto first = out * (2 * i - 1) - in;
    return first <= 0 ? 0 : (first + 2 * in - 1) / (2 * in);
  });
}

// The outputs that read source index `i`: those with low or high equal to i, that is those before
// the first with low > i.
PCKA_HOST_DEVICE inline Range readers(int64_t i, int64_t in, int64_t out) {
  const int64_t end = first_reader(i + 2, in, out);
  return {first_reader(i, in, out), end < out ? end : out};
}

}  // namespace pcka
