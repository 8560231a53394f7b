// Arithmetic on lines: contiguous runs of values, the unit in which the CPU kernels work.
//
// Every function is a plain loop that the compiler vectorises, compiled for several generations of
// x86; the version is chosen when the library is loaded. Results do not depend on the number of
// threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "../dtypes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define PCKA_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PCKA_CLONES
#endif

namespace pcka {

// Scratch for lines, aligned to cache lines: vectors that straddle two are read and written at half
// the speed.
template <typename T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <typename U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}

  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
  }
  void deallocate(T* values, std::size_t) { ::operator delete(values, std::align_val_t{64}); }
  bool operator==(const CacheLineAllocator&) const { return true; }
  bool operator!=(const CacheLineAllocator&) const { return false; }
};

template <typename T>
using Lines = std::vector<T, CacheLineAllocator<T>>;

constexpr int kLanes = 16;  // sums kept side by side, so that they vectorise in a fixed order

template <typename T>
double add_lanes(const T (&lanes)[kLanes]) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// out = low + weight (high - low)
template <typename acc_t>
PCKA_CLONES void blend(
    const acc_t* low, const acc_t* high, acc_t weight, int64_t count, acc_t* __restrict__ out) {
  for (int64_t i = 0; i < count; ++i) out[i] = low[i] + weight * (high[i] - low[i]);
}

// out = low + weight (high - low) - mean, one mean per value; adds the squares of `out` to `lanes`.
template <typename acc_t>
PCKA_CLONES void blend_centered(
    const acc_t* __restrict__ low, const acc_t* __restrict__ high, acc_t weight,
    const acc_t* __restrict__ mean_high, const acc_t* __restrict__ mean_low, int64_t count,
    acc_t* __restrict__ out, double (&lanes)[kLanes]) {
  const auto step = [&](int64_t i, int j) {
    const acc_t value = low[i] + weight * (high[i] - low[i]);
    out[i] = (value - mean_high[i]) - mean_low[i];
    lanes[j] += static_cast<double>(out[i]) * out[i];
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) step(i + j, j);
  }
  for (; i < count; ++i) step(i, i % kLanes);
}

// sums += low + weight (high - low)
template <typename acc_t>
PCKA_CLONES void add_blend(
    const acc_t* low, const acc_t* high, acc_t weight, int64_t count, double* __restrict__ sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += low[i] + weight * (high[i] - low[i]);
}

// low += (1 - weight) line, high += weight line: the adjoint of blend. Both may be the same line.
template <typename acc_t>
PCKA_CLONES void scatter_blend(
    const acc_t* line, acc_t weight, int64_t count, acc_t* low, acc_t* high) {
  if (low == high || weight == 0) {
    for (int64_t i = 0; i < count; ++i) low[i] += line[i];
    return;
  }
  acc_t* __restrict__ first = low;
  acc_t* __restrict__ second = high;
  for (int64_t i = 0; i < count; ++i) {
    const acc_t part = weight * line[i];
    first[i] += line[i] - part;
    second[i] += part;
  }
}

template <typename scalar_t>
PCKA_CLONES void add_line(const scalar_t* line, int64_t count, double* __restrict__ sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(line[i]);
}

// A mean as the sum of two values, so that subtracting it from values far from zero loses nothing:
// their difference from `high` is exact.
template <typename acc_t>
struct Mean {
  explicit Mean(double mean)
      : high(static_cast<acc_t>(mean)), low(static_cast<acc_t>(mean - high)) {}
  acc_t high, low;
};

// `sums` is a line of `count` runs of `length`. For each position in a run, the mean is the sum
// over all runs divided by `rows`. Writes the means as such a line, high and low parts apart;
// modifies `sums`. Returns the energy that subtracting them removes.
template <typename acc_t>
PCKA_CLONES double spread_means(
    double* sums, int64_t length, int64_t count, int64_t rows, acc_t* high, acc_t* low) {
  for (int64_t i = 1; i < count; ++i) {
    for (int64_t j = 0; j < length; ++j) sums[j] += sums[i * length + j];
  }
  double squares = 0;
  for (int64_t j = 0; j < length; ++j) {
    const Mean<acc_t> mean(sums[j] / static_cast<double>(rows));
    squares += (sums[j] / static_cast<double>(rows)) * sums[j];
    high[j] = mean.high, low[j] = mean.low;
  }
  for (int64_t i = 1; i < count; ++i) {
    std::memcpy(high + i * length, high, length * sizeof(acc_t));
    std::memcpy(low + i * length, low, length * sizeof(acc_t));
  }
  return squares;
}

// line -= mean, one mean per value
template <typename acc_t>
PCKA_CLONES void subtract(
    acc_t* __restrict__ line, const acc_t* __restrict__ high, const acc_t* __restrict__ low,
    int64_t count) {
  for (int64_t i = 0; i < count; ++i) line[i] = (line[i] - high[i]) - low[i];
}

// line -= mean
template <typename acc_t>
PCKA_CLONES void subtract(acc_t* line, Mean<acc_t> mean, int64_t count) {
  for (int64_t i = 0; i < count; ++i) line[i] = (line[i] - mean.high) - mean.low;
}

template <typename acc_t>
PCKA_CLONES double sum(const acc_t* line, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += line[i + j];
  }
  for (; i < count; ++i) lanes[i % kLanes] += line[i];
  return add_lanes(lanes);
}

// Squares are summed in float64: those of float32 values neither overflow nor underflow in it.
template <typename acc_t>
PCKA_CLONES double sum_squares(const acc_t* line, int64_t count) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const double value = line[i + j];
      lanes[j] += value * value;
    }
  }
  for (; i < count; ++i) lanes[i % kLanes] += static_cast<double>(line[i]) * line[i];
  return add_lanes(lanes);
}

// sum of (scale_a a_i) (scale_b b_i)
template <typename T>
PCKA_CLONES double scaled_dot(
    const T* a, const T* b, int64_t count, double scale_a, double scale_b) {
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] += (scale_a * static_cast<acc_type<T>>(a[i + j])) *
                  (scale_b * static_cast<acc_type<T>>(b[i + j]));
    }
  }
  for (; i < count; ++i) {
    lanes[i % kLanes] +=
        (scale_a * static_cast<acc_type<T>>(a[i])) * (scale_b * static_cast<acc_type<T>>(b[i]));
  }
  return add_lanes(lanes);
}

struct Weights {
  double other, own;
};

// other y - own x, and other x - own y, if requested; either may be written over x or y.
template <typename T, typename to_t>
PCKA_CLONES void mix(
    const T* x, const T* y, int64_t count, Weights of_x, Weights of_y, to_t* to_x, to_t* to_y) {
  using acc_t = acc_type<T>;
  const auto mixed = [](const Weights& weights, const T& other, const T& own) {
    return static_cast<to_t>(static_cast<acc_t>(
        weights.other * static_cast<acc_t>(other) - weights.own * static_cast<acc_t>(own)));
  };
  if (to_y == nullptr) {
    for (int64_t i = 0; to_x != nullptr && i < count; ++i) to_x[i] = mixed(of_x, y[i], x[i]);
  } else if (to_x == nullptr) {
    for (int64_t i = 0; i < count; ++i) to_y[i] = mixed(of_y, x[i], y[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const to_t first = mixed(of_x, y[i], x[i]), second = mixed(of_y, x[i], y[i]);
      to_x[i] = first, to_y[i] = second;
    }
  }
}

template <typename T, typename to_t>
PCKA_CLONES void scale(const T* values, int64_t count, double factor, to_t* to) {
  using acc_t = acc_type<T>;
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<to_t>(static_cast<acc_t>(factor * static_cast<acc_t>(values[i])));
  }
}

template <typename from_t, typename to_t>
PCKA_CLONES void convert(const from_t* from, int64_t count, to_t* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<to_t>(from[i]);
}

// bfloat16 by its bits: the class's own conversions do not vectorise.
template <>
PCKA_CLONES inline void convert(const BFloat16* from, int64_t count, float* __restrict__ to) {
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
    std::memcpy(to + i, &wide, sizeof(wide));
  }
}

template <>
PCKA_CLONES inline void convert(const float* from, int64_t count, BFloat16* __restrict__ to) {
  uint16_t* bits = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; ++i) {
    uint32_t wide;
    std::memcpy(&wide, from + i, sizeof(wide));
    const uint32_t rounded =
        (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;  // to nearest, ties to even
    const bool is_nan = (wide & 0x7fffffff) > 0x7f800000;
    bits[i] = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
  }
}

// Prefetches a line that will soon be read; it need not exist.
template <typename T>
void prefetch(const T* line, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(line + i);
}

// Calls f(length), with the usual patch lengths as constants: copying one then takes an instruction
// or two.
template <typename F>
void with_fixed_length(int64_t length, F&& f) {
  if (length == 16) return f(std::integral_constant<int64_t, 16>{});
  if (length == 8) return f(std::integral_constant<int64_t, 8>{});
  if (length == 4) return f(std::integral_constant<int64_t, 4>{});
  f(length);
}

// `height` lines, `width` apart, cut into `count` patches of height x length, `stride` apart.
template <typename T, typename length_t>
PCKA_CLONES void lines_to_patches(
    const T* lines, int64_t width, int64_t height, int64_t count, length_t length, int64_t stride,
    T* __restrict__ patches) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t y = 0; y < height; ++y) {
      const T* run = lines + y * width + i * length;
      std::memcpy(patches + i * stride + y * length, run, length * sizeof(T));
    }
  }
}

template <typename T, typename length_t>
PCKA_CLONES void patches_to_lines(
    const T* patches, int64_t stride, int64_t height, int64_t count, length_t length, int64_t width,
    T* __restrict__ lines) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t y = 0; y < height; ++y) {
      const T* run = patches + i * stride + y * length;
      std::memcpy(lines + y * width + i * length, run, length * sizeof(T));
    }
  }
}

}  // namespace pcka
